"""What FlashAttentionScore and its gradient compute, by the public documentation of npu_fusion_attention."""

import torch
from torch import Tensor


def heads(t: Tensor, a: dict, n: int) -> Tensor:
    """[B, N, S, D] of a tensor in the layout of the attributes."""
    layout = a["input_layout"]
    if layout == "BNSD":
        return t
    t = t if layout == "BSND" else t.unflatten(-1, (n, -1))
    t = t.transpose(0, 1) if layout == "SBH" else t
    return t.transpose(1, 2)


def unheads(t: Tensor, a: dict) -> Tensor:
    """The inverse of heads."""
    layout = a["input_layout"]
    if layout == "BNSD":
        return t
    t = t.transpose(1, 2)
    t = t.transpose(0, 1) if layout == "SBH" else t
    return t if layout == "BSND" else t.flatten(-2)


def groups(key: Tensor, query: Tensor, a: dict) -> int:
    """Key heads: where the layout does not say, as many as fill their width."""
    layout, n = a["input_layout"], a["head_num"]
    if layout in ("BNSD", "BSND"):
        return key.shape[1 if layout == "BNSD" else 2]
    return key.shape[-1] // (query.shape[-1] // n)


def hidden(a: dict, mask: Tensor | None, queries: int, keys: int) -> Tensor | None:
    """Which scores are left out, [B or 1, N or 1, S, L]."""
    mode = a["sparse_mode"]
    if a["pre_tockens"] < keys or a["next_tockens"] < keys:
        raise ValueError(f"a band of {a['pre_tockens']} and {a['next_tockens']} tokens is not understood")
    if mode == 2:
        above = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
        if mask is None or list(mask.shape) != [2048, 2048] or not (mask.is_meta or torch.equal(mask.bool(), above)):
            raise ValueError("sparse_mode 2 takes the upper triangle of 2048 x 2048 as its mask")
        return torch.ones(queries, keys, dtype=torch.bool, device=mask.device).triu(1)
    if mode or (mask is not None and list(mask.shape[-2:]) != [queries, keys]):
        raise ValueError(f"sparse_mode {mode} with a mask {None if mask is None else list(mask.shape)} "
                         f"for {queries} queries and {keys} keys")
    return None if mask is None else mask.bool()


def prepared(a: dict, q: Tensor, k: Tensor, v: Tensor, extra: list, mask: Tensor | None) -> tuple:
    """Query, key and value as [B, N, S, D] float32 with repeated key heads, how often, and the scores."""
    if any(t is not None for t in extra) or a["keep_prob"] != 1 or a["inner_precise"] not in (0, 1):
        raise ValueError("an input or attribute of FlashAttentionScore that is not understood")
    n = groups(k, q, a)
    query = heads(q, a, a["head_num"]).float()
    if query.shape[1] != a["head_num"] or a["head_num"] % n:
        raise ValueError(f"head_num {a['head_num']} with query {list(q.shape)} and key {list(k.shape)}")
    times = a["head_num"] // n
    key, value = (heads(t, a, n).float().repeat_interleave(times, 1) for t in (k, v))
    scores = query @ key.mT * a["scale_value"]
    hide = hidden(a, mask, query.shape[2], key.shape[2])
    return query, key, value, times, scores if hide is None else scores.masked_fill(hide, float("-inf"))


def forward(a: dict, q: Tensor, k: Tensor, v: Tensor, shift: Tensor | None, drop: Tensor | None, padding: Tensor | None,
            mask: Tensor | None, *more: Tensor | None) -> tuple[Tensor, ...]:
    """Maximum and sum of each row's softmax [B, N, S, 8], nothing, and the output in the layout of the query."""
    *_, value, _, scores = prepared(a, q, k, v, [shift, drop, padding, *more], mask)
    top = scores.amax(-1, keepdim=True)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    out = unheads((weights / total) @ value, a).to(q.dtype)
    eight = lambda t: t.expand(*t.shape[:-1], 8).contiguous()
    return eight(top), eight(total), q.new_zeros(0), out


def backward(a: dict, q: Tensor, k: Tensor, v: Tensor, dy: Tensor, shift: Tensor | None, drop: Tensor | None,
             padding: Tensor | None, mask: Tensor | None, top: Tensor, total: Tensor, soft: Tensor | None, out: Tensor,
             *more: Tensor | None) -> tuple[Tensor, ...]:
    """Gradients of query, key and value, and nothing for a bias; from what forward gave, not from a new softmax."""
    query, key, value, times, scores = prepared(a, q, k, v, [shift, drop, padding, *more], mask)
    slope, given = heads(dy, a, a["head_num"]).float(), heads(out, a, a["head_num"]).float()
    weights = (scores - top[..., :1]).exp() / total[..., :1]
    inner = weights * (slope @ value.mT - (slope * given).sum(-1, keepdim=True)) * a["scale_value"]
    summed = lambda t: t.unflatten(1, (-1, times)).sum(2)
    found = inner @ key, summed(inner.mT @ query), summed(weights.mT @ slope)
    return *(unheads(g, a).to(t.dtype) for g, t in zip(found, (q, k, v))), q.new_zeros(0)
