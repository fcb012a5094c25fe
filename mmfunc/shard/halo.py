"""Images and videos of which ranks have rows: what convolutions and norms read of the other ranks' rows.

Rows that pad the last ranks' parts are zero where a convolution reads them, as its own padding is. Sends have numbers
of ranks as constants, so that ranks run graphs of one form but not the same one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmfunc.shard.collectives import Axes, gather, number, psum
from mmfunc.shard.mesh import Net
from mmfunc.shard.use import image, using

RING = ("ring",)
_c10d = torch.ops._c10d_functional
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # layouts that stay, by dimensions
Span = tuple[int, int]  # (first row, row behind the last one) of the whole


def _meet(has: Span, wants: Span) -> Span:
    """Of the rows that a rank has, counted from its first one, those that are wanted."""
    start, end = max(has[0], wants[0]), min(has[1], wants[1])
    return (start - has[0], end - has[0]) if start < end else (0, 0)


def fetched(x: Tensor, dim: int, has: Sequence[Span], wants: Sequence[Span], axes: Axes, net: Net) -> Tensor:
    """Rows of a dimension of which each rank has some and wants others; zeros where none has them.

    All ranks' rows follow each other. What goes between ranks goes in one exchange, whose gradient is its reverse.
    """
    n, i = len(has), number(axes, net)
    gives = [(0, 0) if r == i else _meet(has[i], wants[r]) for r in range(n)]
    gets = [(0, 0) if r == i else _meet(has[r], wants[i]) for r in range(n)]
    out = torch.cat([x.narrow(dim, a, b - a).movedim(dim, 0) for a, b in gives]).contiguous()
    sizes = [[b - a for a, b in part] for part in (gets, gives)]
    y = _c10d.wait_tensor(_c10d.all_to_all_single(out, *sizes, net.group(axes))) if n > 1 else out
    parts = [t.movedim(0, dim) for t in y.split(sizes[0])]
    start, end = _meet(has[i], wants[i])
    parts[i] = x.narrow(dim, start, end - start)
    beyond = has[0][0] - wants[i][0], min(wants[i][1] - has[-1][1], wants[i][1] - wants[i][0])
    edges = [x.new_zeros(*x.shape[:dim], max(m, 0), *x.shape[dim + 1 :]) for m in beyond]
    last = [f for n, f in LAST.items() if n == x.ndim and x.is_contiguous(memory_format=f)]
    found = [edges[0], *parts, edges[1]]  # empty ones too: every rank's backward pass has to come by the exchange
    return torch.cat([t.contiguous(memory_format=last[0]) if last else t for t in found], dim)


def _real(x: Tensor) -> Tensor | None:
    """Which rows of x [..., m, X] are of the image and no padding, bool [m, 1]; None: all of them."""
    net, m, height, axes = using().net, x.shape[-2], _height(x), image().axes
    if m * net.size(axes) == height:
        return None
    return ((net.index(axes) * m + torch.arange(m, device=x.device)) < height)[:, None]


def _height(x: Tensor) -> int:
    """Rows of the whole image of which ranks have x."""
    return image().height * x.shape[-1] // image().width


def around(x: Tensor, before: int, behind: int, unit: int = 1) -> Tensor:
    """Rows of images with so many of those before and behind them, zeros beyond the image. [..., m, X] -> [..., before
    + m' + behind, X], where m' is m, or the next multiple of a unit: then ranks give up rows to those before them."""
    net, m, real, axes = using().net, x.shape[-2], _real(x), image().axes
    x = x if real is None else torch.where(real, x, 0)
    more, ranks = -(-m // unit) * unit, range(net.size(axes))
    has, wants = [(r * m, r * m + m) for r in ranks], [(r * more - before, r * more + more + behind) for r in ranks]
    return fetched(x, x.ndim - 2, has, wants, axes, net)


def parted() -> bool:
    """Whether ranks have parts of the frames of a video."""
    return image() is not None and image().frames > 0


def first() -> bool:
    """Whether this rank has the first part."""
    return number(RING, using().net) == 0


def later(x: Tensor, before: int, blank: int) -> Tensor:
    """Frames of a part of a video with so many of those before them; the first part, where there are none, has blank
    frames instead. [B, C, T, Y, X] -> [B, C, before + T, Y, X], or [B, C, blank + T, Y, X]."""
    net, own = using().net, image().own
    x = torch.cat([torch.zeros_like(x[:, :, :1])] * blank + [x], 2) if first() else x
    start = x.shape[2] if first() else before  # others know that the first rank has enough
    has = [(-start, 0), *(((r - 1) * own, r * own) for r in range(1, net.mesh.ring))]
    return fetched(x, 2, has, [has[0], *((a - before, b) for a, b in has[1:])], RING, net)


def groupnorm(x: Tensor, groups: int, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """Group norm over all rows of images, of which ranks have some; x [B, C, ..., m, X]. What ranks tell each other is
    of whole rows, so that padding costs no copy of x."""
    if parted():
        raise ValueError("a group norm over frames that are divided among ranks: use a mesh without ring")
    net, real, y = using().net, _real(x), x.float().unflatten(1, (groups, -1))
    var, mean = torch.var_mean(y, [d for d in range(2, y.ndim) if d != y.ndim - 2], correction=0, keepdim=True)
    share = (1 if real is None else real.to(y.dtype)) / _height(x)
    total = lambda t: psum((t * share).sum(-2, keepdim=True), image().axes, net)
    centre = total(mean)
    to = (groups, -1, *[1] * (x.ndim - 2))
    slope = (total(var + (mean - centre).square()) + eps).rsqrt() * scale.float().view(to)
    return torch.addcmul(shift.float().view(to) - centre * slope, y, slope).flatten(1, 2).to(x.dtype)


def everywhere(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Of all pixels of an image, what ranks have of their rows: [B, m * X, ...] -> [B, Y * X, ...]."""
    net, sides = using().net, image()
    return tuple(gather(t, 1, sides.axes, net).narrow(1, 0, sides.height * sides.width) for t in tensors)
