"""Convolutions and the norms between them. Channels are dimension 1; Y and X are the last two."""

from collections.abc import Callable, Iterable
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from mmfunc.tree import Param, Tree, normal, ones

LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by dimensions of the input


def Conv(c_in: int, c_out: int, kernel: tuple[int, ...], *, bias: bool = True) -> Tree:
    """A convolution over len(kernel) dimensions."""
    axes = " ".join("_" * (2 + len(kernel)))
    weight = Param((c_out, c_in, *kernel), axes, normal((c_in * prod(kernel)) ** -0.5))
    return {"weight": weight, "bias": Param((c_out,), "_")} if bias else {"weight": weight}


def conv(p: Tree, x: Tensor, *, stride: int | tuple[int, ...] = 1, padding: int | tuple[int, ...] = 0) -> Tensor:
    """[B, C, ...] -> [B, C', ...] over 1, 2 or 3 dimensions."""
    run = (F.conv1d, F.conv2d, F.conv3d)[p["weight"].ndim - 3]
    return run(_last(x), p["weight"], p.get("bias"), stride, padding)


def _last(x: Tensor) -> Tensor:
    """x with its channels last in memory, as the kernels of images and videos want it: up to 1.5 times faster."""
    return x.contiguous(memory_format=LAST[x.ndim]) if x.ndim in LAST else x


def causal(p: Tree, x: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A convolution over time that sees no later frame: [B, C, T, Y, X] -> [B, C', T, Y, X], and the next call's past.

    past [B, C, kernel - 1, Y, X] are the frames before x, zeros without it.
    """
    weight, (time, *sides) = p["weight"], p["weight"].shape[2:]
    x = _last(x)
    seen = F.pad(x, (0, 0, 0, 0, time - 1, 0)) if past is None else torch.cat([past, x], 2)
    # a view would keep all of seen alive
    later = seen[:, :, seen.shape[2] - time + 1 :].clone(memory_format=torch.channels_last_3d)
    if past is None and x.shape[2] == 1:  # all but the last tap meet zeros
        p, seen = {**p, "weight": weight[:, :, -1:]}, x
    return conv(p, seen, padding=(0, *(k // 2 for k in sides))), later


def halve(p: Tree, x: Tensor) -> Tensor:
    """Half the rows and columns by a 3 x 3 convolution that looks past the end: [B, C, (T,) Y, X] -> Y / 2, X / 2."""
    x = F.pad(x, (0, 1, 0, 1))
    if x.ndim == 4:
        return conv(p, x, stride=2)
    return conv({**p, "weight": p["weight"].unsqueeze(2)}, x, stride=(1, 2, 2))  # time stays where it is


def double(p: Tree, x: Tensor) -> Tensor:
    """Each pixel becomes 2 x 2, then a 3 x 3 convolution: [B, C, (T,) Y, X] -> [B, C', (T,) 2Y, 2X].

    Both are one transposed convolution by 4 x 4, in which a pixel of the output meets 4 taps and not 9.
    """
    met = torch.tensor([[0, 0, 1.0], [0, 1, 1], [1, 1, 0], [1, 0, 0]], device=x.device)  # which of 3 are in a tap of 4
    taps = (p["weight"].float().flatten(2) @ torch.kron(met, met).T).unflatten(-1, (4, 4)).to(x.dtype).transpose(0, 1)
    if x.ndim == 4:
        return _last(F.conv_transpose2d(_last(x), taps, p.get("bias"), 2, 1))
    return _last(F.conv_transpose3d(_last(x), taps.unsqueeze(2), p.get("bias"), (1, 2, 2), (0, 1, 1)))


def GroupNorm(c: int) -> Tree:
    """Scale and shift of c channels."""
    return {"weight": Param((c,), "_", ones), "bias": Param((c,), "_")}


def groupnorm(p: Tree, x: Tensor, groups: int = 32, eps: float = 1e-6) -> Tensor:
    """Normalise groups of channels over all positions, within in float32. [B, C, ...] -> [B, C, ...]."""
    return F.group_norm(x, groups, p["weight"], p["bias"], eps)


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
