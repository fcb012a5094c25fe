"""Attention where the rows of x are divided: Ulysses (Jacobs et al. 2023, arXiv:2309.14509) gives each rank all rows of
some heads, a ring gives each rank all keys in turn, and both together are USP (Fang & Zhao 2024, arXiv:2405.07719).
"""

from typing import Any

import torch
from torch import Tensor

from mmfunc.kernels import attend
from mmfunc.shard.collectives import cut, gather, padded
from mmfunc.shard.layout import P, relayout
from mmfunc.shard.mesh import ROWS
from mmfunc.shard.ring import ring
from mmfunc.shard.use import block, folded, length, local, using

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
