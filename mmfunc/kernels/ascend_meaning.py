"""What the Ascend C kernels write, from the same tensors and tilings, in plain operations: so graphs that hold them can
be computed, and what the host makes for them (tilings, tables of tiles, places of partners) is checked too.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mmfunc.kernels.ascend import GATHER, HALVES, gated, norm_reference, slots, wide
from mmfunc.kernels.ascend_ops import AttentionTiling, GateTiling, NormTiling, RopeTiling


def _slopes(fn: Callable, given: list[Tensor | None], dy: Tensor) -> list[Tensor | None]:
    """Gradients of fn(*given) by what is given."""
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_() for t in given]
        found = iter(torch.autograd.grad(fn(*leaves), [t for t in leaves if t is not None], dy))
    return [None if t is None else next(found) for t in leaves]


def _norm(t: NormTiling) -> Callable:
    rows = lambda v: v if v is None else v.view(t.groups, -1, t.width)
    columns = lambda v: v if v is None else v.view(t.groups, t.width)
    return lambda x, factor, shift: norm_reference(rows(x), columns(factor), columns(shift), center=bool(t.center),
                                                   plus=t.plus, eps=t.eps).view(x.shape)


def norm(t: NormTiling, blocks: int, x: Tensor, residual: Tensor | None, factor: Tensor | None,
         shift: Tensor | None) -> tuple:
    """norm_forward."""
    if [residual is not None, factor is not None, shift is not None] != [t.residual, t.factor, t.shift]:
        raise ValueError(f"a norm whose tiling {t} does not say which inputs there are")
    total = x if residual is None else x + residual
    return _norm(t)(total, factor, shift), residual if residual is None else total


def norm_backward(t: NormTiling, blocks: int, x: Tensor, dsum: Tensor | None, factor: Tensor | None,
                  dy: Tensor) -> tuple:
    """norm_backward; all of a group's sums are in its first slot."""
    shift = x.new_zeros(t.groups * t.width, dtype=torch.float32) if t.shift else None
    dx, *sums = _slopes(_norm(t), [x, factor, shift], dy)
    dx = dx if dsum is None else (wide(dx) + wide(dsum)).to(x.dtype)
    wide_slots = [None if s is None else x.new_zeros(blocks + t.groups - 1, t.width, dtype=torch.float32) for s in sums]
    for at, s in zip(wide_slots, sums):
        for (first, _), one in zip(slots(t, blocks), () if s is None else s.view(t.groups, t.width)):
            at[first] = one
    return dx, *wide_slots


def gate(t: GateTiling, blocks: int, g: Tensor, u: Tensor | None) -> tuple:
    """gate_forward."""
    if (t.tiles - 1) * t.tile + t.last != g.numel():
        raise ValueError(f"a gate of {g.numel()} elements with the tiling {t}")
    return gated(g, u, t.alpha, t.beta),


def gate_backward(t: GateTiling, blocks: int, g: Tensor, u: Tensor | None, dy: Tensor) -> tuple:
    """gate_backward."""
    return tuple(_slopes(lambda g, u: gated(g, u, t.alpha, t.beta), [g, u], dy))


def _rope(t: RopeTiling, cos: Tensor, sin: Tensor, partners: Tensor | None) -> Callable:
    channel = torch.arange(t.width)
    place = {HALVES: (channel + t.width // 2) % t.width, GATHER: partners if partners is None else
             (partners[: t.width] // 4).long()}.get(t.swap, channel + 1 - 2 * (channel % 2))

    def run(x: Tensor, weight: Tensor | None) -> Tensor:
        y = wide(x)
        if weight is not None:
            y = wide((y * (y.square().mean(-1, keepdim=True) + t.eps).rsqrt() * weight).to(x.dtype))
        return (y * cos[:, None] + y[..., place] * sin[:, None]).to(x.dtype)

    return run


def rope(t: RopeTiling, blocks: int, x: Tensor, weight: Tensor | None, *tables: Tensor | None) -> tuple:
    """rope_forward."""
    return _rope(t, *tables)(x, weight),


def rope_backward(t: RopeTiling, blocks: int, x: Tensor, weight: Tensor | None, *tables: Tensor | None) -> tuple:
    """rope_backward; all of the weight's sums are in the first block's row."""
    *tables, dy = tables
    dx, dw = _slopes(_rope(t, *tables), [x, weight], dy)
    if dw is None:
        return dx, None
    return dx, torch.cat([dw[None], dw.new_zeros(blocks - 1, t.width)])


def _scores(t: AttentionTiling, q: Tensor, k: Tensor, v: Tensor, codes: Tensor, queries: Tensor,
            keys: Tensor) -> tuple[Tensor, ...]:
    """Query, key and value [B, H, N, K] and the scores, of which those that are hidden are minus infinity."""
    q, k, v = (wide(x).transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(t.heads // t.groups, 1) for x in (k, v))
    distance = torch.arange(t.keys) - torch.arange(t.queries)[:, None] - t.start
    inside = (distance >= -t.left) & (distance <= t.right) | (not t.bounded)
    seen = inside & (queries[:, : t.queries, None] == keys[:, None, : t.keys])
    code = codes.repeat_interleave(128, 1)[:, : t.queries].repeat_interleave(t.step, 2)[:, :, : t.keys]
    seen = (code == 1) | (code == 2) & seen
    return q, k, v, (q @ k.mT * t.scale).masked_fill(~seen[:, None], -torch.inf)


def attention(t: AttentionTiling, blocks: int, q: Tensor, *rest: Tensor) -> tuple:
    """attention_forward, without scratch; the sum of a row that sees nothing counts as 1."""
    *_, v, scores = _scores(t, q, *rest)
    lse = torch.logsumexp(scores, -1)
    lse = torch.where(lse == -torch.inf, 0, lse)
    return ((scores - lse[..., None]).exp() @ v).transpose(1, 2).to(q.dtype), lse


def delta(t: AttentionTiling, blocks: int, o: Tensor, do: Tensor) -> tuple:
    """attention_delta."""
    return (wide(o) * wide(do)).sum(-1).transpose(1, 2).contiguous(),


def attention_backward(t: AttentionTiling, blocks: int, q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse: Tensor,
                       delta: Tensor, *tables: Tensor) -> tuple:
    """attention_backward, without scratch."""
    q, k, v, scores = _scores(t, q, k, v, *tables)
    weights, slope = (scores - lse[..., None]).exp(), wide(do).transpose(1, 2)
    inner = weights * (slope @ v.mT - delta[..., None]) * t.scale
    summed = lambda x: x.unflatten(1, (t.groups, -1)).sum(2)
    found = inner @ k, summed(inner.mT @ q), summed(weights.mT @ slope)
    return tuple(x.transpose(1, 2).contiguous() for x in found)


MEANINGS = {"norm_forward": norm, "norm_backward": norm_backward, "gate_forward": gate, "gate_backward": gate_backward,
            "rope_forward": rope, "rope_backward": rope_backward, "attention_forward": attention,
            "attention_delta": delta, "attention_backward": attention_backward}
