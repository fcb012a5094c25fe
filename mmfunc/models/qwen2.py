"""Qwen2 and Qwen2.5: decoder-only language models (Qwen Team 2024, arXiv:2412.15115); the text half of Qwen2-VL.

Pre-norm blocks of grouped-query attention with biased queries, keys and values under rotary positions, and a gated MLP.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmfunc import keys, nn
from mmfunc.tree import Tree


@dataclass(frozen=True)
class Config:
    width: int = 3584
    hidden: int = 18944
    heads: int = 28
    kv_heads: int = 4
    layers: int = 28
    vocab: int = 152064
    theta: float = 1e6  # base of the rotary periods
    eps: float = 1e-6  # of the norms
    tied: bool = False  # the head is the embedding
    tokens: int = 32768  # positions it was trained for
    init: float = 0.02  # standard deviation of fresh weights

    @property
    def k(self) -> int:
        return self.width // self.heads


PRESETS = {
    "2.5-0.5b": Config(width=896, hidden=4864, heads=14, kv_heads=2, layers=24, vocab=151936, tied=True),
    "2.5-1.5b": Config(width=1536, hidden=8960, heads=12, kv_heads=2, layers=28, vocab=151936, tied=True),
    "2.5-3b": Config(width=2048, hidden=11008, heads=16, kv_heads=2, layers=36, vocab=151936, tied=True),
    "2.5-7b": Config(),
    "2.5-14b": Config(width=5120, hidden=13824, heads=40, kv_heads=8, layers=48, eps=1e-5),
    "2.5-32b": Config(width=5120, hidden=27648, heads=40, kv_heads=8, layers=64, eps=1e-5),
    "2.5-72b": Config(width=8192, hidden=29568, heads=64, kv_heads=8, layers=80, eps=1e-5),
    "tiny": Config(width=64, hidden=96, heads=4, kv_heads=2, layers=2, vocab=160, tokens=512),
}


def params(c: Config) -> Tree:
    d = c.width
    attention = nn.Attention(d, c.heads, c.k, kv_heads=c.kv_heads, out_bias=False)
    block = {"norm": nn.RMSNorm(d), "self": attention, "norm_mlp": nn.RMSNorm(d),
             "mlp": nn.MLP(d, c.hidden, gated=True, bias=False)}
    tree = {"embed": nn.Embed(c.vocab, d, std=c.init), "blocks": [block] * c.layers, "norm": nn.RMSNorm(d)}
    return tree if c.tied else tree | {"head": nn.Linear(d, c.vocab, "embed -> vocab", bias=False)}


def embed(p: Tree, c: Config, batch: dict[str, Tensor]) -> tuple[Tensor, Tree]:
    """batch: input_ids [B, S] or inputs_embeds [B, S, D]; optional attention_mask [B, S] (0 padding, else segments),
    position_ids [B, S]; with a cache also start (0-d, slot of the first token) and cache_mask [B, slots]."""
    x = embeds(p, c, batch)
    place = batch.get("position_ids")
    if place is None:
        place = torch.arange(x.shape[1], device=x.device)[None] + batch.get("start", 0)
    return x, context(batch, x) | {"angles": nn.axial(place[..., None], (c.k,), c.theta)}


def embeds(p: Tree, c: Config, batch: dict[str, Tensor]) -> Tensor:
    """Vectors of the tokens, [B, S, D]."""
    return batch["inputs_embeds"] if "inputs_embeds" in batch else nn.embed(p["embed"], batch["input_ids"])


def context(batch: dict[str, Tensor], x: Tensor) -> Tree:
    """What blocks read besides the angles: who sees whom, and where a cache is written."""
    seen = batch.get("attention_mask")
    if "start" in batch:
        seen = (batch["cache_mask"].new_ones(x.shape[:2]), batch["cache_mask"])
    return {"segments": seen, "start": batch.get("start")}


def block(p: Tree, c: Config, x: Tensor, ctx: Tree, entry: Tree | None = None) -> Any:
    q, k, v = nn.qkv(p["self"], nn.rmsnorm(p["norm"], x, c.eps), c.k)
    q, k = nn.rotate(q, ctx["angles"]), nn.rotate(k, ctx["angles"])
    if entry is not None:
        entry = nn.remember(entry, k, v, ctx["start"])
        k, v = entry["k"], entry["v"]
    x = x + nn.merge(p["self"], nn.attend(q, k, v, causal=True, segments=ctx["segments"], start=ctx["start"]))
    x = x + nn.mlp(p["mlp"], nn.rmsnorm(p["norm_mlp"], x, c.eps))
    return x if entry is None else (x, entry)


def features(p: Tree, c: Config, x: Tensor, ctx: Tree) -> Tensor:
    """What the vocabulary matrix reads, [B, S, D]."""
    return nn.rmsnorm(p["norm"], x, c.eps)


def vocabulary(p: Tree, c: Config) -> Tree:
    """The map from features to the logits of words."""
    return p["embed" if c.tied else "head"]


def words(p: Tree, c: Config) -> Tensor:
    """The vocabulary matrix, [V, D]."""
    return vocabulary(p, c)["weight"]


def head(p: Tree, c: Config, x: Tensor, ctx: Tree) -> Tensor:
    """Next-token logits, [B, S, V]; with a cache those of the last token, [B, 1, V]."""
    x = x if ctx["start"] is None else x[:, -1:]
    return nn.linear(vocabulary(p, c), features(p, c, x, ctx))


STACKS = (("blocks", block),)
forward = nn.Chain(embed, STACKS, head)
trunk = nn.Chain(embed, STACKS, features)
step = forward  # for generation


def loss(p: Tree, c: Config, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of labels [B, S] (-100 ignored), over num_items_in_batch targets when the batch says so."""
    return nn.cross_entropy(trunk(p, c, batch), words(p, c), batch["labels"], batch.get("num_items_in_batch"))


def cache(c: Config, rows: int, slots: int, dtype: torch.dtype = torch.float32, device: Any = None) -> dict[str, Tree]:
    """An empty static cache: by layer, k and v [rows, slots, G, K]."""
    shape = rows, slots, c.kv_heads, c.k
    return {f"blocks.{i}": {n: torch.zeros(shape, dtype=dtype, device=device) for n in "kv"} for i in range(c.layers)}


KEYS = {  # here: in Qwen/Qwen2.5-*
    "embed": keys.Copied("model.embed_tokens", "lm_head"),
    "{norm,head}": "{model.norm,lm_head}",
    "blocks.*.self.{q,k,v,out}": "model.layers.*.self_attn.{q_proj,k_proj,v_proj,o_proj}",
    "blocks.*.{norm,norm_mlp}": "model.layers.*.{input_layernorm,post_attention_layernorm}",
    "blocks.*.mlp.{gate,up,down}": "model.layers.*.mlp.{gate_proj,up_proj,down_proj}",
}

HUB = {"width": "hidden_size", "hidden": "intermediate_size", "heads": "num_attention_heads",
       "kv_heads": "num_key_value_heads", "layers": "num_hidden_layers", "vocab": "vocab_size", "eps": "rms_norm_eps",
       "tied": "tie_word_embeddings", "tokens": "max_position_embeddings", "init": "initializer_range"}


def config(hub: dict) -> Config:
    """The Config of a config.json, of today's transformers or of 2024."""
    if hub.get("use_sliding_window"):
        raise ValueError("use_sliding_window is true in config.json; sliding windows are not supported for qwen2")
    rope = hub.get("rope_parameters") or hub.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) not in ("default", "mrope"):
        raise ValueError(f"rope {rope} is not supported; qwen2 knows the default and mrope")
    theta = rope.get("rope_theta", hub.get("rope_theta", 1e6))
    return Config(theta=float(theta), **{ours: hub[theirs] for ours, theirs in HUB.items() if theirs in hub})


def hub(c: Config) -> dict:
    """The config.json of a Config."""
    rope = {"rope_type": "default", "rope_theta": c.theta}
    return {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "head_dim": c.k,
            "rope_parameters": rope, "rope_theta": c.theta, "use_sliding_window": False,
            } | {theirs: getattr(c, ours) for ours, theirs in HUB.items()}
