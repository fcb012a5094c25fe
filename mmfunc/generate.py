"""Generation with a static cache: prefill in chunks, then one step of one shape a token.

Prompts of different lengths stand right-aligned (padded on the left), so that all rows write the same slot. The
functions of a family are arguments: embeds (tokens and pictures to vectors), step (the decoder with a cache) and cache.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmfunc import jit, random, shard
from mmfunc.tree import Tree


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from logits; the defaults are greedy."""

    temperature: float = 0.0  # 0: the most likely token
    top_k: int = 0  # of the k most likely; 0: of all
    top_p: float = 1.0  # of the fewest that hold this much probability
    repetition: float = 1.0  # penalty of tokens that were there before (Keskar et al. 2019)


def penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide positive and multiply negative logits of tokens that were seen. logits [B, V], seen bool [B, V]."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def top_k(logits: Tensor, k: int) -> Tensor:
    """-inf below the k-th largest of each row."""
    return logits.masked_fill(logits < logits.topk(min(k, logits.shape[-1])).values[:, -1:], -torch.inf)


def top_p(logits: Tensor, p: float) -> Tensor:
    """-inf for the least likely tokens that together hold at most 1 - p."""
    ordered, index = logits.sort()
    out = ordered.softmax(-1).cumsum(-1) <= 1 - p
    out[:, -1] = False
    return logits.masked_fill(torch.zeros_like(out).scatter(1, index, out), -torch.inf)


def choose(logits: Tensor, how: Sampling, seen: Tensor | None, key: Tensor | None) -> Tensor:
    """The next token of each row. logits [B, V] -> [B]."""
    logits = logits.float()
    if how.repetition != 1.0:
        logits = penalised(logits, seen, how.repetition)
    if how.temperature == 0:
        return logits.argmax(-1)
    logits = logits / how.temperature
    logits = top_k(logits, how.top_k) if how.top_k else logits
    logits = top_p(logits, how.top_p) if how.top_p < 1 else logits
    noise = -torch.log(-torch.log(random.uniform(key, logits.shape, 2.0**-25, 1.0)))
    return (logits + noise).argmax(-1)


def stepper(step: Callable, c: Any, *, mode: jit.Mode = "whole", backend: jit.Backend = "eager") -> jit.Jitted:
    """(cache, p, batch) -> (cache, logits [B, V] of the last token); the cache is written in place."""
    def run(cache: Tree, p: Tree, batch: Tree) -> tuple[Tree, Tensor]:
        logits, new = step(p, c, batch, cache)
        return new, shard.complete(logits[:, -1], "vocab")

    return jit.jit(run, mode, backend, donate=True, buckets=64)


@torch.no_grad()
def generate(family: Any, p: Tree, c: Any, batch: dict[str, Any], *, new: int, stops: Sequence[int] = (),
             how: Sampling | None = None, key: Tensor | None = None, chunk: int = 0, slots: int = 0,
             call: Callable | None = None, tell: Callable[[list[int]], None] | None = None) -> list[list[int]]:
    """New tokens for each prompt, up to `new` or a stop token, which is included.

    batch: what the family's embeds reads, left padded, with attention_mask [B, S]. family has embeds, step, cache.
    chunk: tokens of a prefill call (0: all at once). slots: size of the cache (0: what is needed). call: a stepper,
    to reuse what it compiled. tell gets each step's tokens.
    """
    how = how or Sampling()
    ids = batch["input_ids"]
    rows, size = ids.shape
    mask = (batch["attention_mask"] if batch.get("attention_mask") is not None else torch.ones_like(ids)) > 0
    place = batch.get("position_ids")
    place = (mask.cumsum(-1) - 1).clamp(min=0) if place is None else place
    x = family.embeds(p, c, batch)
    total = max(slots, size + new)
    cache = shard.heads(family.cache(c, rows, total, x.dtype, x.device))
    seen = torch.nn.functional.pad(mask.long(), (0, total - size), value=1)
    call = call or stepper(family.step, c)
    for a in range(0, size, chunk or size):
        b = min(a + (chunk or size), size)
        part = {"inputs_embeds": x[:, a:b].contiguous(), "position_ids": place[..., a:b].contiguous()}
        cache, logits = call(cache, p, part | {"start": torch.tensor(a, device=x.device), "cache_mask": seen})
    return _decode(call, p, cache, logits, ids, mask, place[..., -1:] + 1, seen, size, new, set(stops), how, key, tell)


def _decode(call, p, cache, logits, ids, mask, place, seen, size, new, stops, how, key, tell) -> list[list[int]]:
    rows = len(ids)
    out: list[list[int]] = [[] for _ in range(rows)]
    used = torch.zeros_like(logits, dtype=torch.bool).scatter(1, torch.where(mask, ids, ids[:, -1:]), True)
    key = random.key(0, ids.device) if key is None else key
    for i in range(new):
        token = choose(logits, how, used, random.fold_in(key, i) if how.temperature else None)
        used = used.scatter(1, token[:, None], True) if how.repetition != 1.0 else used
        live = [not (o and o[-1] in stops) for o in out]
        for o, t, on in zip(out, token.tolist(), live):
            if on:
                o.append(t)
        if tell:
            tell(token.tolist())
        if i + 1 == new or all(o[-1] in stops for o in out):
            break
        one = {
            "input_ids": token[:, None],
            "position_ids": place + i,
            "start": torch.tensor(size + i, device=ids.device),
            "cache_mask": seen,
        }
        cache, logits = call(cache, p, one)
    return out
