"""From records to batches: a stateless order, packing, buckets, and a loader whose only state is an integer.

Batch number b is a function of (seed, b): resuming is a number, whatever the number of workers. Samples are padded to
declared sizes, so that every batch of a bucket runs the same graph, with pictures or without.
"""

import json
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mmfunc import packs, shard
from mmfunc.prefetch import Prefetch
from mmfunc.records import Records

Sample = dict[str, Any]


def order(seed: int, epoch: int, n: int, i: int) -> int:
    """Where position i of an epoch lies in a random order of n: a permutation by a Feistel network, without memory."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        a, b = i >> half, i & mask
        for r in range(4):
            a, b = b, a ^ (xxhash.xxh3_64_intdigest(b"%d,%d,%d,%d" % (seed, epoch, r, b)) & mask)
        i = a << half | b
        if i < n:
            return i


def turn(seed: int, position: int, n: int, attempt: int = 0) -> tuple[int, int]:
    """(epoch, index) of the sample of n at a position; another one for each attempt."""
    epoch, i = divmod(position, n)
    epoch += attempt * 1_000_003  # an order that no real epoch has
    return epoch, order(seed, epoch, n, i)


def pack(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Samples into rows of a size, longest first, each into the first row with room; rows in order of their first
    sample."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        r = next((r for r, free in enumerate(room) if free >= lengths[i]), len(rows))
        if r == len(rows):
            rows.append([])
            room.append(size)
        rows[r].append(i)
        room[r] -= lengths[i]
    return sorted(sorted(r) for r in rows)


def collate(samples: Sequence[Sample], rows: Sequence[Sequence[int]], size: int, pad: int, count: int
            ) -> dict[str, Tensor]:
    """A batch under the hub's names. rows: which samples stand in each row; count: rows in all; the rest is padding.

    attention_mask holds segment ids 1, 2, ... within a row. The first label of each sample is -100, so that no sample
    predicts the next one's first token.
    """
    ids, labels = torch.full((count, size), pad), torch.full((count, size), -100)
    mask = torch.zeros(count, size, dtype=torch.int64)
    for r, members in enumerate(rows):
        at = 0
        for k, i in enumerate(members):
            n = len(samples[i]["input_ids"])
            ids[r, at : at + n], labels[r, at : at + n] = samples[i]["input_ids"], samples[i]["labels"]
            labels[r, at] = -100
            mask[r, at : at + n] = k + 1
            at += n
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    turn = [samples[i] for members in rows for i in members]
    for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts"):
        if found := [s[name] for s in turn if name in s]:
            batch[name] = torch.cat(found)
    return batch


def left(samples: Sequence[Sample], pad: int, size: int = 0) -> dict[str, Tensor]:
    """Prompts as a batch for generation: right-aligned, attention_mask [B, S]."""
    size = max(size, *(len(s["input_ids"]) for s in samples))
    moved = [s | {"input_ids": torch.nn.functional.pad(s["input_ids"], (size - len(s["input_ids"]), 0), value=pad),
                  "labels": torch.full((size,), -100)} for s in samples]
    batch = collate(moved, [[i] for i in range(len(moved))], size, pad, len(moved))
    lengths = torch.tensor([len(s["input_ids"]) for s in samples])
    batch["attention_mask"] = (torch.arange(size) >= size - lengths[:, None]).long()
    del batch["labels"]
    return batch


@dataclass(frozen=True)
class Plan:
    """What a global batch is."""

    batch: int  # samples of a micro-batch
    tokens: tuple[int, ...]  # lengths of rows; a micro-batch takes the smallest that fits
    patches: tuple[int, ...] = ()  # size of the patch buffer, for each length; none: no pictures, or any number
    accumulate: int = 1  # micro-batches of an update
    rows: int = 0  # samples are packed into so many rows, or twice, thrice ... as many to fit; 0: one each
    seed: int = 0
    long: str = "error"  # a sample longer than the rows: "error", or "replace" it like a broken one

    def __post_init__(self):
        if (self.patches and len(self.tokens) != len(self.patches)) or list(self.tokens) != sorted(self.tokens):
            raise ValueError(f"tokens {self.tokens} and patches {self.patches} must be as many, shortest first")

    def sizes(self) -> dict[int, int | None]:
        """The patch buffer of each row length; None where none is declared."""
        return dict(zip(self.tokens, self.patches or [None] * len(self.tokens)))


class Batches(Dataset):
    """Global batches by number: (micro-batches, facts). A pure function of the number; what a loader's workers hold.

    On a mesh a rank has its part of each micro-batch: the global batch is the same on every mesh. known: of all
    records, so that all ranks have about the same to compute; None: each has as many samples, as they come.
    """

    def __init__(self, records: Records, encode: Callable, prepare: Callable, plan: Plan, pad: int = 0,
                 known: packs.Known | None = None):
        self.records, self.encode, self.prepare, self.plan, self.pad = records, encode, prepare, plan, pad
        self.known = known
        self.part, self.parts = shard.part()
        if plan.batch % self.parts or plan.rows % self.parts:
            raise ValueError(f"micro-batches of {plan.batch} samples in {plan.rows or plan.batch} rows do not divide "
                             f"among {self.parts} ranks with different samples")

    def turn(self, position: int, attempt: int = 0) -> int:
        """The record at a position; another one for each attempt."""
        return turn(self.plan.seed, position, len(self.records), attempt)[1]

    def draw(self, position: int, bad: list[dict]) -> Sample:
        """The sample at a position; one that cannot be used is noted, and another taken that depends on the position
        only."""
        for attempt in range(10):
            index = self.turn(position, attempt)
            try:
                r = self.records[index]
                sample = self.encode(r) | {"id": r.id}
            except (ValueError, OSError) as e:
                bad.append({"index": index, "reason": str(e)})
                continue
            if (size := len(sample["input_ids"])) <= self.plan.tokens[-1]:
                return sample
            reason = f"{r.id} has {size} tokens, the longest row has {self.plan.tokens[-1]}; samples are never cut"
            if self.plan.long == "error":
                raise ValueError(reason + ". Declare longer rows, or choose to replace long samples")
            bad.append({"index": index, "reason": reason})
        raise ValueError(f"no usable sample after 10 tries; the last: {bad[-1]['reason']}")

    def __getitem__(self, number: int) -> tuple[list[dict[str, Tensor]], dict]:
        p, bad, sizes = self.plan, [], self.plan.sizes()
        starts = [(number * p.accumulate + m) * p.batch for m in range(p.accumulate)]
        dealt = [self.deal(start) for start in starts] if self.known else []
        made = [self._dealt(*at, bad) for at in zip(starts, dealt)] or [self._part(start, bad) for start in starts]
        samples, micro = [s for some, _ in made for s in some], [m for _, m in made]
        targets = sum((m["labels"][:, 1:] >= 0).sum() for m in micro)
        count = {"num_items_in_batch": targets if self.parts > 1 else targets.clamp(min=1)}
        micro = [self.prepare(m | count, sizes[m["input_ids"].shape[1]]) for m in micro]
        tokens = sum(int((m["attention_mask"] > 0).sum()) for m in micro)
        told = {"spread": max(d.spread for _, d in dealt)} if dealt else {}
        return micro, {"ids": [s["id"] for s in samples], "bad": bad, "tokens": tokens, "samples": len(samples),
                       "told": told}

    def _part(self, start: int, bad: list[dict]) -> tuple[list[Sample], dict[str, Tensor]]:
        """This rank's part of the samples from a position on, as they come."""
        each = self.plan.batch // self.parts
        samples = [self.draw(start + self.part * each + i, bad) for i in range(each)]
        return samples, self._micro(samples)

    def _dealt(self, start: int, dealt: tuple[int, packs.Dealt], bad: list[dict]
               ) -> tuple[list[Sample], dict[str, Tensor]]:
        """This rank's share of the samples from a position on, in rows as they were dealt."""
        p, size, rows = self.plan, dealt[0], dealt[1].rows[self.part]
        found = {i: self.draw(start + i, bad) for row in rows for i in row}
        samples, at = [*found.values()], {i: n for n, i in enumerate(found)}
        longest = max(sum(len(found[i]["input_ids"]) for i in row) for row in rows)
        if longest > size or _patches(samples) > (p.sizes()[size] or math.inf):
            return samples, self._micro(samples)  # in place of a broken sample came one that is longer
        return samples, collate(samples, [[at[i] for i in row] for row in rows], size, self.pad, len(rows))

    def deal(self, start: int) -> tuple[int, packs.Dealt]:
        """(length of rows, the samples from a position on as ranks have them); the same on all of them."""
        p, known, longest = self.plan, self.known, self.plan.tokens[-1]
        usable = lambda i: 0 < known.tokens[i] <= longest
        turns = [[self.turn(start + i, n) for n in range(10)] for i in range(p.batch)]
        which = [next(filter(usable, some), some[0]) for some in turns]
        tokens, patches, costs = (x[which] for x in known)
        tokens = tokens.clip(max=longest)  # who draws what is longer says so
        least = (p.rows or p.batch) // self.parts
        for size, buffer in p.sizes().items():
            lengths = tokens if p.rows else np.full(p.batch, size)  # a row has one sample, or as many as fit
            for rows in range(least, p.batch + least, least) if size >= tokens.max() else ():
                if found := packs.deal(lengths, costs, self.parts, rows, size, patches, buffer):
                    return size, found
        raise ValueError(f"{p.batch} samples with up to {tokens.max()} tokens and {patches.sum()} patches cannot be "
                         f"dealt to {self.parts} ranks with rows of {p.tokens} tokens and {p.patches} patches. Declare "
                         "more, or smaller batches")

    def _micro(self, samples: list[Sample]) -> dict[str, Tensor]:
        p = self.plan
        lengths = [len(s["input_ids"]) for s in samples]
        patches = _patches(samples)
        fits = [t for t, n in self.plan.sizes().items() if t >= max(lengths) and (n is None or n >= patches)]
        if not fits:
            raise ValueError(
                f"samples {', '.join(s['id'] for s in samples[:3])} ... have {patches} patches; the buffers hold "
                f"{p.patches}. Declare more, or smaller batches"
            )
        rows = pack(lengths, fits[0]) if p.rows else [[i] for i in range(len(samples))]
        least = p.rows // self.parts
        count = least * -(-len(rows) // least) if p.rows else len(rows)
        return collate(samples, rows, fits[0], self.pad, count)


def _patches(samples: Sequence[Sample]) -> int:
    return sum(len(s[n]) for s in samples for n in ("pixel_values", "pixel_values_videos") if n in s)


def measured(records: Records, measure: Callable) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, patches) of all records, [n] each, 0 where one cannot be used; each rank measures some of them."""
    rank, world = shard.rank()
    own = [(0, 0)] * len(range(rank, len(records), world))
    for n, i in enumerate(range(rank, len(records), world)):
        try:
            own[n] = measure(records[i])
        except (ValueError, OSError):
            pass  # told when it is drawn
    out = np.zeros((len(records), 2), np.int64)
    for r, some in enumerate(shard.everyone(np.array(own, np.int64).reshape(-1, 2))):
        out[r::world] = some
    return out[:, 0], out[:, 1]


def stream(batches: Dataset, start: int, stop: int, workers: int = 0, watch: Callable = lambda number, facts: None
           ) -> Iterator[tuple[int, list[dict[str, Tensor]], dict]]:
    """(number, micro-batches, facts) for the numbers from start to stop, which watch gets to know; the same for any
    number of loader processes. What complete() gives of them is the batch to train on."""
    loader = DataLoader(getattr(batches, "early", batches), batch_size=None, sampler=range(start, stop),
                        num_workers=workers, prefetch_factor=4 if workers else None, worker_init_fn=_steady)
    items = Prefetch(iter(loader)) if workers else iter(loader)
    for number in range(start, stop):
        with shard.use(None):  # encoders may run there
            found = [next(items)]
        watch(number, found[0][1])
        yield number, *found.pop()  # nothing is kept: to give up a batch takes time


def complete(batches: Dataset, number: int, micro: list[dict[str, Tensor]], facts: dict, watch: Callable
             ) -> tuple[list[dict[str, Tensor]], dict]:
    """(micro-batches, facts) of a stream's batch, which ranks that have the same samples may encode together here."""
    if "pixels" not in facts:
        return micro, facts
    micro, facts = batches.together(number, facts)
    watch(number, facts)
    return micro, facts


def _steady(worker: int) -> None:
    """A loader process ends with the one that started it: what is sent to all processes of a job is not for it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


class Watch:
    """Writes down samples that could not be used; too many of them stop the run."""

    def __init__(self, file: Path, share: float = 0.01, least: int = 200):
        self.file, self.share, self.least = Path(file), share, least
        self.drawn = self.bad = 0

    def __call__(self, number: int, facts: dict) -> None:
        """Note a batch; more than the share of at least `least` samples is a ValueError."""
        self.drawn += facts["samples"]
        self.bad += len(facts["bad"])
        if facts["bad"]:
            with self.file.open("a") as f:
                f.writelines(json.dumps({"batch": number, **b}) + "\n" for b in facts["bad"])
        if self.bad > self.share * max(self.drawn, self.least):
            raise ValueError(
                f"{self.bad} of {self.drawn} samples could not be used, more than {self.share:.0%}; see {self.file}. "
                f"The last: {facts['bad'][-1]['reason'] if facts['bad'] else ''}"
            )
