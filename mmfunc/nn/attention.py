"""The maps around attention, and what a layer remembers of earlier tokens."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from mmfunc import kernels, shard
from mmfunc.kernels.attention import Segments
from mmfunc.nn.basic import Linear, RMSNorm, linear, reduced, rmsnorm
from mmfunc.tree import Tree


def Attention(d: int, heads: int, k: int, *, kv_heads: int | None = None, bias: bool = True, out_bias: bool = True,
              norm: Literal["head", "span"] | None = None) -> Tree:
    """Query, key, value and output maps; norm adds query/key norms within each head, or spanning all heads."""
    q, c = heads * k, (kv_heads or heads) * k
    norms = {"head": {"norm": {"q": RMSNorm(k), "k": RMSNorm(k)}},
             "span": {"span": {"q": RMSNorm(q, f"heads/{k}"), "k": RMSNorm(c, f"kv/{k}")}}}.get(norm, {})
    return norms | {
        "q": Linear(d, q, f"embed -> heads/{k}", bias=bias),
        "k": Linear(d, c, f"embed -> kv/{k}", bias=bias),
        "v": Linear(d, c, f"embed -> kv/{k}", bias=bias),
        "out": Linear(q, d, f"heads/{k} -> embed", bias=out_bias),
    }


def _heads(p: Tree, name: str, x: Tensor, k: int) -> Tensor:
    y = linear(p[name], x)
    axis = f"heads/{k}" if name == "q" else f"kv/{k}"
    if name in p.get("span", ()):
        y = rmsnorm(p["span"][name], y, axis=axis)
    y = y.unflatten(-1, (-1, k))
    y = rmsnorm(p["norm"][name], y) if name in p.get("norm", ()) else y
    return y if name == "q" else shard.grouped(y, axis, f"heads/{k}")


def query(p: Tree, x: Tensor, k: int) -> Tensor:
    """[B, S, D] -> query [B, S, H, K] to keys of a context."""
    shard.crossing(True)
    return _heads(p, "q", shard.enter(x, "heads"), k)


def kv(p: Tree, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """A context [B, L, D] -> key and value [B, L, G, K]."""
    return _heads(p, "k", x, k), _heads(p, "v", x, k)


def qkv(p: Tree, x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, S, D] -> query [B, S, H, K], key and value [B, S, G, K]."""
    shard.crossing(False)
    x = shard.enter(x, "heads")
    return _heads(p, "q", x, k), _heads(p, "k", x, k), _heads(p, "v", x, k)


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, segments: Segments = None,
           start: Tensor | None = None, scale: float | None = None, bias: Tensor | None = None) -> Tensor:
    """kernels.attend, where the rows of q, k and v may be divided; segments and bias are whole."""
    k, v = shard.everywhere(k, v) if shard.image() else (k, v)
    if shard.block() is None:
        return kernels.attend(q, k, v, causal=causal, segments=segments, start=start, scale=scale, bias=bias)
    return shard.attention(q, k, v, causal=causal, segments=segments, scale=scale, bias=bias)


def joint(parts: Sequence[tuple[Tensor, Tensor, Tensor]], attend: Callable) -> tuple[Tensor, ...]:
    """Streams that attend as one sequence, (q, k, v) [B, S, H, K] of each: their heads [B, S, H, K]."""
    return attend(*(torch.cat(t, 1) for t in zip(*parts))).split([q.shape[1] for q, _, _ in parts], 1)


def merge(p: Tree, y: Tensor) -> Tensor:
    """[B, S, H, K] -> [B, S, D]."""
    return reduced(p["out"], y.flatten(-2), "heads")


def remember(entry: Tree, k: Tensor, v: Tensor, start: Tensor) -> Tree:
    """A static cache entry [B, L, G, K] with k and v [B, S, G, K] written from slot start (0-d) on."""
    if shard.block():
        raise ValueError("ranks have parts of the sequence, and a cache all of it: generate on a mesh without ring and "
                         "ulysses")
    slots = start + torch.arange(k.shape[1], device=k.device)
    return {"k": entry["k"].index_copy(1, slots, k), "v": entry["v"].index_copy(1, slots, v)}
