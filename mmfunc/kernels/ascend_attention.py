"""Flash attention in Ascend C, forward and backward, with its tiling and its masks as tables of tiles."""

from typing import NamedTuple

import torch
from torch import Tensor

from mmfunc.kernels.ascend import VECTORS, up_to, wide
from mmfunc.kernels.ascend_ops import AttentionTiling, call, differentiable

CUBES = 24  # cube cores of a 910B2, each with two vector cores
QUERIES = 128  # of a tile
FAR = 1 << 24  # a window that limits nothing


def attention_reference(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False,
                        window: tuple[int | None, int | None] = (None, None),
                        segments: Tensor | tuple[Tensor, Tensor] | None = None, start: int = 0,
                        scale: float | None = None) -> Tensor:
    """One softmax over all scores; shapes and masks as in attention_tables. A row that sees nothing is zero."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    distance = torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None] - start
    left, right = (FAR if w is None else w for w in window)
    seen = ((distance >= -left) & (distance <= (min(right, 0) if causal else right)))[None, None]
    if segments is not None:
        a, b = segments if isinstance(segments, tuple) else (segments, segments)
        seen = seen & ((a[:, :, None] == b[:, None]) & (b[:, None] > 0))[:, None]
    scores = wide(q @ k.transpose(-1, -2)) * (q.shape[-1]**-0.5 if scale is None else scale)
    weights = torch.softmax(scores.masked_fill(~seen, -1e30), -1) * seen.any(-1, keepdim=True)
    return (weights.to(v.dtype) @ v).transpose(1, 2)


class Attention(NamedTuple):
    """What an attention kernel sees of q [B, S, H, K] and k [B, L, G, K]: masks as tables, its tiling."""

    codes: Tensor  # uint8 [B, tiles of queries, tiles of keys]: 0 skipped, 1 whole, 2 masked
    queries: Tensor  # segments, float32, padded to whole tiles
    keys: Tensor
    tiling: AttentionTiling
    blocks: int


def attention_tables(q: Tensor, k: Tensor, *, causal: bool = False,
                     window: tuple[int | None, int | None] = (None, None),
                     segments: Tensor | tuple[Tensor, Tensor] | None = None, start: int = 0, scale: float | None = None,
                     step: int = 128, backward: bool = False) -> Attention:
    """Cut the scores into tiles of 128 queries and `step` keys, and say which are hidden, whole or masked.

    window: a query sees from `left` keys before to `right` keys after its own place; causal is no key after it.
    segments: only equal ones see each other, 0 is padding and seen by nothing.
    """
    (b, s, h, width), (_, n, g, _) = q.shape, k.shape
    if q.dtype == torch.float32:
        raise ValueError("the Ascend attention kernels take bfloat16 and float16: the cube unit transposes no float32")
    if h % g or not 16 <= width <= 256 or width % 8:
        raise ValueError(f"{h} query heads over {g} key heads of width {width}: a multiple, and 16 to 256 in eights")
    left, right = (FAR if w is None else w for w in window)
    right = min(right, 0) if causal else right
    qs, ks = (torch.ones(b, m, device=q.device) for m in (s, n))
    if segments is not None:
        qs, ks = (t.float() for t in (segments if isinstance(segments, tuple) else (segments, segments)))
    qs, ks = _padded(qs, QUERIES, -2.0), _padded(torch.where(ks > 0, ks, -1.0), step, -1.0)
    tiles = qs.unflatten(1, (-1, QUERIES)), ks.unflatten(1, (-1, step))
    codes = _codes(*tiles, s, left, right, start)
    items = b * (g * tiles[1].shape[1] if backward else h * tiles[0].shape[1])
    scale, bounded = width**-0.5 if scale is None else scale, int(left < FAR or right < FAR)
    table = AttentionTiling(b, s, n, h, g, width, up_to(width, 16), step, start, left, right, items, bounded, scale)
    return Attention(codes, qs, ks, table, min(CUBES, items))


def _padded(x: Tensor, size: int, value: float) -> Tensor:
    """x [B, N] with its second dimension filled up to a multiple of size."""
    return torch.nn.functional.pad(x, (0, -x.shape[1] % size), value=value).contiguous()


def _span(segments: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the greatest segment of each tile that is not padding."""
    real = segments > 0
    return torch.where(real, segments, torch.inf).amin(-1), torch.where(real, segments, -torch.inf).amax(-1)


def _codes(q: Tensor, k: Tensor, size: int, left: int, right: int, start: int) -> Tensor:
    """The code of each tile, from the segments of its queries [B, I, 128] and keys [B, J, step]."""
    count = lambda n: torch.arange(n, device=q.device)
    i, j = count(q.shape[1])[:, None] * QUERIES + start, count(k.shape[1])[None] * k.shape[2]
    last = (i + QUERIES - 1).clamp(max=size - 1 + start)
    near, distant = j - last, j + k.shape[2] - 1 - i  # the least and the greatest key - query
    hidden, inside = (near > right) | (distant < -left), (distant <= right) & (near >= -left)
    (low, high), (first, final) = ((t[:, :, None] for t in _span(q)), (t[:, None] for t in _span(k)))
    least = torch.where(q == -2.0, q.amax(-1, keepdim=True), q).amin(-1)[:, :, None]  # rows past the end may see all
    same = (least == high) & (high == first) & (first == final) & (k.amin(-1)[:, None] == first)
    return torch.where(hidden | (low > final) | (high < first), 0, torch.where(inside & same, 1, 2)).to(torch.uint8)


def attention(q: Tensor, k: Tensor, v: Tensor, **masks) -> tuple[Tensor, Tensor]:
    """Flash attention: o [B, S, H, K] and the log of the softmax's sums [B, H, S]; a row that sees nothing is zero."""
    a = attention_tables(q, k, step=256 if q.shape[-1] <= 128 else 128, **masks)
    return tuple(call("attention_forward", a.blocks, a.tiling, q, k, v, a.codes, a.queries, a.keys))


def attention_backward(q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor,
                       **masks) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of attention by q, k and v, in float32 as the kernel sums them."""
    return _slopes(attention_tables(q, k, backward=True, **masks), q, k, v, o, lse, do)


def _slopes(a: Attention, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor) -> tuple:
    delta, = call("attention_delta", VECTORS, a.tiling, o, do)
    return tuple(call("attention_backward", a.blocks, a.tiling, q, k, v, do, lse, delta, a.codes, a.queries, a.keys))


def _gradients(t: AttentionTiling, inputs: list, outputs: list, grads: list) -> tuple:
    """The tables again in steps of 128 keys, from the segments that a forward pass had."""
    q, k, v, _, queries, keys = inputs
    known = queries[:, : t.queries], keys[:, : t.keys]
    a = attention_tables(q, k, window=(t.left, t.right), segments=known, start=t.start, scale=t.scale, backward=True)
    return *(g.to(x.dtype) for g, x in zip(_slopes(a, q, k, v, *outputs, grads[0]), (q, k, v))), None, None, None


differentiable("attention_forward", _gradients, saved=(0, 1))
