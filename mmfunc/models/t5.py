"""The encoders of T5 (Raffel et al. 2020, arXiv:1910.10683), mT5 (arXiv:2010.11934) and UMT5 (arXiv:2304.09151).

Pre-norm blocks without biases, whose attention adds a learned number for each head and bucket of relative positions to
the unscaled scores: one table for all layers, in UMT5 one for each.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import embedding, relu

from mmfunc import keys, nn
from mmfunc.tree import Param, Tree, normal


@dataclass(frozen=True)
class Config:
    kind: Literal["t5", "mt5", "umt5"] = "umt5"
    width: int = 4096
    hidden: int = 10240
    heads: int = 64
    k: int = 64  # width of a head
    layers: int = 24
    vocab: int = 256384
    gated: bool = True  # a gated GELU; otherwise ReLU (the first T5)
    buckets: int = 32  # of relative positions, half of them for each direction
    reach: int = 128  # distance from which on all share the last bucket
    eps: float = 1e-6  # of the norms


PRESETS = {
    "umt5-xxl": Config(),  # Wan
    "t5-v1.1-xxl": Config(kind="t5", vocab=32128),  # FLUX, Stable Diffusion 3, CogVideoX
    "t5-small": Config(kind="t5", width=512, hidden=2048, heads=8, layers=6, vocab=32128, gated=False),
    "mt5-xl": Config(kind="mt5", width=2048, hidden=5120, heads=32, vocab=250112),  # HunyuanDiT
    "tiny": Config(kind="t5", width=32, hidden=48, heads=4, k=12, layers=3, vocab=160, buckets=16, reach=40),
    "tiny-umt5": Config(width=32, hidden=48, heads=4, k=12, layers=3, vocab=160, buckets=16, reach=40),
    "tiny-relu": Config(kind="t5", width=32, hidden=48, heads=4, k=8, layers=2, vocab=160, gated=False),
}


def params(c: Config) -> Tree:
    d, wide = c.width, c.heads * c.k
    positions = Param((c.buckets, c.heads), "_ heads", normal(d**-0.5))
    query = nn.Linear(d, wide, f"embed -> heads/{c.k}", bias=False, std=(d * c.k) ** -0.5)  # scores are not scaled
    attention = nn.Attention(d, c.heads, c.k, bias=False, out_bias=False) | {"q": query}
    block = {"norm": nn.RMSNorm(d), "self": attention, "norm_mlp": nn.RMSNorm(d),
             "mlp": nn.MLP(d, c.hidden, gated=c.gated, bias=False)}
    own, shared = ({"positions": positions}, {}) if c.kind == "umt5" else ({}, {"positions": positions})
    return {"embed": nn.Embed(c.vocab, d, std=1.0), **shared, "blocks": [block | own] * c.layers, "norm": nn.RMSNorm(d)}


def edges(c: Config) -> list[int]:
    """Distances at which the next bucket starts: up to half of a direction's buckets are one apart, then they widen."""
    exact, wide = c.buckets // 4, c.buckets // 2 - c.buckets // 4
    return [math.ceil(exact * (c.reach / exact) ** (i / wide) - 1e-6) for i in range(1, wide)]


def buckets(c: Config, size: int, device: torch.device) -> Tensor:
    """The bucket of each pair of a query and a key, [S, S]; whole numbers only, so that every compiler agrees."""
    place = torch.arange(size, device=device)
    distance = place[None] - place[:, None]
    far, exact = distance.abs(), c.buckets // 4
    wide = exact + sum((far >= edge).long() for edge in edges(c))
    return torch.where(far < exact, far, wide) + (distance > 0) * (c.buckets // 2)


def bias(table: Tensor, buckets: Tensor) -> Tensor:
    """What positions add to the scores. table [buckets, H], buckets [S, S] -> [1, H, S, S]."""
    return embedding(buckets, table).permute(2, 0, 1)[None]


def embed(p: Tree, c: Config, batch: dict[str, Tensor]) -> tuple[Tensor, Tree]:
    """batch: input_ids [B, S], optional attention_mask [B, S] (0 padding, else segments)."""
    x = nn.embed(p["embed"], batch["input_ids"])
    if x.dtype == torch.float16:
        raise ValueError("T5 overflows in float16; load it with dtype bfloat16 or float32")
    found = buckets(c, x.shape[1], x.device)
    ctx = {"bias": bias(p["positions"], found)} if "positions" in p else {"buckets": found}
    if batch.get("attention_mask") is not None:  # padding sees the first segment, as in the reference
        seen = batch["attention_mask"].long()
        ctx["segments"] = seen.clamp(min=1), seen
    return x, ctx


def block(p: Tree, c: Config, x: Tensor, ctx: Tree) -> Tensor:
    q, k, v = nn.qkv(p["self"], nn.rmsnorm(p["norm"], x, c.eps), c.k)
    added = bias(p["positions"], ctx["buckets"]) if "positions" in p else ctx["bias"]
    x = x + nn.merge(p["self"], nn.attend(q, k, v, segments=ctx.get("segments"), scale=1.0, bias=added))
    return x + nn.mlp(p["mlp"], nn.rmsnorm(p["norm_mlp"], x, c.eps), nn.gelu_tanh if c.gated else relu)


def head(p: Tree, c: Config, x: Tensor, ctx: Tree) -> Tensor:
    """The last hidden state, [B, S, D]."""
    return nn.rmsnorm(p["norm"], x, c.eps)


forward = nn.Chain(embed, (("blocks", block),), head)


def KEYS(c: Config) -> keys.Table:  # here: in google/t5-*, google/mt5-*, google/umt5-* and text_encoder folders
    attention, mlp = "encoder.block.*.layer.0", "encoder.block.*.layer.1"
    gated = {"blocks.*.mlp.{gate,up,down}": mlp + ".DenseReluDense.{wi_0,wi_1,wo}"}
    plain = {"blocks.*.mlp.{up,down}": mlp + ".DenseReluDense.{wi,wo}"}
    return (gated if c.gated else plain) | {
        "embed": keys.Copied("shared", "encoder.embed_tokens"),
        "positions": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "blocks.*.positions": attention + ".SelfAttention.relative_attention_bias.weight",
        "blocks.*.self.{q,k,v,out}": attention + ".SelfAttention.{q,k,v,o}",
        "blocks.*.norm": attention + ".layer_norm",
        "blocks.*.norm_mlp": mlp + ".layer_norm",
        "norm": "encoder.final_layer_norm",
    }


HUB = {"width": "d_model", "hidden": "d_ff", "heads": "num_heads", "k": "d_kv", "layers": "num_layers",
       "vocab": "vocab_size", "buckets": "relative_attention_num_buckets", "reach": "relative_attention_max_distance",
       "eps": "layer_norm_epsilon"}
MLPS = {"relu": False, "gated-gelu": True}


def config(hub: dict) -> Config:
    """The Config of a config.json of T5, mT5 or UMT5."""
    kind = hub["model_type"]
    mlp = hub.get("feed_forward_proj", "relu" if kind == "t5" else "gated-gelu")
    if mlp not in MLPS:
        raise ValueError(f"feed_forward_proj is {mlp!r} in config.json; {kind} knows {', '.join(MLPS)}")
    return Config(kind=kind, gated=MLPS[mlp], **{ours: hub[theirs] for ours, theirs in HUB.items() if theirs in hub})


def hub(c: Config) -> dict:
    """The config.json of a Config."""
    said = {"model_type": c.kind, "architectures": [f"{c.kind.upper()}EncoderModel"], "is_encoder_decoder": True,
            "feed_forward_proj": "gated-gelu" if c.gated else "relu", "tie_word_embeddings": False,
            "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    return said | {theirs: getattr(c, ours) for ours, theirs in HUB.items()}
