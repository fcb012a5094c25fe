"""CLIP's two halves (Radford et al. 2021, arXiv:2103.00020), each a model of its own, and OpenCLIP's in the same form.

A causal transformer reads a prompt, or a plain one an image in patches. Diffusion models condition on the last or the
last but one hidden state, or on one pooled vector.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import gelu

from mmfunc import keys, nn
from mmfunc.media import rgb
from mmfunc.tree import Param, Tree, normal

MEAN = 0.48145466, 0.4578275, 0.40821073
STD = 0.26862954, 0.26130258, 0.27577711


@dataclass(frozen=True)
class Config:
    kind: Literal["text", "vision"] = "text"
    width: int = 1280
    hidden: int = 5120
    heads: int = 20
    layers: int = 32
    project: int = 1280  # width of the projection of the pooled vector; 0: none
    act: Literal["gelu", "quick_gelu"] = "gelu"
    eps: float = 1e-5  # of the norms
    vocab: int = 49408  # of text, as the next two
    tokens: int = 77
    eos: int = 49407  # whose first place is pooled; 2 in older files, which means the place of the highest id
    image: int = 224  # pixels of an image's side, as the next
    patch: int = 14
    channels: int = 3

    @property
    def k(self) -> int:
        return self.width // self.heads


_TINY = Config(width=32, hidden=48, heads=2, layers=3, project=24, vocab=160, tokens=20, eos=2)
PRESETS = {
    "text-l": Config(width=768, hidden=3072, heads=12, layers=12, project=0, act="quick_gelu"),  # FLUX, SDXL
    "text-bigg": Config(),  # SDXL, Stable Diffusion 3
    "vision-h": Config(kind="vision", heads=16, project=0),  # Wan
    "tiny-text": Config(width=32, hidden=48, heads=4, layers=3, project=0, act="quick_gelu", vocab=160, tokens=20,
                        eos=159),
    "tiny": _TINY,
    "tiny-bigg": _TINY,
    "tiny-vision": Config(kind="vision", width=32, hidden=48, heads=4, layers=3, project=0, image=28, patch=7),
}


def params(c: Config) -> Tree:
    d = c.width
    block = {"norm": nn.LayerNorm(d), "self": nn.Attention(d, c.heads, c.k), "norm_mlp": nn.LayerNorm(d),
             "mlp": nn.MLP(d, c.hidden)}
    places = lambda n: Param((n, d), "_ embed", normal(0.02))
    text = {"embed": nn.Embed(c.vocab, d), "positions": places(c.tokens)}
    vision = {"patch": nn.Linear(c.channels * c.patch**2, d, "_ -> embed", bias=False),
              "token": Param((d,), "embed", normal(d**-0.5)),
              "positions": places((c.image // c.patch) ** 2 + 1), "norm_in": nn.LayerNorm(d)}
    project = {"project": nn.Linear(d, c.project, "embed -> _", bias=False)} if c.project else {}
    return (text if c.kind == "text" else vision) | {"blocks": [block] * c.layers, "norm": nn.LayerNorm(d)} | project


def embed(p: Tree, c: Config, batch: dict[str, Tensor]) -> tuple[Tensor, Tree]:
    """batch: for text input_ids [B, S] and optional attention_mask [B, S], for vision pixel_values [B, C, Y, X]."""
    return read(p, c, batch) if c.kind == "text" else look(p, c, batch)


def read(p: Tree, c: Config, batch: dict[str, Tensor]) -> tuple[Tensor, Tree]:
    """Tokens at their positions, and where each prompt ends."""
    ids = batch["input_ids"]
    if ids.shape[1] > c.tokens:
        raise ValueError(f"the prompts have {ids.shape[1]} tokens; this CLIP has positions for {c.tokens}")
    ctx = {"end": (ids if c.eos == 2 else (ids == c.eos).int()).argmax(-1)}
    if batch.get("attention_mask") is not None:  # padding sees the words before it, as in the reference
        seen = batch["attention_mask"].long()
        ctx["segments"] = seen.clamp(min=1), seen
    return nn.embed(p["embed"], ids) + p["positions"][: ids.shape[1]], ctx


def look(p: Tree, c: Config, batch: dict[str, Tensor]) -> tuple[Tensor, Tree]:
    """Patches at their positions behind a learned token, which is what is pooled."""
    x = batch["pixel_values"]
    if x.shape[1:] != (c.channels, c.image, c.image):
        raise ValueError(f"pixel_values are {tuple(x.shape)}; this CLIP reads [B, {c.channels}, {c.image}, {c.image}]")
    x = nn.linear(p["patch"], nn.patchify(x.to(p["token"].dtype), (c.patch, c.patch)))
    x = torch.cat([p["token"].expand(len(x), 1, -1), x], 1) + p["positions"]
    return nn.layernorm(p["norm_in"], x, c.eps), {"end": torch.zeros(len(x), dtype=torch.long, device=x.device)}


def block(p: Tree, c: Config, x: Tensor, ctx: Tree) -> Tensor:
    q, k, v = nn.qkv(p["self"], nn.layernorm(p["norm"], x, c.eps), c.k)
    x = x + nn.merge(p["self"], nn.attend(q, k, v, causal=c.kind == "text", segments=ctx.get("segments")))
    act = nn.quick_gelu if c.act == "quick_gelu" else gelu
    return x + nn.mlp(p["mlp"], nn.layernorm(p["norm_mlp"], x, c.eps), act)


def keep(p: Tree, c: Config, x: Tensor, ctx: Tree) -> tuple[Tensor, Tree]:
    """Remember what the last layer reads."""
    return x, ctx | {"penultimate": x}


def layers(p: Tree, c: Config) -> list:
    each = [(f"blocks.{i}", block) for i in range(c.layers)]
    return [*each[:-1], keep, each[-1]]


def head(p: Tree, c: Config, x: Tensor, ctx: Tree) -> dict[str, Tensor]:
    """"hidden" [B, S, D] (of text normed), "penultimate" [B, S, D], "pooled" [B, D] and, if any, "projected" [B, D'].

    transformers calls them last_hidden_state, hidden_states[-2], pooler_output, and text_embeds or image_embeds.
    """
    pooled = nn.layernorm(p["norm"], x[torch.arange(len(x), device=x.device), ctx["end"]], c.eps)
    hidden = nn.layernorm(p["norm"], x, c.eps) if c.kind == "text" else x
    out = {"hidden": hidden, "penultimate": ctx["penultimate"], "pooled": pooled}
    return out | {"projected": nn.linear(p["project"], pooled)} if c.project else out


forward = nn.Chain(embed, layers, head)


def pixels(image: Image.Image, size: int = 224) -> Tensor:
    """An image as pixel_values [3, size, size]: its short side resized, its middle cropped, its colours normalised."""
    image = rgb(image)
    short = min(image.size)
    image = image.resize(tuple(int(size * side / short) for side in image.size), Image.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in image.size)
    x = np.asarray(image.crop((left, top, left + size, top + size))).astype(np.float64) * (1 / 255)
    x = (x.astype(np.float32) - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return torch.from_numpy(x).permute(2, 0, 1).contiguous()


def KEYS(c: Config) -> keys.Table:  # here: in text_encoder and image_encoder folders
    text = {"embed": "embeddings.token_embedding", "norm": "final_layer_norm"}
    vision = {"patch": keys.View("embeddings.patch_embedding", (c.width, c.channels, c.patch, c.patch)),
              "token": "embeddings.class_embedding", "{norm_in,norm}": "{pre_layrnorm,post_layernorm}"}
    both = {"positions": "embeddings.position_embedding.weight",
            "blocks.*.self.{q,k,v,out}": "encoder.layers.*.self_attn.{q_proj,k_proj,v_proj,out_proj}",
            "blocks.*.{norm,norm_mlp}": "encoder.layers.*.{layer_norm1,layer_norm2}",
            "blocks.*.mlp.{up,down}": "encoder.layers.*.mlp.{fc1,fc2}"}
    own = keys.under("", both | (text if c.kind == "text" else vision), f"{c.kind}_model.")
    return own | {"project": "text_projection" if c.kind == "text" else "visual_projection"}


def SPELLINGS(c: Config) -> dict[str, str]:  # as transformers 5 writes them without a projection: in published files
    names = "embeddings.", "encoder.", "final_layer_norm.", "pre_layrnorm.", "post_layernorm."
    return {name: f"{c.kind}_model.{name}" for name in names}


HUB = {"width": "hidden_size", "hidden": "intermediate_size", "heads": "num_attention_heads",
       "layers": "num_hidden_layers", "act": "hidden_act", "eps": "layer_norm_eps"}
OWN = {"text": {"vocab": "vocab_size", "tokens": "max_position_embeddings", "eos": "eos_token_id"},
       "vision": {"image": "image_size", "patch": "patch_size", "channels": "num_channels"}}


def config(hub: dict) -> Config:
    """The Config of a config.json of CLIPTextModel or CLIPVisionModel, with projection or without."""
    kind = {"clip_text_model": "text", "clip_vision_model": "vision"}.get(hub["model_type"])
    if kind is None:
        raise ValueError(f"config.json is of a whole {hub['model_type']!r}; give a folder with one half of it, such as "
                         "text_encoder/ or image_encoder/ of a diffusers checkpoint")
    if hub["hidden_act"] not in ("gelu", "quick_gelu"):
        raise ValueError(f"hidden_act is {hub['hidden_act']!r} in config.json; CLIP knows gelu and quick_gelu")
    project = hub["projection_dim"] if "WithProjection" in hub["architectures"][0] else 0
    found = {ours: hub[theirs] for ours, theirs in (HUB | OWN[kind]).items() if theirs in hub}
    return Config(kind=kind, project=project, **found)


def hub(c: Config) -> dict:
    """The config.json of a Config."""
    name = f"CLIP{c.kind.title()}Model" + ("WithProjection" if c.project else "")
    said = {"model_type": f"clip_{c.kind}_model", "architectures": [name], "projection_dim": c.project or c.width}
    return said | {theirs: getattr(c, ours) for ours, theirs in (HUB | OWN[c.kind]).items()}
