"""Convolutions and the norms between them. Channels are dimension 1; Y and X are the last two."""

from collections.abc import Callable, Iterable
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from mmfunc.tree import Param, Tree, normal, ones


def Conv(c_in: int, c_out: int, kernel: tuple[int, ...], *, bias: bool = True) -> Tree:
    """A convolution over len(kernel) dimensions."""
    axes = " ".join("_" * (2 + len(kernel)))
    weight = Param((c_out, c_in, *kernel), axes, normal((c_in * prod(kernel)) ** -0.5))
    return {"weight": weight, "bias": Param((c_out,), "_")} if bias else {"weight": weight}


def conv(p: Tree, x: Tensor, *, stride: int | tuple[int, ...] = 1, padding: int | tuple[int, ...] = 0) -> Tensor:
    """[B, C, ...] -> [B, C', ...] over 1, 2 or 3 dimensions."""
    run = (F.conv1d, F.conv2d, F.conv3d)[p["weight"].ndim - 3]
    return run(x, p["weight"], p.get("bias"), stride, padding)


def causal(p: Tree, x: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A convolution over time that sees no later frame: [B, C, T, Y, X] -> [B, C', T, Y, X], and the next call's past.

    past [B, C, kernel - 1, Y, X] are the frames before x, zeros without it.
    """
    weight, (time, *sides) = p["weight"], p["weight"].shape[2:]
    seen = F.pad(x, (0, 0, 0, 0, time - 1, 0)) if past is None else torch.cat([past, x], 2)
    later = seen[:, :, seen.shape[2] - time + 1 :].clone()  # a view would keep all of seen alive
    if past is None and x.shape[2] == 1:  # all but the last tap meet zeros
        p, seen = {**p, "weight": weight[:, :, -1:]}, x
    return conv(p, seen, padding=(0, *(k // 2 for k in sides))), later


def _planes(p: Tree, x: Tensor, stride: int, padding: int) -> Tensor:
    """A 2-D convolution of an image, or of each frame of a video without moving time among the batch."""
    if x.ndim == 4:
        return conv(p, x, stride=stride, padding=padding)
    p = {**p, "weight": p["weight"].unsqueeze(2)}
    return conv(p, x, stride=(1, stride, stride), padding=(0, padding, padding))


def halve(p: Tree, x: Tensor) -> Tensor:
    """Half the rows and columns by a 3 x 3 convolution that looks past the end: [B, C, (T,) Y, X] -> Y / 2, X / 2."""
    return _planes(p, F.pad(x, (0, 1, 0, 1)), 2, 0)


def double(p: Tree, x: Tensor) -> Tensor:
    """Each pixel becomes 2 x 2, then a 3 x 3 convolution: [B, C, (T,) Y, X] -> [B, C', (T,) 2Y, 2X]."""
    return _planes(p, F.interpolate(x, scale_factor=(1.0, 2.0, 2.0)[5 - x.ndim :]), 1, 1)


def GroupNorm(c: int) -> Tree:
    """Scale and shift of c channels."""
    return {"weight": Param((c,), "_", ones), "bias": Param((c,), "_")}


def groupnorm(p: Tree, x: Tensor, groups: int = 32, eps: float = 1e-6) -> Tensor:
    """Normalise groups of channels over all positions, in float32. [B, C, ...] -> [B, C, ...]."""
    return F.group_norm(x.float(), groups, p["weight"].float(), p["bias"].float(), eps).to(x.dtype)


def _blended(a: Tensor, b: Tensor, size: int, dim: int) -> Tensor:
    """b, its first `size` rows (dim -2) or columns (dim -1) faded in over the last ones of a."""
    n = min(size, a.shape[dim], b.shape[dim])
    weight = (torch.arange(n, device=b.device) / n).to(b.dtype).view((-1, 1) if dim == -2 else (-1,))
    start, rest = b.split([n, b.shape[dim] - n], dim)
    return torch.cat([a.narrow(dim, a.shape[dim] - n, n) * (1 - weight) + start * weight, rest], dim)


def tiled(fn: Callable[[Tensor], Tensor], x: Tensor, tile: int | None, overlap: int | None = None, *,
          enlarge: int = 1, reduce: int = 1) -> Tensor:
    """fn on square tiles of [..., Y, X], whose overlaps fade linearly into each other; only a row of tiles is kept.

    tile and overlap (a quarter of the tile, unless given) count in the finer of input and output; fn multiplies sides
    by `enlarge` or divides them by `reduce`. What fits into one tile, or tile None, goes through fn as it is.
    """
    if tile is None:
        return fn(x)
    unit, overlap = max(enlarge, reduce), tile // 4 if overlap is None else overlap
    if tile % unit or overlap % unit or not 0 <= overlap < tile:
        raise ValueError(f"tiles of {tile} pixels that overlap by {overlap}: both must be multiples of {unit}, and the "
                         "overlap smaller than the tile")
    size, step = tile // enlarge, (tile - overlap) // enlarge
    keep, fade = (tile - overlap) // reduce, overlap // reduce
    if max(x.shape[-2:]) <= size:
        return fn(x)
    above, rows = [], []
    for i in range(0, x.shape[-2], step):
        row = []
        for j in range(0, x.shape[-1], step):
            y = fn(x[..., i : i + size, j : j + size])
            y = _blended(above[len(row)], y, fade, -2) if above else y
            row.append(_blended(row[-1], y, fade, -1) if row else y)
        rows.append(torch.cat([y[..., :keep, :keep] for y in row], -1))
        above = row
    return torch.cat(rows, -2)


def joined(parts: Iterable[Tensor], frames: int) -> Tensor:
    """The parts of a stream, each [B, C, T, Y, X], as one tensor of so many frames: memory never holds them twice."""
    whole, at = None, 0
    for y in parts:
        if y.shape[2] == frames:
            return y
        whole = y.new_empty(*y.shape[:2], frames, *y.shape[3:]) if whole is None else whole
        whole[:, :, at : at + y.shape[2]] = y
        at += y.shape[2]
    return whole


class Once(dict):
    """A cache whose entries can be read once: what a layer has used is not kept until the last one is done."""

    __getitem__ = dict.pop
