"""Flash attention in Ascend C, forward and backward, with its tiling and its masks as tables of tiles."""

import struct
from typing import NamedTuple

import torch
from torch import Tensor

from mmfunc.kernels.ascend import VECTORS, up_to, wide
from mmfunc.kernels.emulator import Out, build, launch

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
    tiling: bytes
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
    qs, ks = (torch.ones(b, m) for m in (s, n))
    if segments is not None:
        qs, ks = (t.float() for t in (segments if isinstance(segments, tuple) else (segments, segments)))
    qs, ks = _padded(qs, QUERIES, -2.0), _padded(torch.where(ks > 0, ks, -1.0), step, -1.0)
    tiles = qs.unflatten(1, (-1, QUERIES)), ks.unflatten(1, (-1, step))
    codes = _codes(*tiles, s, left, right, start)
    fields = (b, s, n, h, g, width, up_to(width, 16), step, start, left, right)
    items = b * (g * tiles[1].shape[1] if backward else h * tiles[0].shape[1])
    scale = width**-0.5 if scale is None else scale
    table = struct.pack("12if1i", *fields, items, scale, left < FAR or right < FAR)
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
    i, j = torch.arange(q.shape[1])[:, None] * QUERIES + start, torch.arange(k.shape[1])[None] * k.shape[2]
    last = torch.minimum(i + QUERIES - 1, torch.tensor(size - 1 + start))
    near, distant = j - last, j + k.shape[2] - 1 - i  # the least and the greatest key - query
    hidden, inside = (near > right) | (distant < -left), (distant <= right) & (near >= -left)
    (low, high), (first, final) = ((t[:, :, None] for t in _span(q)), (t[:, None] for t in _span(k)))
    least = torch.where(q == -2.0, q.amax(-1, keepdim=True), q).amin(-1)[:, :, None]  # rows past the end may see all
    same = (least == high) & (high == first) & (first == final) & (k.amin(-1)[:, None] == first)
    return torch.where(hidden | (low > final) | (high < first), 0, torch.where(inside & same, 1, 2)).to(torch.uint8)


def attention(q: Tensor, k: Tensor, v: Tensor, **masks) -> tuple[Tensor, Tensor]:
    """Flash attention: o [B, S, H, K] and the log of the softmax's sums [B, H, S]; a row that sees nothing is zero."""
    b, s, h, width = q.shape
    pitch = up_to(width, 16)
    step = 256 if pitch <= 128 else 128
    a = attention_tables(q, k, step=step, **masks)
    o, lse = torch.empty_like(q), torch.empty(b, h, s)
    shapes = (step, q.dtype), (step, q.dtype), (pitch, torch.float32)  # scores, weights, values: three steps of each
    spaces = [torch.empty(a.blocks, 3, QUERIES, n, dtype=t) for n, t in shapes]
    launch(build("attention", q.dtype), "attention_forward", a.blocks, a.tiling, q, k, v, a.codes, a.queries, a.keys,
           Out(o), Out(lse), *(Out(t, "scratch") for t in spaces))
    return o, lse


def attention_backward(q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor,
                       **masks) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of attention by q, k and v, in float32 as the kernel sums them."""
    a = attention_tables(q, k, backward=True, **masks)
    library, delta = build("attention_grad", q.dtype), torch.empty_like(lse)
    launch(library, "attention_delta", VECTORS, a.tiling, o, do, Out(delta))
    dq, dk, dv = (torch.zeros(t.shape) for t in (q, k, v))
    space = torch.empty(a.blocks, 8, 128, 128, dtype=q.dtype)
    launch(library, "attention_backward", a.blocks, a.tiling, q, k, v, do, lse, delta, a.codes, a.queries, a.keys,
           Out(dq, "some"), Out(dk, "some"), Out(dv, "some"), Out(space, "scratch"))
    return dq, dk, dv
