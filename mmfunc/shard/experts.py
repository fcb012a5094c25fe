"""Mixtures of experts, of which the ranks along ep have some each: tokens go to the ranks of their experts and back.

A router chooses k experts for each token. Every expert has room for as many tokens of each rank, so that shapes depend
on declared sizes only (Lepikhin et al. 2020, arXiv:2006.16668); with room for all of them nothing is dropped.

As with other maps that tp may divide, rows are entered before (`enter(x, "mlp")`, the router's too), and
what experts made of them is left behind combine (`leave(y, "mlp")`).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mmfunc.shard.collectives import exchange, psum
from mmfunc.shard.context import streams
from mmfunc.shard.mesh import BATCH, ROWS
from mmfunc.shard.rows import local
from mmfunc.shard.use import block, using

EP = ("ep",)


class Routes(NamedTuple):
    """Where tokens go: their places in the buffer of all experts, and how many tokens of all ranks each expert has."""

    place: Tensor  # [N, k] among E * room; -1: nowhere, there was no room
    counts: Tensor  # [E] float32, dropped ones included
    room: int


def routes(ids: Tensor, count: int, room: int | None = None) -> Routes:
    """Places for tokens among `count` experts. ids [B, S, k] of each token's experts, all different; room: for tokens
    of a rank at each expert, None: enough for any. Rows that pad sequences go nowhere and are not counted."""
    size, room = ids.shape[:2], room or ids.shape[0] * ids.shape[1]
    chosen = torch.nn.functional.one_hot(ids.flatten(), count)
    if block():
        real = local(torch.ones(sum(streams(size[1])), dtype=chosen.dtype, device=ids.device), 0)
        chosen = chosen * real.expand(size).reshape(-1, 1).repeat_interleave(ids.shape[-1], 0)
    before = ((chosen.cumsum(0) - 1) * chosen).sum(-1)
    stays = (before < room) & (chosen.sum(-1) > 0)
    place = torch.where(stays, ids.flatten() * room + before, -1).view(-1, ids.shape[-1])
    counts, now = chosen.sum(0).float(), using()
    return Routes(place, psum(counts, now.net.axes((*BATCH, *ROWS)), now.net) if now else counts, room)


def dispatch(x: Tensor, to: Routes) -> Tensor:
    """Tokens before their experts: x [B, S, D] -> [E / n, n * room, D], of this rank's experts; empty places are
    zero."""
    size = len(to.counts) * to.room
    rows, at = x.flatten(0, 1).repeat_interleave(to.place.shape[1], 0), torch.where(to.place < 0, size, to.place)
    full = x.new_zeros(size + 1, x.shape[-1]).index_copy(0, at.flatten(), rows)[:size].unflatten(0, (-1, to.room))
    return exchange(full, 0, 1, using().net.axes(EP), using().net) if using() else full


def combine(y: Tensor, to: Routes, weight: Tensor) -> Tensor:
    """What experts made of tokens, back and summed: y [E / n, n * room, D], weight [B, S, k] -> [B, S, D]."""
    y = exchange(y, 1, 0, using().net.axes(EP), using().net) if using() else y
    y = y[: len(to.counts)].flatten(0, 1)
    nothing = y.new_zeros(1, y.shape[-1])
    found = torch.cat([y, nothing]).index_select(0, torch.where(to.place < 0, len(y), to.place).flatten())
    return (found.view(*weight.shape, -1) * weight[..., None]).sum(-2)
