"""Convolutions and the norms between them. Channels are dimension 1; Y and X are the last two."""

from collections.abc import Callable, Iterable
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from mmfunc import shard, tree
from mmfunc.kernels import wide
from mmfunc.tree import Param, Tree, normal, ones

LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by dimensions of the input


def Conv(c_in: int, c_out: int, kernel: tuple[int, ...], *, bias: bool = True) -> Tree:
    """A convolution over len(kernel) dimensions."""
    axes = " ".join("_" * (2 + len(kernel)))
    weight = Param((c_out, c_in, *kernel), axes, normal((c_in * prod(kernel)) ** -0.5))
    return {"weight": weight, "bias": Param((c_out,), "_")} if bias else {"weight": weight}


def conv(p: Tree, x: Tensor, *, stride: int | tuple[int, ...] = 1, padding: int | tuple[int, ...] = 0) -> Tensor:
    """[B, C, ...] -> [B, C', ...] over 1, 2 or 3 dimensions."""
    n = p["weight"].ndim - 2
    if shard.parted() and n == 3 and (padding if isinstance(padding, int) else padding[0]):
        raise ValueError("a convolution that sees later frames, of which ranks have parts: use a mesh without ring")
    if n > 1 and shard.image() and (rows := p["weight"].shape[-2]) > 1:
        stride, padding = (v if isinstance(v, tuple) else (v,) * n for v in (stride, padding))
        if stride[-2] != 1 or 2 * padding[-2] + 1 != rows:
            raise ValueError(f"a convolution by {rows} rows with stride {stride[-2]} and padding {padding[-2]}: where "
                             f"ranks have rows of an image it must keep their number, with stride 1 and {rows // 2}")
        x, padding = shard.around(_last(x), padding[-2], padding[-2]), (*padding[:-2], 0, padding[-1])
    return _conv(p, x, stride, padding)


def _conv(p: Tree, x: Tensor, stride: int | tuple[int, ...] = 1, padding: int | tuple[int, ...] = 0) -> Tensor:
    run = (F.conv1d, F.conv2d, F.conv3d)[p["weight"].ndim - 3]
    return wide.call(run, _last(x), p["weight"], p.get("bias"), stride, padding)


def _last(x: Tensor) -> Tensor:
    """x with its channels last in memory, as the kernels of images and videos want it: up to 1.5 times faster.

    NPUs have layouts of their own and refuse this one.
    """
    return x.contiguous(memory_format=LAST[x.ndim]) if x.ndim in LAST and x.device.type != "npu" else x


def laid(params: Tree) -> Tree:
    """Parameters with the convolutions' channels last in memory, as _last has x: otherwise each call copies them."""
    return tree.map(_last, params)


def causal(p: Tree, x: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A convolution over time that sees no later frame: [B, C, T, Y, X] -> [B, C', T, Y, X], and the next call's past.

    past [B, C, kernel - 1, Y, X] are the frames before x, zeros without it.
    """
    weight, (time, high, wide) = p["weight"], p["weight"].shape[2:]
    x, padding = _last(x), (0, high // 2, wide // 2)
    if shard.image() and high > 1:
        x, padding = shard.around(x, high // 2, high // 2), (0, 0, wide // 2)
    if shard.parted() and time > 1:
        return _conv(p, shard.later(x, time - 1, time - 1), 1, padding), x[:, :, :0]
    seen = F.pad(x, (0, 0, 0, 0, time - 1, 0)) if past is None else torch.cat([past, x], 2)
    # a view would keep all of seen alive
    later = seen[:, :, seen.shape[2] - time + 1 :].clone(memory_format=torch.channels_last_3d)
    if past is None and x.shape[2] == 1:  # all but the last tap meet zeros
        return _conv({**p, "weight": weight[:, :, -1:]}, x, 1, padding), later
    del x  # its rows with those of other ranks are a copy
    return _conv(p, seen, 1, padding), later


def halving(layers: Iterable[Tree]) -> int:
    """By how much layers divide the number of frames: each that has a convolution `down` and one in `time` by two."""
    return 2 ** sum("down" in layer and "time" in layer for layer in layers)


def halve(p: Tree, x: Tensor) -> Tensor:
    """Half the rows and columns by a 3 x 3 convolution that looks past the end: [B, C, (T,) Y, X] -> Y / 2, X / 2."""
    x = F.pad(shard.around(_last(x), 0, 1, 2), (0, 1)) if shard.image() else F.pad(x, (0, 1, 0, 1))
    if x.ndim == 4:
        return _conv(p, x, 2)
    return _conv({**p, "weight": p["weight"].unsqueeze(2)}, x, (1, 2, 2))  # time stays where it is


def double(p: Tree, x: Tensor) -> Tensor:
    """Each pixel becomes 2 x 2, then a 3 x 3 convolution: [B, C, (T,) Y, X] -> [B, C', (T,) 2Y, 2X].

    Both are one transposed convolution by 4 x 4, in which a pixel of the output meets 4 taps and not 9.
    """
    both = torch.arange(4, device=x.device)[:, None] + torch.arange(3, device=x.device)
    met = ((both == 2) | (both == 3)).float()  # which of 3 are in a tap of 4: a constant, which not every device traces
    taps = (p["weight"].float().flatten(2) @ torch.kron(met, met).T).unflatten(-1, (4, 4)).to(x.dtype).transpose(0, 1)
    x, less = (shard.around(_last(x), 1, 1), 3) if shard.image() else (x, 1)  # a row before gives two rows
    if x.ndim == 4:
        return _last(wide.call(F.conv_transpose2d, _last(x), taps, p.get("bias"), 2, (less, 1)))
    taps = taps.unsqueeze(2)
    return _last(wide.call(F.conv_transpose3d, _last(x), taps, p.get("bias"), (1, 2, 2), (0, less, 1)))


def halve_frames(p: Tree, x: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Half the frames, but for the first of all, which stays as it is, by a convolution over three: [B, C, T, Y, X] ->
    T / 2, and the next call's past. past [B, C, 1, Y, X]: the frame before x, if there is one."""
    if shard.parted():
        seen = shard.later(x, 1, 0)
    else:
        seen = x if past is None else torch.cat([past, x], 2)
    later = x[:, :, -1:].clone()
    if seen.shape[2] == 1:
        return x, later
    y = conv(p, seen, stride=(2, 1, 1))
    return y if _begun(past) else torch.cat([x[:, :, :1], y], 2), later


def double_frames(p: Tree, x: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Each frame becomes two, but for the first of all, of which the others know nothing, by a causal convolution to
    twice the channels: [B, C, T, Y, X] -> 2T, and the next call's past. past [B, C, 2, Y, X]: the frames before x."""
    first, rest = (x[:, :, :0], x) if _begun(past) else (x[:, :, :1], x[:, :, 1:])
    later = torch.cat([torch.zeros_like(first, memory_format=torch.channels_last_3d)] * 2, 2)
    if rest.shape[2]:
        rest, later = causal(p, rest, past)
        rest = rest.movedim(1, -1).unflatten(-1, (2, -1)).movedim(-2, 2).flatten(1, 2).movedim(-1, 1)
    return rest if _begun(past) else torch.cat([first, rest], 2), later


def _begun(past: Tensor | None) -> bool:
    """Whether there are frames before these, be it on another rank."""
    return not shard.first() if shard.parted() else past is not None


def GroupNorm(c: int) -> Tree:
    """Scale and shift of c channels."""
    return {"weight": Param((c,), "_", ones), "bias": Param((c,), "_")}


def groupnorm(p: Tree, x: Tensor, groups: int = 32, eps: float = 1e-6) -> Tensor:
    """Normalise groups of channels over all positions, within in float32. [B, C, ...] -> [B, C, ...]."""
    if shard.image():
        return shard.groupnorm(x, groups, p["weight"], p["bias"], eps)
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
