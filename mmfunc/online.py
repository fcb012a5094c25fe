"""Samples of diffusion models encoded from records when they are asked for: by one process, or together by ranks of a
mesh that have the same samples."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mmfunc import shard
from mmfunc.features import Row, attempt, caption, finite


@contextmanager
def one_thread() -> Iterator[None]:
    """Within, torch computes on one thread, as in a loader's process: some sums on the CPU depend on the number."""
    was = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(was)


class Encoder(NamedTuple):
    """A function of pixels or of a caption, and the FLOPs that it takes for a size or a caption."""

    make: Callable[[Any], dict[str, Tensor]]
    cost: Callable[[Any], float]


def made(name: str, encoders: Sequence[Encoder], x: Any) -> dict[str, Tensor]:
    """What encoders make of something, which is named where it cannot be used."""
    with one_thread(), shard.use(None):
        return {k: t for e in encoders for k, t in finite(name, e.make(x)).items()}


def joined(parts: Sequence[Any]) -> Any:
    """The first error among parts, or dicts of tensors as one."""
    return next((x for x in parts if isinstance(x, Exception)), None) or {k: t for x in parts for k, t in x.items()}


def flops(fn: Callable, *x: Any) -> int:
    """What a function of tensors without content does."""
    with FlopCounterMode(display=False) as count, torch.no_grad(), shard.use(None):
        fn(*x)
    return count.get_total_flops()


class Online:
    """Samples by number as features.Ahead has them, each encoded by itself, on one thread: the bits are the same
    wherever that is."""

    def __init__(self, rows: Any, place: list[int], sizes: list[tuple], read: Callable, seen: Sequence[Encoder],
                 said: Sequence[Encoder]):
        """read(record, size) -> pixels; seen: encoders of them, said: of captions; place: each record's size."""
        self.rows, self.place, self.sizes, self.read, self.seen, self.said = rows, place, sizes, read, seen, said
        self.known: dict[str, dict[str, Tensor]] = {}
        self.rank, self.ranks = shard.peers()

    def __len__(self) -> int:
        return len(self.rows)

    def text(self, caption: str) -> dict[str, Tensor]:
        """The features of a caption."""
        if caption not in self.known:
            self._keep(caption, made(f"the caption {caption!r}", self.said, caption))
        return self.known[caption]

    def _keep(self, caption: str, found: dict[str, Tensor]) -> None:
        """Of captions the latest thousand are kept."""
        if len(self.known) >= 1000:
            self.known.pop(next(iter(self.known)))
        self.known[caption] = found

    def size(self, i: int) -> tuple:
        """The size of a record."""
        return self.sizes[self.place[i]]

    def pixels(self, i: int) -> Tensor:
        """The medium of a record in its size."""
        with one_thread():
            return self.read(self.rows[i], self.size(i))

    def row(self, i: int) -> Row:
        """What a part is written from."""
        r, said = self.rows[i], caption(self.rows[i])
        return {"id": r.id, "size": list(self.size(i))}, made(r.id, self.seen, self.pixels(i)), said, self.text(said)

    def __getitem__(self, i: int) -> tuple[str, dict[str, Tensor]]:
        row, own, _, words = self.row(i)
        return row["id"], own | words

    def empty(self) -> dict[str, Tensor]:
        """The features of an empty caption."""
        return self.text("")

    # ---- ranks that have the same samples encode some each

    def _looks(self, which: Sequence[int]) -> list[list[tuple[int, int]]]:
        """The (record, encoder of pixels) that each rank does."""
        jobs = [(i, k) for i in dict.fromkeys(which) for k in range(len(self.seen))]
        own = shard.plan([self.seen[k].cost(self.size(i)) for i, k in jobs], self.ranks)
        return [[jobs[n] for n in some] for some in own]

    def ahead(self, which: Sequence[int]) -> dict[int, Tensor]:
        """The pixels of records that this rank will encode, where they can be read."""
        found = {i: attempt(self.pixels, i) for i in dict.fromkeys(i for i, _ in self._looks(which)[self.rank])}
        return {i: x for i, x in found.items() if isinstance(x, Tensor)}

    def several(self, which: Sequence[int], pixels: dict[int, Tensor]) -> list:
        """Samples as (id, tensors), or a ValueError that says why one cannot be used, the same on all ranks that have
        them; all of these call this. pixels: what was read ahead."""
        rows = [r for i in dict.fromkeys(which) if not isinstance(r := attempt(self.rows.__getitem__, i), Exception)]
        captions = {"", *(c for r in rows if isinstance(c := attempt(caption, r), str))} - self.known.keys()
        looks, jobs = self._looks(which), [(c, k) for c in sorted(captions) for k in range(len(self.said))]
        loads = [sum(self.seen[k].cost(self.size(i)) for i, k in some) for some in looks]
        own = shard.plan([self.said[k].cost(c) for c, k in jobs], self.ranks, loads)[self.rank]
        found = {job: attempt(self._look, *job, pixels) for job in looks[self.rank]}
        found |= {job: attempt(made, f"the caption {job[0]!r}", [self.said[job[1]]], job[0])
                  for job in (jobs[n] for n in own)}
        return self._united(which, {k: v for some in shard.everyone(found, shard.PEERS) for k, v in some.items()})

    def _look(self, i: int, k: int, pixels: dict[int, Tensor]) -> dict[str, Any]:
        r = self.rows[i]
        x = pixels[i] if i in pixels else self.pixels(i)
        return {"id": r.id, "caption": caption(r), **made(r.id, [self.seen[k]], x)}

    def _united(self, which: Sequence[int], found: dict[tuple, Any]) -> list:
        """Samples of what ranks have made; nothing but that decides, so that all come to the same."""
        lost, texts, out = ValueError("not all ranks could read it"), dict(self.known), []
        for c in sorted({c for c, _ in found if isinstance(c, str)}):
            texts[c] = joined([found.get((c, k), lost) for k in range(len(self.said))])
            if not isinstance(texts[c], Exception):
                self._keep(c, texts[c])
        for i in which:
            own = joined([found.get((i, k), lost) for k in range(len(self.seen))])
            words = own if isinstance(own, Exception) else texts.get(own["caption"], lost)
            both = joined([own, words])
            out.append(both if isinstance(both, Exception) else (
                both["id"], {k: t for k, t in both.items() if isinstance(t, Tensor)}))
        return out
