"""Qwen2-VL (Wang et al. 2024, arXiv:2409.12191) and Qwen2.5-VL (Bai et al. 2025, arXiv:2502.13923).

A vision transformer reads patches of images and videos at native resolution, in 2.5 mostly within windows; each 2 x 2
patches become one token among the text of a Qwen2 decoder, whose rotary positions have time, row and column.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from mmfunc import keys, nn
from mmfunc.models import qwen2
from mmfunc.nn import vision
from mmfunc.tree import Tree

RULES = "4.51", "5.23"


@dataclass(frozen=True)
class Config:
    text: qwen2.Config = field(default_factory=qwen2.Config)
    width: int = 1280  # of the vision tower, as the next three
    hidden: int = 3420
    heads: int = 16
    layers: int = 32
    patch: int = 14  # pixels
    frames: int = 2  # of a patch
    merge: int = 2  # patches of a token, each way
    channels: int = 3
    window: int = 112  # pixels; 0: no windows, layer norms and a plain MLP (Qwen2-VL)
    full: tuple[int, ...] = (7, 15, 23, 31)  # layers that see the whole frame
    tokens_per_second: float = 2  # temporal positions of a second of video; 0: one a frame (Qwen2-VL)
    sections: tuple[int, ...] = (16, 24, 24)  # pairs of channels that read time, row, column
    image_token: int = 151655
    video_token: int = 151656
    start_token: int = 151652
    end_token: int = 151653

    @property
    def k(self) -> int:
        return self.width // self.heads


_2 = Config(hidden=5120, window=0, full=(), tokens_per_second=0)
_TINY = Config(replace(qwen2.PRESETS["tiny"], width=64, heads=4), width=32, hidden=48, heads=2, layers=3, patch=4,
               window=16, full=(1,), sections=(2, 3, 3), image_token=150, video_token=151, start_token=148,
               end_token=149)
_sizes = {n: replace(c, tokens=128000) for n, c in qwen2.PRESETS.items()}
PRESETS = {
    "2b": replace(_2, text=replace(_sizes["2.5-1.5b"], tokens=32768)),
    "7b": replace(_2, text=replace(_sizes["2.5-7b"], tokens=32768)),
    "72b": replace(_2, text=replace(_sizes["2.5-72b"], tokens=32768, eps=1e-6)),
    "2.5-3b": Config(_sizes["2.5-3b"]),
    "2.5-7b": Config(_sizes["2.5-7b"]),
    "2.5-32b": Config(replace(_sizes["2.5-32b"], eps=1e-6), hidden=3456),
    "2.5-72b": Config(replace(_sizes["2.5-72b"], eps=1e-6), hidden=3456),
    "tiny": _TINY,
    "tiny-2": replace(_TINY, hidden=64, window=0, full=(), tokens_per_second=0),
}


def params(c: Config) -> Tree:
    d, wide = c.width, c.width * c.merge**2
    norm = nn.RMSNorm(d) if c.window else nn.LayerNorm(d)
    block = {"norm": norm, "self": nn.Attention(d, c.heads, c.k), "norm_mlp": norm,
             "mlp": nn.MLP(d, c.hidden, gated=bool(c.window))}
    tower = {"patch": nn.Linear(c.channels * c.frames * c.patch**2, d, bias=False), "blocks": [block] * c.layers,
             "merger": {"norm": norm, "mlp": nn.MLP(wide, wide, c.text.width)}}
    return {"vision": tower} | qwen2.params(c.text)


def prepare(c: Config, batch: dict[str, Any], *, rule: str | None = None, patches: int | None = None,
            row: int | None = None) -> dict[str, Tensor]:
    """A hub batch as index tables, on the host: what forward reads, in shapes that depend on declared sizes only.

    batch: input_ids [B, S], optional attention_mask (0 padding, else segments), pixel_values [p, C*T*p*p],
    image_grid_thw, pixel_values_videos, video_grid_thw, second_per_grid_ts, position_ids [3, B, S], labels. patches:
    size of the patch buffer. row: patches of an attention row, at least the largest frame's. rule: "4.51" (how
    released checkpoints were trained) or "5.23" (of later transformers): where text goes on after an image.
    """
    if rule not in (None, *RULES):
        raise ValueError(f"the position rule {rule!r} is unknown; there are {', '.join(RULES)}")
    ids = batch["input_ids"].numpy()
    if ids.size and (ids.max() >= c.text.vocab or ids.min() < 0):
        raise ValueError(
            f"token {ids.max() if ids.min() >= 0 else ids.min()} is outside the vocabulary of {c.text.vocab}"
        )
    grids = {n: np.asarray(batch[f"{n}_grid_thw"]).reshape(-1, 3) for n in ("image", "video")
             if batch.get(f"{n}_grid_thw") is not None}
    pixels = [batch[n] for n in ("pixel_values", "pixel_values_videos") if batch.get(n) is not None]
    grid = np.concatenate([np.zeros((0, 3), np.int64), *grids.values()])
    frames, places = vision.spots(grid, c.merge)
    count = sum(map(len, pixels))
    if count != len(frames):
        raise ValueError(f"{count} patches of pixels belong to grids of {len(frames)}")
    size = count if patches is None else patches
    if count > size:
        raise ValueError(f"the batch has {count} patches, the buffer is declared with {size}")
    pixels = torch.cat([*pixels, torch.zeros(size - count, c.channels * c.frames * c.patch**2)])
    longest = int(np.unique(frames, return_counts=True)[1].max()) if count else 1
    out = {n: batch[n] for n in ("input_ids", "attention_mask", "labels", "num_items_in_batch") if n in batch}
    out |= {"patches": pixels, "spots": torch.from_numpy(np.pad(places, ((0, size - count), (0, 0)))),
            "frames": vision.rows(frames, row or (patches or longest), size, vision.enough(patches, row or size))}
    if c.window:
        side = c.window // c.patch
        cells = vision.cells(frames, places, side)
        out["windows"] = vision.rows(cells, side**2, size, vision.enough(patches, side**2))
    counts = {n: int(g.prod(-1).sum()) // c.merge**2 for n, g in grids.items()}
    out |= vision.placed(ids, {"image": c.image_token, "video": c.video_token}, counts, size // c.merge**2)
    place = batch.get("position_ids")
    return out | {"position_ids": positions(c, batch, rule) if place is None else place}


def positions(c: Config, batch: dict[str, Any], rule: str | None = None) -> Tensor:
    """Positions (time, row, column) of each token, [3, B, S]; each segment of attention_mask starts at 0."""
    ids, mask, seconds = (batch.get(n) for n in ("input_ids", "attention_mask", "second_per_grid_ts"))
    kinds = ((ids == c.image_token) + 2 * (ids == c.video_token)).numpy()
    names = (1, "image_grid_thw"), (2, "video_grid_thw")
    grids = {k: batch[n].tolist() for k, n in names if batch.get(n) is not None}
    steps = [1.0] * len(grids.get(2, ())) if seconds is None else seconds.tolist()
    steps = {2: [s * c.tokens_per_second for s in steps]} if c.tokens_per_second else {}
    mask = np.ones_like(kinds) if mask is None else mask.numpy()
    return vision.positions(kinds, mask, grids, steps, c.merge, rule=rule or RULES[0])


def look(p: Tree, c: Config, batch: dict[str, Any]) -> tuple[Tensor, Tree]:
    """A hub batch, or what prepare made of it: patches [P, D] flow first."""
    if "patches" not in batch:
        if torch.compiler.is_compiling():
            raise ValueError("compiled code needs a prepared batch: call qwen2vl.prepare(c, batch) before")
        batch = prepare(c, batch)
    x = nn.linear(p["vision"]["patch"], batch["patches"].to(p["vision"]["patch"]["weight"].dtype))
    return x, batch | {"angles": nn.axial(batch["spots"], (c.k // 2, c.k // 2))}


def _see(p: Tree, c: Config, x: Tensor, ctx: Tree, table: Tree) -> Tensor:
    norm = nn.rmsnorm if c.window else nn.layernorm
    q, k, v = nn.qkv(p["self"], norm(p["norm"], x), c.k)
    q, k = nn.rotate(q, ctx["angles"]), nn.rotate(k, ctx["angles"])
    x = x + nn.merge(p["self"], vision.in_rows(nn.attend, q, k, v, table))
    return x + nn.mlp(p["mlp"], norm(p["norm_mlp"], x), silu if c.window else nn.quick_gelu)


def near(p: Tree, c: Config, x: Tensor, ctx: Tree) -> Tensor:
    """A vision layer within windows."""
    return _see(p, c, x, ctx, ctx["windows"])


def far(p: Tree, c: Config, x: Tensor, ctx: Tree) -> Tensor:
    """A vision layer within whole frames."""
    return _see(p, c, x, ctx, ctx["frames"])


def place(p: Tree, c: Config, x: Tensor, ctx: Tree) -> tuple[Tensor, Tree]:
    """Merge neighbouring patches into tokens, and put them where the text has their placeholders."""
    merger = p["vision"]["merger"]
    norm = nn.rmsnorm if c.window else nn.layernorm
    x = nn.mlp(merger["mlp"], norm(merger["norm"], x).unflatten(0, (-1, c.merge**2)).flatten(1), gelu)
    words = nn.embed(p["embed"], ctx["input_ids"])
    x = vision.put(x, ctx["token"], words[..., 0].numel()).view(words.shape)
    x = torch.where(ctx["seen"][..., None], x, words)
    return x, said(c, ctx, x)


def said(c: Config, batch: dict[str, Any], x: Tensor) -> Tree:
    """What text blocks read."""
    return qwen2.context(batch, x) | {"angles": nn.sections(batch["position_ids"], c.text.k, c.sections, c.text.theta)}


def block(p: Tree, c: Config, x: Tensor, ctx: Tree, entry: Tree | None = None) -> Any:
    return qwen2.block(p, c.text, x, ctx, entry)


def tower(p: Tree, c: Config) -> list:
    whole = set(c.full) if c.window else range(c.layers)
    return [*((f"vision.blocks.{i}", far if i in whole else near) for i in range(c.layers)), place]


def read(p: Tree, c: Config, batch: dict[str, Tensor]) -> tuple[Tensor, Tree]:
    """Tokens behind the first ones: batch has inputs_embeds [B, S, D] or input_ids, position_ids [3, B, S], start."""
    x = qwen2.embeds(p, c.text, batch)
    return x, said(c, batch, x)


def features(p: Tree, c: Config, x: Tensor, ctx: Tree) -> Tensor:
    return qwen2.features(p, c.text, x, ctx)


def head(p: Tree, c: Config, x: Tensor, ctx: Tree) -> Tensor:
    """Next-token logits, [B, S, V]; with a cache those of the last token, [B, 1, V]."""
    return qwen2.head(p, c.text, x, ctx)


STACKS = (("blocks", block),)
forward = nn.Chain(look, lambda p, c: [*tower(p, c), *STACKS], head)
trunk = nn.Chain(look, forward.stacks, features)
embeds = nn.Chain(look, tower, lambda p, c, x, ctx: x)  # text with images in place, [B, S, D]
step = nn.Chain(read, STACKS, head)  # the text half alone, for generation


def loss(p: Tree, c: Config, batch: dict[str, Any]) -> Tensor:
    """Cross-entropy of labels [B, S] (-100 ignored), over num_items_in_batch targets when the batch says so."""
    x, count = trunk(p, c, batch), batch.get("num_items_in_batch")
    return nn.cross_entropy(x, qwen2.words(p, c.text), batch["labels"], count)


def cache(c: Config, rows: int, slots: int, dtype: torch.dtype = torch.float32, device: Any = None) -> dict[str, Tree]:
    """An empty static cache: by layer, k and v [rows, slots, G, K]."""
    return qwen2.cache(c.text, rows, slots, dtype, device)



def KEYS(c: Config) -> keys.Table:  # here: in Qwen/Qwen2.5-VL-* and Qwen/Qwen2-VL-*
    mlp = {"vision.blocks.*.mlp.{gate,up,down}": "visual.blocks.*.mlp.{gate_proj,up_proj,down_proj}"}
    plain = {"vision.blocks.*.mlp.{up,down}": "visual.blocks.*.mlp.{fc1,fc2}"}
    conv = c.width, c.channels, c.frames, c.patch, c.patch
    return qwen2.KEYS | (mlp if c.window else plain) | {
        "vision.patch": keys.View("visual.patch_embed.proj", conv),
        "vision.blocks.*.self.{q,k,v}": keys.Cut("visual.blocks.*.attn.qkv"),
        "vision.blocks.*.self.out": "visual.blocks.*.attn.proj",
        "vision.blocks.*.{norm,norm_mlp}": "visual.blocks.*.{norm1,norm2}",
        "vision.merger.{norm,mlp.up,mlp.down}": "visual.merger.{ln_q,mlp.0,mlp.2}",
    }


SPELLINGS = {"model.visual.": "visual.", "model.language_model.": "model."}  # in memory: in published files

HUB = {"layers": "depth", "heads": "num_heads", "channels": "in_channels", "patch": "patch_size",
       "merge": "spatial_merge_size", "frames": "temporal_patch_size"}
TOKENS = {"image": "image_token_id", "video": "video_token_id", "start": "vision_start_token_id",
          "end": "vision_end_token_id"}


def config(hub: dict) -> Config:
    """The Config of a config.json, of today's transformers or of April 2025."""
    v, text = hub["vision_config"], hub.get("text_config") or hub
    new = hub["model_type"] == "qwen2_5_vl"
    rope = text.get("rope_parameters") or text.get("rope_scaling") or hub.get("rope_scaling") or {}
    own = {ours: v[theirs] for ours, theirs in HUB.items() if theirs in v}
    own |= {"channels": v["in_chans"]} if "in_chans" in v else {}
    if new:
        own |= {"width": v["hidden_size"], "hidden": v["intermediate_size"], "window": v["window_size"],
                "full": tuple(v["fullatt_block_indexes"]), "tokens_per_second": v.get("tokens_per_second", 4)}
    else:
        width = v["embed_dim"]
        own |= {"width": width, "hidden": int(width * v["mlp_ratio"]), "window": 0, "full": (), "tokens_per_second": 0}
    tied = hub.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    tokens = {f"{n}_token": hub[key] for n, key in TOKENS.items() if hub.get(key) is not None}
    own |= {"sections": tuple(rope["mrope_section"])}
    return Config(qwen2.config(text | {"tie_word_embeddings": tied}), **own, **tokens)


def hub(c: Config) -> dict:
    """The config.json of a Config."""
    kind = "qwen2_5_vl" if c.window else "qwen2_vl"
    rope = {"rope_type": "default", "type": "mrope", "mrope_section": list(c.sections), "rope_theta": c.text.theta}
    text = qwen2.hub(c.text) | {"model_type": f"{kind}_text", "rope_parameters": rope, "rope_scaling": rope}
    v = {theirs: getattr(c, ours) for ours, theirs in HUB.items()}
    v |= {"in_chans": c.channels, "model_type": f"{kind}_vision"}
    if c.window:
        v |= {"hidden_size": c.width, "intermediate_size": c.hidden, "window_size": c.window, "hidden_act": "silu",
              "fullatt_block_indexes": list(c.full), "tokens_per_second": c.tokens_per_second,
              "out_hidden_size": c.text.width}
    else:
        v |= {"embed_dim": c.width, "hidden_size": c.text.width, "mlp_ratio": c.hidden // c.width}
    return {"model_type": kind, "architectures": [f"Qwen2{'_5_' if c.window else ''}VLForConditionalGeneration"],
            "text_config": text, "vision_config": v, "tie_word_embeddings": c.text.tied,
            } | {key: getattr(c, f"{n}_token") for n, key in TOKENS.items()}
