"""Collectives of GE graphs, as PyTorch's on the group of the same ranks."""

import re

import torch
import torch.distributed as dist
from torch import Tensor

c10d = torch.ops._c10d_functional


def group(a: dict) -> str:
    """PyTorch's name for the group that an attribute names by its ranks."""
    found = re.search(r"rank_list=([\d,]+)", a["group"])
    if not found:
        raise ValueError(f"the group {a['group']!r} does not say its ranks")
    ranks = [int(n) for n in found[1].split(",")]
    return dist.distributed_c10d._find_or_create_pg_by_ranks_and_tag("", ranks, len(ranks)).group_name


def copied(x: Tensor) -> Tensor:
    """What simulated ranks may write to."""
    return x.clone(memory_format=torch.contiguous_format)


def all_reduce(a: dict, x: Tensor) -> Tensor:
    """The sum (or another reduction) over ranks."""
    if a["fusion"]:
        raise ValueError("HcomAllReduce that may be joined with others")
    return c10d.wait_tensor(c10d.all_reduce(copied(x), a["reduction"], group(a)))


def all_gather(a: dict, x: Tensor) -> Tensor:
    """What ranks have, one after the other."""
    return c10d.wait_tensor(c10d.all_gather_into_tensor(copied(x), a["rank_size"], group(a)))


def reduce_scatter(a: dict, x: Tensor) -> Tensor:
    """The sum over ranks, of which each gets its part."""
    done = c10d.reduce_scatter_tensor(copied(x), a["reduction"], a["rank_size"], group(a))
    return c10d.wait_tensor(done)


def all_to_all(a: dict, x: Tensor, send: list[int], here: list[int], receive: list[int], there: list[int]) -> Tensor:
    """Each rank sends a run of elements to every rank; counts and places count elements."""
    if any(start != sum(n[:i]) for n, at in ((send, here), (receive, there)) for i, start in enumerate(at)):
        raise ValueError(f"elements that do not follow each other: {here}, {there}")
    done = c10d.wait_tensor(c10d.all_to_all_single(x.flatten(), receive, send, group(a)))
    return done.view(x.shape) if done.numel() == x.numel() else done
