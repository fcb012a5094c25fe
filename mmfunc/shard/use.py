"""A mesh in use, and the marks at which nn and the training step meet it; without a mesh all of them are identities.

One rule for gradients: what each rank's loss gives is its share of the global loss, whose sum over ranks it is; and a
parameter's gradient is summed over the axes that do not divide it. Collectives are exact transposes of each other, so
nothing else is needed.

Samples are divided among data, fsdp and ep. Within blocks the streams of x, its leaves [B, S, D], are divided along S
among ring, ulysses and, if the mesh says so, tp; embed, head and what stands between stacks see them whole.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfunc import tree
from mmfunc.shard import layout
from mmfunc.shard.collectives import Axes, gather, number, psum, share
from mmfunc.shard.layout import COMPUTE, P, Spec, relayout
from mmfunc.shard.mesh import AXES, ROWS, Net
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
    held: dict[str, tuple[int, ...]] = field(default_factory=dict)  # places on pp that have a parameter; none: all

    @property
    def rows(self) -> Axes:
        """The axes that divide sequences within blocks."""
        return self.net.axes((*ROWS, "tp") if self.net.mesh.sequence else ROWS)


@dataclass(frozen=True)
class Image:
    """Sides of whole images, or of the frames of a video, of which ranks have rows and all columns.

    Of the frames behind the first one, where they are divided, each rank along ring has as many.
    """

    height: int
    width: int
    axes: Axes  # that divide rows
    frames: int = 0  # behind the first one, of the whole video; 0: ranks have all of them
    own: int = 0  # and of each rank

    def at(self, x: Tensor, first: bool) -> "Image":
        """The same for what a rank has at another resolution."""
        height, own = self.height * x.shape[-1] // self.width, x.shape[2] - first if self.frames else 0
        return replace(self, height=height, width=x.shape[-1], own=own, frames=self.frames * own // max(self.own, 1))


Rows = tuple[int, ...] | Image


@dataclass
class Block:
    """The block that runs now."""

    layer: Layer
    rows: Rows  # lengths of the streams of x before they were divided; none: they are whole
    crossing: bool = False  # its attention reads keys of a context, which is whole


_use: list[Use | None] = [None]
_block: list[Block | None] = [None]


def using() -> Use | None:
    """The mesh in use."""
    return _use[-1]


def block() -> Block | None:
    """The block that runs now, where the rows of its streams are divided."""
    now = _block[-1]
    return now if now is not None and now.rows and isinstance(now.rows, tuple) else None


def image() -> Image | None:
    """The whole image (or frame) of which the block that runs now finds rows."""
    now = _block[-1]
    return now.rows if now is not None and isinstance(now.rows, Image) else None


@contextmanager
def apart():
    """Within, attention is of what this rank has, though the rows of the block are divided."""
    _block.append(_block[-1] and Block(_block[-1].layer, ()))
    try:
        yield
    finally:
        _block.pop()


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
        now.layers = _layers({n: layout.spec(p, now.net) for n, p in tree.flatten(declared).items()})


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
    rows = [None] * (x.ndim - 2)
    return relayout(x, P(*rows, now.rows), P(*rows, ROWS), now.net)


def leave(x: Tensor, axis: str) -> Tensor:
    """Sum the partial outputs of maps whose inputs were divided on a logical axis, or this rank's rows of the sum."""
    now = _use[-1]
    if now is None:
        return x
    here, there = (ROWS, now.rows) if block() is not None else ((), ())
    rows = [None] * (x.ndim - 2)
    return relayout(x, P(*rows, here, partial=parts(axis)), P(*rows, there), now.net)


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


def complete(x: Tensor, axis: str) -> Tensor:
    """The whole of a last dimension that may be divided on a logical axis: logits [..., V / n] -> [..., V]."""
    axes = parts(axis)
    return gather(x, x.ndim - 1, axes, _use[-1].net).narrow(-1, 0, size(f"{axis}/1")) if axes else x


def heads(cache: dict[str, Tree]) -> dict[str, Tree]:
    """Empty caches of layers, by path, [rows, slots, G, K], with the heads that this rank has."""
    now = _use[-1]
    if now is None or not now.net.axes((COMPUTE["heads"],)):
        return cache
    return {path: tree.map(partial(_heads, now.net, now.layers[path]), entry) for path, entry in cache.items()}


def _heads(net: Net, layer: Layer, t: Tensor) -> Tensor:
    groups, k = t.shape[2:]
    n = net.size((COMPUTE["kv"],))
    count = share(layer.sizes[f"heads/{k}"] // k if groups % n else groups, n)
    return t.new_zeros(*t.shape[:2], count, k)


def start(n: int, axis: str) -> Tensor | int:
    """The number of the first of this rank's n elements of a logical axis."""
    axes = parts(axis)
    return _use[-1].net.index(axes) * n if axes else 0


# ---- blocks

def in_layer(name: str) -> bool:
    """Whether a parameter, or a path, belongs to a layer of a list."""
    return any(part.isdigit() for part in name.split("."))


def crossing(context: bool) -> None:
    """Whether what attends next are the rows of x to keys of a context, which is whole, or to each other."""
    if _block[-1] is not None:
        _block[-1].crossing = context


def inside(fn: Callable, path: str, rows: Rows | None) -> Callable:
    """A block as a function of its layer's parts; it gathers them, so that a policy which runs it again does so too."""
    now = _use[-1]
    return fn if now is None else partial(_run, fn, now.layers[path], rows or (), in_layer(path))


def _run(fn: Callable, layer: Layer, rows: Rows, parted: bool, p: Tree, c: Any, x: Tree, ctx: Tree, *entry: Tree
         ) -> Any:
    now = _use[-1]
    if now.net.mesh.zero == 3 and parted:
        flat = tree.flatten(p)
        ways = {n: (s, s.store, s.compute) for n, s in layer.specs.items()}
        p = tree.unflatten(layout.gathered(flat, ways, now.net), p)
    _block.append(Block(layer, rows.at(x, number(("ring",), now.net) == 0) if isinstance(rows, Image) else rows))
    try:
        return fn(p, c, x, ctx, *entry)
    finally:
        _block.pop()
