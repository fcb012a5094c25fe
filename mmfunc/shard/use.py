"""A mesh in use, and the marks at which nn and the training step meet it; without a mesh all of them are identities.

One rule for gradients: what each rank's loss gives is its share of the global loss, whose sum over ranks it is; and a
parameter's gradient is summed over the axes that do not divide it. Collectives are exact transposes of each other, so
nothing else is needed.

Samples are divided among data, fsdp and ep. Within blocks the streams of x, its leaves [B, S, D], are divided along S
among ring, ulysses and, if the mesh says so, tp; embed, head and what stands between stacks see them whole.
"""

import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mmfunc import tree
from mmfunc.shard import layout
from mmfunc.shard.collectives import Axes, cut, gather, padded, psum, share
from mmfunc.shard.layout import COMPUTE, P, Spec, relayout
from mmfunc.shard.mesh import AXES, BATCH, ROWS, Mesh, Net, connect
from mmfunc.tree import Tree

ALL = tuple(a for a in AXES if a != "pp")  # a stage has its own parameters


class Layer(NamedTuple):
    """What is known of the parameters under a name: their layouts, and how long each logical axis is in all."""

    specs: dict[str, Spec]
    sizes: dict[str, int]  # by axis and unit; 0: there are several


@dataclass
class Use:
    """A mesh with the layouts of a model's parameters."""

    net: Net
    layers: dict[str, Layer]  # by every prefix of names; "": all

    @property
    def rows(self) -> Axes:
        """The axes that divide sequences within blocks."""
        return self.net.axes((*ROWS, "tp") if self.net.mesh.sequence else ROWS)


@dataclass
class Block:
    """The block that runs now."""

    layer: Layer
    rows: tuple[int, ...]  # lengths of the streams of x before they were divided; none: they are whole
    crossing: bool = False  # its attention reads keys of a context, which is whole


_use: list[Use | None] = [None]
_block: list[Block | None] = [None]


def using() -> Use | None:
    """The mesh in use."""
    return _use[-1]


def block() -> Block | None:
    """The block that runs now, where the rows of its streams are divided."""
    now = _block[-1]
    return now if now is not None and now.rows else None


@contextmanager
def use(net: Net | None, declared: Tree = None):
    """Within, tensors are this rank's parts, as a mesh divides what `declared` declares; None: no mesh."""
    _use.append(net and Use(net, {"": Layer({}, {})}))
    try:
        declare(declared)
        yield
    finally:
        _use.pop()


def declare(declared: Tree) -> None:
    """Tell the mesh in use what there is to divide."""
    now = _use[-1]
    if now is not None:
        flat = tree.flatten(declared)
        now.layers = _layers({n: layout.spec(p, now.net) for n, p in flat.items()})


@contextmanager
def world(mesh: Mesh, device: str | torch.device = "cpu"):
    """Within, the ranks that torchrun has started are used as a mesh; one rank alone goes on without."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        dist.init_process_group({"cpu": "gloo", "npu": "hccl"}.get(torch.device(device).type, "nccl"))
    try:
        with use(connect(mesh, device) if max(size, mesh.world) > 1 else None):
            yield
    finally:
        if size > 1:
            dist.destroy_process_group()


def _layers(specs: dict[str, Spec]) -> dict[str, Layer]:
    under: dict[str, dict[str, Spec]] = {"": specs}
    for name, s in specs.items():
        parts = name.split(".")
        for i in range(1, len(parts)):
            under.setdefault(".".join(parts[:i]), {})[".".join(parts[i:])] = s
    same: dict[tuple, Layer] = {}  # equal layers are one object, so that one compiled block serves all of them
    return {k: same.setdefault(tuple(v.items()), Layer(v, _sizes(v))) for k, v in under.items()}


def _sizes(specs: dict[str, Spec]) -> dict[str, int]:
    out: dict[str, int] = {}
    for s in specs.values():
        for key, n in zip(map("{}/{}".format, s.names, s.units), s.shape):
            out[key] = n if out.get(key, n) == n else 0
    return out


def size(axis: str) -> int:
    """The whole length of a logical axis ("heads/64") in the block that runs now."""
    layer = _block[-1].layer if _block[-1] else _use[-1].layers[""]
    found = layer.sizes.get(axis, 0)
    if not found:
        raise ValueError(f"the length of {axis} is not known here, but of {', '.join(layer.sizes) or 'no axis'}")
    return found


def parts(axis: str) -> Axes:
    """The axes of the mesh that divide a logical axis ("heads", or "kv/64") now."""
    now, name = _use[-1], axis.partition("/")[0]
    if now is None or not now.net.axes((COMPUTE[name],)):
        return ()
    if name == "kv" and size(axis) // int(axis.partition("/")[2]) % now.net.size((COMPUTE[name],)):
        return ()
    return (COMPUTE[name],)


# ---- marks in nn

def enter(x: Tensor, axis: str) -> Tensor:
    """Bring an activation into maps whose outputs are divided on a logical axis: its rows, if tp divides them."""
    now = _use[-1]
    if now is None or block() is None:
        return x
    return relayout(x, P(None, now.rows), P(None, ROWS), now.net)


def leave(x: Tensor, axis: str) -> Tensor:
    """Sum the partial outputs of maps whose inputs were divided on a logical axis, or this rank's rows of the sum."""
    now = _use[-1]
    if now is None:
        return x
    rows = (ROWS, now.rows) if block() is not None else ((), ())
    return relayout(x, P(None, rows[0], partial=parts(axis)), P(None, rows[1]), now.net)


def summed(x: Tensor, axis: str) -> Tensor:
    """The sum of what ranks have of a logical axis."""
    axes = parts(axis)
    return psum(x, axes, _use[-1].net) if axes else x


def grouped(x: Tensor, axis: str, heads: str) -> Tensor:
    """Key heads [..., G, K] of this rank's query heads: all it has, or, where they are not divided as the query heads
    are, one for each query head."""
    if parts(axis) == parts(heads):
        return x
    unit, net = int(heads.partition("/")[2]), _use[-1].net
    whole, groups = size(heads) // unit, size(axis) // unit
    n = share(whole, net.size(parts(heads)))
    own = start(n, heads) + torch.arange(n, device=x.device)
    found = x.index_select(-2, (own * groups // whole).clamp(max=groups - 1))
    return found * (own < whole)[:, None].to(x.dtype)  # heads of padding find nothing


def mean(x: Tensor, axis: str) -> Tensor:
    """Mean over the last dimension, which may be divided on a logical axis ("heads/64"). [..., D] -> [..., 1]."""
    axes = parts(axis)
    if not axes:
        return x.mean(-1, keepdim=True)
    return psum(x.sum(-1, keepdim=True), axes, _use[-1].net) / size(axis)


def each(x: Tensor, axis: str) -> Tensor:
    """What every part of a logical axis has, [n, ...]."""
    return gather(x[None], 0, parts(axis), _use[-1].net)


def start(n: int, axis: str) -> Tensor | int:
    """The number of the first of this rank's n elements of a logical axis."""
    axes = parts(axis)
    return _use[-1].net.index(axes) * n if axes else 0


# ---- rows of sequences

def length(n: int) -> int:
    """The length to which sequences of n are padded within blocks."""
    now = _use[-1]
    parts = now.net.size(now.rows) * (2 if now.net.mesh.ring > 1 else 1)  # a ring has two parts for each rank
    return share(n, parts) * parts


def folded(x: Tensor, dim: int, *, back: bool = False) -> Tensor:
    """Rows for a ring, in 2n parts: the first and the last one for its first rank, and so on, so that causal attention
    costs all ranks the same (Brandon et al. 2023, arXiv:2311.09431)."""
    n = _use[-1].net.mesh.ring
    if n == 1:
        return x
    order = [i for r in range(n) for i in (r, 2 * n - 1 - r)]
    order = sorted(range(2 * n), key=order.__getitem__) if back else order
    found = x.unflatten(dim, (2 * n, -1)).unbind(dim)
    return torch.cat([found[i] for i in order], dim)


def spread(x: Tensor, dim: int, axes: Axes) -> Tensor:
    """This rank's rows of a whole sequence."""
    x = folded(padded(x, dim, length(x.shape[dim])), dim)
    return relayout(x, P(*[None] * x.ndim), P(*[None] * dim, axes, *[None] * (x.ndim - 1 - dim)), _use[-1].net)


def some(x: Tensor, fill: int = 0) -> Tensor:
    """Of rows that ranks of one sequence have in common, those that this rank is to work on; `fill` pads."""
    now = _use[-1]
    if now is None or not now.net.axes(ROWS):
        return x
    return cut(x - fill, 0, ROWS, now.net) + fill if fill else cut(x, 0, ROWS, now.net)


def together(x: Tensor) -> Tensor:
    """The sum over ranks of one sequence, of what they made of some rows each."""
    return x if _use[-1] is None else psum(x, ROWS, _use[-1].net)


def samples(x: Tensor) -> Tensor:
    """The sum over ranks with different samples."""
    return x if _use[-1] is None else psum(x, BATCH, _use[-1].net)


def split(x: Tree, rows: tuple[int, ...] | None) -> tuple[Tree, tuple[int, ...] | None]:
    """(this rank's rows of the streams of x, the lengths of the whole ones) before a block; what is split stays."""
    now = _use[-1]
    if now is None or rows is not None:
        return x, rows
    if not now.rows:
        return x, ()
    mine = tree.map(lambda t: spread(t, 1, now.rows) if t.ndim == 3 else t, x)
    return mine, tuple(t.shape[1] for t in tree.leaves(x) if t.ndim == 3)


def joined(x: Tree, rows: tuple[int, ...] | None) -> Tree:
    """The whole streams of x behind blocks."""
    if not rows:
        return x
    now, sizes = _use[-1], iter(rows)
    all_ = lambda t: folded(relayout(t, P(None, now.rows), P(None, None), now.net), 1, back=True)
    return tree.map(lambda t: all_(t).narrow(1, 0, next(sizes)) if t.ndim == 3 else t, x)


def local(x: Tensor, dim: int) -> Tensor:
    """This rank's rows of a whole tensor that has as many as all streams together, or as one of them."""
    now, dim = _block[-1], dim % x.ndim
    n = x.shape[dim]
    sizes = now.rows if n == sum(now.rows) else (n,)
    if n not in (*now.rows, sum(now.rows)):
        raise ValueError(f"{n} rows belong to no stream of the block, which have {now.rows}")
    return torch.cat([spread(t, dim, ROWS) for t in x.split(sizes, dim)], dim)


def crossing(context: bool) -> None:
    """Whether what attends next are the rows of x to keys of a context, which is whole, or to each other."""
    if _block[-1] is not None:
        _block[-1].crossing = context


def inside(fn: Callable, path: str, rows: tuple[int, ...] | None) -> Callable:
    """A block as a function of its layer's parts; it gathers them, so that a policy which runs it again does so too."""
    now = _use[-1]
    return fn if now is None else partial(_run, fn, now.layers[path], rows or ())


def _run(fn: Callable, layer: Layer, rows: tuple[int, ...], p: Tree, c: Any, x: Tree, ctx: Tree, *entry: Tree) -> Any:
    now = _use[-1]
    if now.net.mesh.zero == 3:
        flat = tree.flatten(p)
        ways = {n: (s, s.store, s.compute) for n, s in layer.specs.items()}
        p = tree.unflatten(layout.gathered(flat, ways, now.net), p)
    _block.append(Block(layer, rows))
    try:
        return fn(p, c, x, ctx, *entry)
    finally:
        _block.pop()
