"""Attention where the rows of x are divided: Ulysses (Jacobs et al. 2023, arXiv:2309.14509) gives each rank all rows of
some heads, a ring gives each rank all keys in turn, and both together are USP (Fang & Zhao 2024, arXiv:2405.07719).
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from mmfunc.kernels import attend
from mmfunc.shard.collectives import cut, exchange, gather, padded
from mmfunc.shard.layout import P, relayout
from mmfunc.shard.mesh import ROWS
from mmfunc.shard.ring import ring
from mmfunc.shard.rows import folded, length, local
from mmfunc.shard.use import apart, block, image, using

RING, ULYSSES = ("ring",), ("ulysses",)
ROWWISE, HEADWISE = P(None, ULYSSES, None), P(None, None, ULYSSES)  # [B, S, H, K] beside what other axes divide
Sizes = tuple[int, ...]  # lengths of the whole streams that attend


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, segments: Any, scale: float | None,
              bias: Tensor | None) -> Tensor:
    """Attention of this rank's rows. q [B, m, H, K]; k and v [B, m, G, K], or whole [B, L, G, K] of a context.

    segments and bias are those of whole sequences, as without a mesh; the result is [B, m, H, K].
    """
    net, heads = using().net, q.shape[2]
    masks = segments if isinstance(segments, tuple) or segments is None else (segments, segments)
    if block().crossing:
        masks = masks and (local(masks[0], 1), masks[1])
        return attend(q, k, v, segments=masks, scale=scale, bias=None if bias is None else local(bias, -2))
    sizes = streams(q.shape[1])
    if causal and len(sizes) > 1 and net.mesh.ring > 1:
        raise ValueError(f"streams of {sizes} tokens attend jointly in causal order; a ring knows that for one stream")
    q, k, v = to_heads(q, k, v, sizes)
    bias = None if bias is None else cut(bias, 1, ULYSSES, net)
    if net.mesh.ring == 1:
        y = attend(q, k, v, causal=causal, segments=segments, scale=scale, bias=bias)
    elif bias is None:
        own, others = masks or [q.new_ones(1, sum(sizes), dtype=torch.int32)] * 2
        y = ring(q, k, v, here(own, 1, sizes), turns(others, 1, sizes).movedim(1, 0), causal=causal, net=net,
                 scale=q.shape[-1] ** -0.5 if scale is None else scale)
    else:  # the gradient of a bias would have to go around too
        masks = masks and (here(masks[0], 1, sizes), masks[1])
        k, v = (unturned(gather(t, 1, RING, net), sizes) for t in (k, v))
        y = attend(q, k, v, segments=masks, scale=scale, bias=here(bias, -2, sizes))
    return to_rows(y, sizes).narrow(2, 0, heads)


def streams(n: int) -> Sizes:
    """Lengths of the whole streams of which this rank has n rows."""
    whole = block().rows
    own = [length(s) // using().net.size(ROWS) for s in whole]
    if n == sum(own):
        return whole
    found = {s for s, m in zip(whole, own) if m == n}
    if len(found) != 1:
        raise ValueError(f"{n} rows attend; of the streams of {whole} this rank has {own}")
    return tuple(found)


def to_heads(q: Tensor, k: Tensor, v: Tensor, sizes: Sizes) -> tuple[Tensor, ...]:
    """All rows of this rank's place in the ring, stream by stream, of some heads; without a ring they end unpadded."""
    net = using().net
    n, (heads, groups) = net.mesh.ulysses, (q.shape[2], k.shape[2])
    if groups % n:  # key heads are repeated to divide; if they cannot, each query gets its own
        times = n // groups if n % groups == heads % n == 0 else heads // groups
        k, v = (t.repeat_interleave(times, 2) for t in (k, v))
    if n == 1:
        return tuple(_unpadded(t.split(_each(sizes), 1), sizes) for t in (q, k, v))
    parts = [padded(t, 2, -(-t.shape[2] // n) * n).unflatten(2, (n, -1)) for t in (q, k, v)]
    x = relayout(torch.cat(parts, 3).flatten(2, 3), ROWWISE, HEADWISE, net)  # one exchange for all three
    own = [t.flatten(1, 2) for t in x.unflatten(1, (n, -1)).split([m // n for m in _each(sizes)], 2)]
    return _unpadded(own, sizes).split([t.shape[3] for t in parts], 2)


def to_rows(y: Tensor, sizes: Sizes) -> Tensor:
    """Back to this rank's rows of all heads."""
    net = using().net
    n = net.mesh.ulysses
    each = _each(sizes)
    own = [padded(t, 1, m) for t, m in zip(y.split(each if net.mesh.ring > 1 else sizes, 1), each)]
    if n == 1:
        return torch.cat(own, 1)
    x = torch.cat([t.unflatten(1, (n, -1)) for t in own], 2).flatten(1, 2)
    return relayout(x, HEADWISE, ROWWISE, net)


def by_heads(*tensors: Tensor) -> tuple[Tensor, ...]:
    """All patches of some heads, of what ranks have of patches with all heads: [m, H, K] -> [P, H / n, K], by one
    exchange. So ranks share the work of a vision tower evenly, whatever the sizes of its images are."""
    net = using().net
    x = exchange(torch.stack(tensors, 2), 1, 0, net.axes(ROWS), net)
    return folded(x, 0, back=True).narrow(0, 0, block().rows[0]).unbind(2)


def by_rows(y: Tensor, heads: int) -> Tensor:
    """The reverse: [P, H / n, K] -> this rank's patches of so many heads, [m, H, K]."""
    net = using().net
    y = folded(padded(y, 0, length(len(y))), 0)
    return exchange(y, 0, 1, net.axes(ROWS), net).narrow(1, 0, heads)


SPACE, TIME = P(None, None, ROWS), P(None, ROWS, None)  # of [B, T, S, D]; blocks find it divided along space


def along(fn: Callable[[Tensor], Tensor], x: Tensor, dim: Literal[1, 2]) -> Tensor:
    """fn, [N, L, D] -> [N, L, D], of the sequences in time (dim 1) or in space (2) of x [B, T, S, D].

    For those in space, what ranks have in parts is switched to time, and back, by one exchange each (Zhao et al. 2024,
    arXiv:2403.10266).
    """
    net, sides = using() and using().net, image()
    frames, switch = x.shape[1], sides is not None and dim == 2
    x = relayout(x, SPACE, TIME, net).narrow(2, 0, sides.height) if switch else x
    with apart() if sides else nullcontext():
        y = x.transpose(1, 3 - dim)
        y = fn(y.flatten(0, 1)).unflatten(0, y.shape[:2]).transpose(1, 3 - dim)
    return relayout(y, TIME, SPACE, net).narrow(1, 0, frames) if switch else y


def _each(sizes: Sizes) -> list[int]:
    """Rows of each stream that one place in the ring has."""
    return [length(s) // using().net.mesh.ring for s in sizes]


def _unpadded(own: Any, sizes: Sizes) -> Tensor:
    return torch.cat([t if using().net.mesh.ring > 1 else t.narrow(1, 0, s) for t, s in zip(own, sizes)], 1)


def turns(x: Tensor, dim: int, sizes: Sizes) -> Tensor:
    """What each place in the ring has of whole rows, [..., R, m, ...] for [..., S, ...]; padding is zero."""
    dim, n = dim % x.ndim, using().net.mesh.ring
    return torch.cat([folded(padded(t, dim, length(s)), dim).unflatten(dim, (n, -1))
                      for t, s in zip(x.split(sizes, dim), sizes)], dim + 1)


def here(x: Tensor, dim: int, sizes: Sizes) -> Tensor:
    """This place's part of whole rows."""
    dim = dim % x.ndim
    return turns(x, dim, sizes).index_select(dim, using().net.index(RING)).squeeze(dim)


def unturned(x: Tensor, sizes: Sizes) -> Tensor:
    """Whole rows, from those of one place after the other: [B, R * m, ...] -> [B, S, ...]."""
    own = x.unflatten(1, (using().net.mesh.ring, -1)).split(_each(sizes), 2)
    return torch.cat([folded(t.flatten(1, 2), 1, back=True).narrow(1, 0, s) for t, s in zip(own, sizes)], 1)
