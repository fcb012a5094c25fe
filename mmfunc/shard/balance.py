"""Encoders whose work is shared by ranks that have the same samples: each does some of the pictures or prompts, and all
get what all made."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from mmfunc.shard.collectives import gather, number, padded
from mmfunc.shard.mesh import ROWS
from mmfunc.shard.use import use, using


def plan(costs: Sequence[float], ranks: int, loads: Sequence[float] = ()) -> list[list[int]]:
    """Which items each rank does: the dearest first, each by the rank that has least to do (Graham 1969); loads: what
    each has to do besides."""
    loads, own = [*loads] or [0.0] * ranks, [[] for _ in range(ranks)]
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        r = min(range(ranks), key=loads.__getitem__)
        loads[r] += costs[i]
        own[r].append(i)
    return own


def shared(fn: Callable[[Any], Tensor], items: Sequence, costs: Sequence[float], shapes: Sequence[tuple[int, ...]]
           ) -> list[Tensor]:
    """fn of each item, of known shapes. Ranks along ring, ulysses and tp have equal items and do some each, by costs.

    fn runs without a mesh: its parameters are whole on each of these ranks.
    """
    now = using()
    axes = now.net.axes((*ROWS, "tp")) if now else ()
    if not axes or not items:
        with use(None):
            return [fn(x) for x in items]
    each, sizes = plan(costs, now.net.size(axes)), [prod(s) for s in shapes]
    # a rank without work repeats an item: its backward pass has to come by the exchange
    own = each[number(axes, now.net)] or [min(range(len(items)), key=sizes.__getitem__)]
    with use(None):
        row = torch.cat([fn(items[i]).flatten() for i in own])
    longest = max(sum(sizes[i] for i in some) for some in each)
    rows = gather(padded(row[:longest], 0, longest)[None], 0, axes, now.net)
    found = {i: t.view(shapes[i]) for r, some in enumerate(each)
             for i, t in zip(some, rows[r].split([*(sizes[i] for i in some), longest - sum(sizes[i] for i in some)]))}
    return [found[i] for i in range(len(items))]
