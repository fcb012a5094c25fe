"""Rows that blocks find divided: of sequences, of patches of a vision tower, of images and videos.

Streams [B, S, D] and patches [P, D] are divided along S and P among ring, ulysses and, if the mesh says so, tp; images
[B, C, Y, X] and videos [B, C, T, Y, X] along Y among ring and ulysses; videos that do not come frame by frame along T
among ring, the first frame on its first rank, and along Y among ulysses.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mmfunc import tree
from mmfunc.shard.collectives import Axes, cut, gather, number, padded, psum, share
from mmfunc.shard.layout import P, relayout
from mmfunc.shard.mesh import BATCH, ROWS
from mmfunc.shard.use import Image, Rows, block, using
from mmfunc.tree import Tree

RING = ("ring",)


def length(n: int) -> int:
    """The length to which sequences of n are padded within blocks."""
    now = using()
    parts = now.net.size(now.rows) * (2 if now.net.mesh.ring > 1 else 1)  # a ring has two parts for each rank
    return share(n, parts) * parts


def folded(x: Tensor, dim: int, *, back: bool = False) -> Tensor:
    """Rows for a ring, in 2n parts: the first and the last one for its first rank, and so on, so that causal attention
    costs all ranks the same (Brandon et al. 2023, arXiv:2311.09431)."""
    n = using().net.mesh.ring
    if n == 1:
        return x
    order = [i for r in range(n) for i in (r, 2 * n - 1 - r)]
    order = sorted(range(2 * n), key=order.__getitem__) if back else order
    found = x.unflatten(dim, (2 * n, -1)).unbind(dim)
    return torch.cat([found[i] for i in order], dim)


def spread(x: Tensor, dim: int, axes: Axes) -> Tensor:
    """This rank's rows of a whole sequence."""
    x = folded(padded(x, dim, length(x.shape[dim])), dim)
    return relayout(x, P(*[None] * x.ndim), P(*[None] * dim, axes, *[None] * (x.ndim - 1 - dim)), using().net)


def gathered(x: Tensor, dim: int, size: int) -> Tensor:
    """A whole sequence, of so many rows."""
    some, none = P(*[None] * dim, using().rows), P(*[None] * (dim + 1))
    return folded(relayout(x, some, none, using().net), dim, back=True).narrow(dim, 0, size)


def some(x: Tensor, fill: int = 0) -> Tensor:
    """Of rows that ranks of one sequence have in common, those that this rank is to work on; `fill` pads."""
    now = using()
    if now is None or not now.net.axes(ROWS):
        return x
    return cut(x - fill, 0, ROWS, now.net) + fill if fill else cut(x, 0, ROWS, now.net)


def together(x: Tensor) -> Tensor:
    """The sum over ranks of one sequence, of what they made of some rows each."""
    return x if using() is None else psum(x, ROWS, using().net)


def samples(x: Tensor) -> Tensor:
    """The sum over ranks with different samples."""
    return x if using() is None else psum(x, BATCH, using().net)


def divided(x: Tree) -> dict[str, int]:
    """By name, the leaves of x that are divided, and along which dimension: streams [B, S, D], or patches [P, D]."""
    dims = {n: t.ndim - 2 for n, t in tree.flatten(x).items() if t.ndim == 3 or t is x}
    return {n: d for n, d in dims.items() if d >= 0}


def split(x: Tree, rows: Rows | None, frames: Callable[[], int] | None = None) -> tuple[Tree, Rows | None]:
    """(this rank's rows of what flows, the sizes of the whole) before a block; what is split stays.

    frames: of a video, in whole multiples of which it may be divided; None: its frames stay together.
    """
    now = using()
    if now is None or rows is not None:
        return x, rows
    if isinstance(x, Tensor) and x.ndim > 3:
        return images(x, frames) if now.net.axes(ROWS) else (x, ())
    if not now.rows:
        return x, ()
    flat, dims = tree.flatten(x), divided(x)
    return (tree.unflatten(flat | {n: spread(flat[n], d, now.rows) for n, d in dims.items()}, x),
            tuple(flat[n].shape[d] for n, d in dims.items()))


def joined(x: Tree, rows: Rows | None) -> Tree:
    """What flows, whole again behind blocks."""
    if not rows:
        return x
    if isinstance(rows, Image):
        return imaged(x, rows)
    flat, sizes = tree.flatten(x), iter(rows)
    return tree.unflatten(flat | {n: gathered(flat[n], d, next(sizes)) for n, d in divided(x).items()}, x)


def images(x: Tensor, unit: Callable[[], int] | None) -> tuple[Tensor, Image]:
    """This rank's rows of images, or rows and frames of a video."""
    net, (height, width) = using().net, x.shape[-2:]
    if not (x.ndim == 5 and unit and x.shape[2] > 1 and net.mesh.ring > 1):
        return cut(x, x.ndim - 2, ROWS, net), Image(height, width, net.axes(ROWS))
    first, rest = cut(x, 3, ("ulysses",), net).split([1, x.shape[2] - 1], 2)
    mine = cut(rest, 2, RING, net, unit())
    return (mine if number(RING, net) else torch.cat([first, mine], 2),
            Image(height, width, net.axes(("ulysses",)), rest.shape[2], mine.shape[2]))


def imaged(x: Tensor, rows: Image) -> Tensor:
    """Whole images of what ranks have."""
    net, late = using().net, number(RING, using().net) > 0
    now = rows.at(x, not late)
    x = gather(x, x.ndim - 2, now.axes, net).narrow(-2, 0, now.height)
    if not now.frames:
        return x
    x = torch.cat([torch.zeros_like(x[:, :, :1]), x], 2) if late else x  # as many as the first rank has
    first, rest = gather(x, 2, RING, net).unflatten(2, (-1, now.own + 1)).split([1, now.own], 3)
    return torch.cat([first[:, :, 0], rest.flatten(2, 3)], 2).narrow(2, 0, now.frames + 1)


def local(x: Tensor, dim: int) -> Tensor:
    """This rank's rows of a whole tensor that has as many as all streams together, or as one of them."""
    own, dim = block().rows, dim % x.ndim
    n = x.shape[dim]
    sizes = own if n == sum(own) else (n,)
    if n not in (*own, sum(own)):
        raise ValueError(f"{n} rows belong to no stream of the block, which have {own}")
    return torch.cat([spread(t, dim, ROWS) for t in x.split(sizes, dim)], dim)
