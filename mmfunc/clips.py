"""Captioned pictures and videos as training batches of diffusion models: sizes, pixels, noise, an order without state.

A size is (frames, rows, columns) of pixels; a batch holds samples of one size. The noise and the time of a sample
depend on (seed, epoch, sample) only, its place in the order on (seed, epoch): not on batch sizes, workers or
accumulation. So resuming is a number.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset

from mmfunc import data, diffusion, features, media, random, shard
from mmfunc.records import Record

Size = tuple[int, int, int]


def sized(r: Record) -> Size:
    """Frames (1 of a picture), rows and columns of a record's medium, from its header; no or several media are a
    ValueError."""
    if len(r.images) + len(r.videos) != 1:
        raise ValueError(f"{r.id} has {len(r.images)} images and {len(r.videos)} videos; one of them is wanted")
    return media.header(r.images[0] if r.images else r.videos[0], video=bool(r.videos))


def nearest(size: Size, among: list[Size]) -> int:
    """Which size a medium goes to: pictures to those of one frame, else to the others; of these the shape that is
    nearest, and of equal ones the largest that does not enlarge, or the smallest."""
    kind = [i for i, s in enumerate(among) if (s[0] == 1) == (size[0] == 1)]
    if not kind:
        what = "a picture" if size[0] == 1 else "a video"
        raise ValueError(f"{what} of {size[2]} x {size[1]} pixels has no size among {among}")
    ratio = lambda s: round(abs(math.log(s[2] / s[1] * size[1] / size[2])), 4)
    best = min(map(ratio, (among[i] for i in kind)))
    kind = [i for i in kind if ratio(among[i]) == best]
    fits = [i for i in kind if among[i][0] <= size[0] and among[i][1] <= size[1] and among[i][2] <= size[2]]
    volume = lambda i: math.prod(among[i])
    return max(fits, key=volume) if fits else min(kind, key=volume)


def pixels(r: Record, size: Size, fps: float = 16.0, channels: int = 3) -> Tensor:
    """The medium of a record in -1..1: resized so that it covers the size, its middle cut out. [C, (T,) Y, X].

    Pictures by PIL's bicubic filter, videos by torch's antialiased bilinear one; frames are those nearest to 1/fps
    steps from the video's beginning on. One channel: grey.
    """
    t, h, w = size
    if r.images:
        x = media.image(r.images[0]).convert("L" if channels == 1 else "RGB")
        scale = max(h / x.height, w / x.width)
        inner = max(h, round(x.height * scale)), max(w, round(x.width * scale))
        x = x if inner == (x.height, x.width) else x.resize(inner[::-1], Image.Resampling.BICUBIC)
        x = torch.from_numpy(np.array(x)).view(*inner, channels).permute(2, 0, 1).float()
    else:
        x = media.frames(r.videos[0], t, fps).float()
        scale = max(h / x.shape[2], w / x.shape[3])
        inner = max(h, round(x.shape[2] * scale)), max(w, round(x.shape[3] * scale))
        x = x if inner == x.shape[2:] else interpolate(x, inner, mode="bilinear", antialias=True).clamp(0, 255)
        x = (x.mean(1, keepdim=True) if channels == 1 else x).transpose(0, 1)
    top, side = (inner[0] - h) // 2, (inner[1] - w) // 2
    return (x[..., top : top + h, side : side + w] / 127.5 - 1).contiguous()


@dataclass(frozen=True)
class Plan:
    """What a global batch is."""

    batch: tuple[int, ...]  # samples of a micro-batch, for each size
    accumulate: int = 1
    seed: int = 0
    drop: float = 0.1  # share of captions left out
    times: diffusion.Times = field(default_factory=diffusion.Times)
    shifts: tuple[float, ...] = ()  # of the times, for each size; none: that of times


class Batches(Dataset):
    """Global batches by number: (micro-batches, facts). A pure function of the number; on a mesh a rank has its part of
    each micro-batch.

    source: features.Ahead or online.Online. extra: what each batch holds besides, by name.
    """

    def __init__(self, source: Any, plan: Plan, extra: dict[str, float] | None = None):
        self.source, self.plan, self.extra = source, plan, extra or {}
        members = [[i for i, p in enumerate(source.place) if p == b] for b in range(len(source.sizes))]
        if not any(members):
            raise ValueError("there is no usable sample")
        if len(plan.batch) not in (1, len(members)):
            raise ValueError(f"{len(plan.batch)} batch sizes {plan.batch} for the {len(members)} sizes {source.sizes}")
        batch = plan.batch * (len(members) if len(plan.batch) == 1 else 1)
        self.members = members
        self.update = [b * plan.accumulate for b in batch]  # samples of an update, for each size
        self.rounds = [-(-len(m) // u) for m, u in zip(members, self.update)]  # updates of an epoch, for each size
        self.micro = batch
        self.part, self.parts = shard.part()
        if bad := [b for b in batch if b % self.parts]:
            raise ValueError(f"micro-batches of {bad[0]} samples do not divide among {self.parts} ranks with different "
                             "samples")

    def which(self, number: int) -> tuple[int, int]:
        """(size, how many of its batches came before) of a batch."""
        epoch, at = divmod(number, sum(self.rounds))
        at = data.order(self.plan.seed, epoch, sum(self.rounds), at)
        for size, n in enumerate(self.rounds):
            if at < n:
                return size, epoch * n + at
            at -= n
        raise AssertionError

    def turn(self, size: int, position: int, attempt: int = 0) -> tuple[int, int]:
        """(epoch, index) of the sample at a position among those of a size; another one for each attempt."""
        members = self.members[size]
        epoch, i = data.turn(self.plan.seed, position, len(members), attempt)
        return epoch, members[i]

    def draw(self, size: int, positions: list[int], bad: list[dict], take: Callable) -> list[tuple]:
        """(id, tensors, (epoch, index)) of the samples at positions; one that cannot be used is noted, and another
        taken that depends on the position only. take: indices -> samples, or errors."""
        found: dict[int, tuple] = {}
        for attempt in range(10):
            turns = {p: self.turn(size, p, attempt) for p in positions if p not in found}
            for (p, at), got in zip(turns.items(), take([i for _, i in turns.values()])):
                if isinstance(got, Exception):
                    bad.append({"index": at[1], "reason": str(got)})
                else:
                    found[p] = *got, at
            if len(found) == len(positions):
                return [found[p] for p in positions]
        raise ValueError(f"no usable sample after 10 tries; the last: {bad[-1]['reason']}")

    def noised(self, found: list[tuple], size: int) -> dict[str, Tensor]:
        """Samples as one batch, with noise [B, C, ...] and t [B], and now and then without the caption."""
        p = self.plan
        turns = torch.tensor([at for _, _, at in found])
        keys = random.fold_in(random.fold_in(random.key(p.seed), turns[:, 0]), turns[:, 1])
        noise, time, drop = random.split(keys, 3).unbind(1)
        dropped = (random.uniform(drop, ()) < p.drop).tolist()
        empty = self.source.empty() if any(dropped) else {}
        samples = [tensors | (empty if d else {}) for (_, tensors, _), d in zip(found, dropped)]
        batch = {n: torch.stack([s[n] for s in samples]) for n in sorted(samples[0])}
        latents = batch["latents"]
        return batch | {"noise": random.normal(noise, tuple(latents.shape[1:])).to(latents.dtype),
                        "t": diffusion.draw(p.times, time, shift=p.shifts[size] if p.shifts else None)}

    def positions(self, number: int) -> tuple[int, list[int]]:
        """The size of a batch, and where among the samples of that size this rank's lie."""
        size, turn = self.which(number)
        start, step = turn * self.update[size], self.micro[size] // self.parts
        first = range(start + self.part * step, start + self.update[size], self.micro[size])
        return size, [a + i for a in first for i in range(step)]

    def __getitem__(self, number: int) -> tuple[list[dict[str, Tensor]], dict]:
        return self._batch(number, lambda which: [features.attempt(self.source.__getitem__, i) for i in which])

    @property
    def early(self) -> Dataset:
        """What a loader makes: batches, or what ranks need to encode them together."""
        return Early(self) if getattr(self.source, "ranks", 1) > 1 else self

    def together(self, number: int, facts: dict) -> tuple[list[dict[str, Tensor]], dict]:
        """A batch of which a loader made `facts`; all ranks with the same samples call this."""
        return self._batch(number, partial(self.source.several, pixels=facts["pixels"]))

    def _batch(self, number: int, take: Callable) -> tuple[list[dict[str, Tensor]], dict]:
        size, positions = self.positions(number)
        bad: list[dict] = []
        found, step = self.draw(size, positions, bad, take), self.micro[size] // self.parts
        count = {"num_items_in_batch": torch.tensor(float(len(found)))}
        micro = []
        for a in range(0, len(found), step):
            batch = self.noised(found[a : a + step], size) | count
            micro.append(batch | {n: torch.full((len(batch["t"]),), v) for n, v in self.extra.items()})
        return micro, {"ids": [name for name, _, _ in found], "bad": bad, "tokens": 0, "samples": len(found)}


@dataclass
class Early(Dataset):
    """Of batches that ranks encode together, the pixels that this rank is to encode, by number."""

    batches: Batches

    def __getitem__(self, number: int) -> tuple[list[dict[str, Tensor]], dict]:
        b = self.batches
        size, positions = b.positions(number)
        pixels = b.source.ahead([b.turn(size, p)[1] for p in positions])
        shapes = [{"size": torch.empty(0, *b.source.sizes[size])}]
        return shapes, {"ids": [], "bad": [], "tokens": 0, "samples": 0, "pixels": pixels}
