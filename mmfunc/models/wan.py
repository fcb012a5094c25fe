"""Wan2.1: a diffusion transformer over video latents (Wan Team 2025, arXiv:2503.20314).

Latent patches attend to each other under 3-D rotary positions, then to the text and, for image-to-video, to image
tokens. The timestep gives every block six offsets: shift, scale and gate around the attention and around the MLP.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from mmfunc import diffusion, keys, nn
from mmfunc.tree import Param, Tree


@dataclass(frozen=True)
class Config:
    width: int = 5120
    hidden: int = 13824
    heads: int = 40
    layers: int = 40
    channels: int = 16  # of the latent
    condition: int = 0  # channels stacked on the latent: mask (4) and first frame (16)
    text: int = 4096  # width of the text tokens
    image: int = 0  # width of the image tokens; 0: none are seen
    places: int = 0  # learned positions of image tokens, for first and last frame together; 0: none
    time: int = 256
    patch: tuple[int, int, int] = (1, 2, 2)
    positions: int = 1024  # on each axis, at most

    @property
    def k(self) -> int:
        return self.width // self.heads


_SMALL = {"width": 1536, "hidden": 8960, "heads": 12, "layers": 30}
_TINY = {"width": 48, "hidden": 80, "heads": 2, "layers": 2, "text": 24, "time": 16}
_IMAGE = {"condition": 20, "image": 1280}
PRESETS = {
    "t2v-1.3b": Config(**_SMALL),
    "t2v-14b": Config(),
    "i2v-1.3b": Config(**_SMALL, **_IMAGE),
    "i2v-14b-480p": Config(**_IMAGE),
    "i2v-14b-720p": Config(**_IMAGE),
    "flf2v-14b": Config(**_IMAGE, places=514),
    "tiny": Config(**_TINY),
    "tiny-i2v": Config(**_TINY, condition=20, image=32),
    "tiny-flf2v": Config(**_TINY, condition=20, image=32, places=10),
}

_FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
_T2V = {"kind": "WanPipeline", "vae": "wan_vae:2.1", "text": ("t5:umt5-xxl",), "length": 512, "steps": 50,
        "guidance": 5.0, "strength": 0.8, "size": (480, 832), "frames": 81, "fps": 16,
        "sampler": ("unipc", _FLOW | {"flow_shift": 3.0})}
_I2V = _T2V | {"kind": "WanImageToVideoPipeline", "image": "clip:vision-h"}
_720 = {"size": (720, 1280), "sampler": ("unipc", _FLOW | {"flow_shift": 5.0})}
PARTS = {  # what a preset goes with, and how it is run
    "t2v-1.3b": _T2V, "t2v-14b": _T2V | _720, "i2v-1.3b": _I2V, "i2v-14b-480p": _I2V, "i2v-14b-720p": _I2V | _720,
    "flf2v-14b": _I2V | _720 | {"guidance": 5.5},
}


def params(c: Config) -> Tree:
    d = c.width
    attention = nn.Attention(d, c.heads, c.k, norm="span")
    block = {"offsets": nn.Offsets(6, d), "self": attention, "norm": nn.LayerNorm(d), "cross": attention,
             "mlp": nn.MLP(d, c.hidden)}
    tree = {
        "patch": nn.Linear((c.channels + c.condition) * prod(c.patch), d),
        "time": nn.MLP(c.time, d, d),
        "offsets": nn.Linear(d, 6 * d),
        "text": nn.MLP(c.text, d, d),
        "blocks": [block] * c.layers,
        "head": {"offsets": nn.Offsets(2, d), "out": nn.Linear(d, c.channels * prod(c.patch), std=0)},
    }
    if c.image:
        block["image"] = {"k": attention["k"], "v": attention["v"], "span": {"k": attention["span"]["k"]}}
        tree["image"] = {"norm": nn.LayerNorm(c.image), "mlp": nn.MLP(c.image, c.image, d), "norm_out": nn.LayerNorm(d)}
        if c.places:
            tree["image"]["places"] = Param((1, c.places, c.image), "_ _ _")
    return tree


def given(batch: Tree, name: str, shape: str) -> Tensor:
    """What a batch must have, or a ValueError."""
    if batch.get(name) is None:
        raise ValueError(f"this model needs {name} {shape}; the batch has {', '.join(sorted(batch))}")
    return batch[name]


def embed(p: Tree, c: Config, batch: dict[str, Tensor]) -> tuple[Tensor, Tree]:
    """batch: hidden_states [B, C, T, Y, X], timestep [B] in 0..1000, encoder_hidden_states [B, L, text]; for
    image-to-video encoder_hidden_states_image [B, L', image]; optional encoder_attention_mask [B, L] (0: not seen)."""
    x, dtype = batch["hidden_states"], p["patch"]["weight"].dtype
    shape = grid(c, x)
    x = nn.linear(p["patch"], nn.patchify(x.to(dtype), c.patch))
    # in float32 where these weights are, as diffusers keeps them
    time = nn.sinusoid(batch["timestep"], c.time).to(p["time"]["up"]["weight"].dtype)
    time = nn.mlp(p["time"], time).to(dtype)
    widths = c.k - 4 * (c.k // 6), 2 * (c.k // 6), 2 * (c.k // 6)
    seen = batch.get("encoder_attention_mask")
    ctx = {
        "shape": shape,
        "time": time[:, None].float(),
        "offsets": nn.linear(p["offsets"], silu(time)).unflatten(-1, (6, -1)).float(),
        "angles": nn.axial(nn.grid(shape, x.device), widths),
        "text": nn.mlp(p["text"], batch["encoder_hidden_states"].to(dtype), nn.gelu_tanh),
        "seen": None if seen is None else (seen.new_ones(x.shape[:2], dtype=torch.int32), (seen > 0).int()),
    }
    return x, ctx | ({"image": looked(p["image"], c, batch, dtype)} if c.image else {})


def grid(c: Config, x: Tensor) -> tuple[int, ...]:
    """Patches in time, rows and columns of latents [B, C, T, Y, X]."""
    if x.ndim != 5 or x.shape[1] != c.channels + c.condition or any(n % s for n, s in zip(x.shape[2:], c.patch)):
        raise ValueError(f"hidden_states are {list(x.shape)}; they must be [B, {c.channels + c.condition}, T, Y, X] "
                         f"with T, Y, X multiples of {c.patch}")
    shape = tuple(n // s for n, s in zip(x.shape[2:], c.patch))
    if max(shape) > c.positions:
        raise ValueError(f"latents {list(x.shape)} have {shape} patches; the positions end at {c.positions}")
    return shape


def looked(p: Tree, c: Config, batch: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Image tokens [B, L, image] as the blocks read them; with places, first and last frame follow each other."""
    x = given(batch, "encoder_hidden_states_image", f"[B, L, {c.image}]").to(dtype)
    x = x.reshape(-1, c.places, c.image) + p["places"] if c.places else x
    return nn.layernorm(p["norm_out"], nn.mlp(p["mlp"], nn.layernorm(p["norm"], x, 1e-5), gelu), 1e-5)


def block(p: Tree, c: Config, x: Tensor, ctx: Tree) -> Tensor:
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (p["offsets"] + ctx["offsets"]).chunk(6, 1)
    q, k, v = nn.qkv(nn.unpaired(p["self"], c.k), nn.adaln(x, shift, scale), c.k)
    y = nn.attend(nn.rotate(q, ctx["angles"]), nn.rotate(k, ctx["angles"]), v)
    x = nn.gated(x, nn.merge(p["self"], y), gate)

    q = nn.query(p["cross"], nn.layernorm(p["norm"], x), c.k)
    y = nn.attend(q, *nn.kv(p["cross"], ctx["text"], c.k), segments=ctx["seen"])
    if c.image:
        y = y + nn.attend(q, *nn.kv(p["image"], ctx["image"], c.k))
    x = x + nn.merge(p["cross"], y)

    return nn.gated(x, nn.mlp(p["mlp"], nn.adaln(x, shift_mlp, scale_mlp), nn.gelu_tanh), gate_mlp)


def head(p: Tree, c: Config, x: Tensor, ctx: Tree) -> Tensor:
    """The velocity, [B, C, T, Y, X]."""
    shift, scale = (p["head"]["offsets"] + ctx["time"]).chunk(2, 1)
    return nn.unpatchify(nn.linear(p["head"]["out"], nn.adaln(x, shift, scale)), ctx["shape"], c.patch)


forward = nn.Chain(embed, (("blocks", block),), head)


def predict(p: Tree, c: Config, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
    """The velocity like x [B, C, T, Y, X], latents with noise of level t [B] in [0, 1].

    cond: what forward reads besides, and for image-to-video condition [B, 20, T, Y, X], the mask above the first frame.
    """
    if cond.get("condition") is not None and not c.condition:
        raise ValueError(f"this model stacks nothing on its latents; condition is {list(cond['condition'].shape)}")
    inside = [x, given(cond, "condition", f"[B, {c.condition}, T, Y, X]").to(x.dtype)] if c.condition else [x]
    return forward(p, c, cond | {"hidden_states": torch.cat(inside, 1), "timestep": 1000 * t.float()}).to(x.dtype)


def loss(p: Tree, c: Config, batch: dict[str, Tensor]) -> Tensor:
    """Mean squared error of the velocity. batch: latents and noise [B, C, T, Y, X], t [B], what predict reads; optional
    weight [B] and num_items_in_batch."""
    x, velocity = diffusion.blend(batch["latents"], batch["noise"], batch["t"])
    return diffusion.mean_error(predict(p, c, x, batch["t"], batch), velocity, batch)


def KEYS(c: Config) -> keys.Table:  # here: in Wan-AI/Wan2.1-*-Diffusers/transformer
    return {
        "patch.weight": keys.View("patch_embedding.weight", (c.width, c.channels + c.condition, *c.patch)),
        "patch.bias": "patch_embedding.bias",
        "{time,text}.{up,down}": "condition_embedder.{time_embedder,text_embedder}.{linear_1,linear_2}",
        "offsets": "condition_embedder.time_proj",
        "image.{norm,mlp.up,mlp.down,norm_out,places}":
            "condition_embedder.image_embedder.{norm1,ff.net.0.proj,ff.net.2,norm2,pos_embed}",
        "blocks.*.{self,cross}.{q,k,v,out,span.q,span.k}":
            "blocks.*.{attn1,attn2}.{to_q,to_k,to_v,to_out.0,norm_q,norm_k}",
        "blocks.*.image.{k,v,span.k}": "blocks.*.attn2.{add_k_proj,add_v_proj,norm_added_k}",
        "blocks.*.{offsets,norm,mlp.up,mlp.down}": "blocks.*.{scale_shift_table,norm2,ffn.net.0.proj,ffn.net.2}",
        "head.{offsets,out}": "{scale_shift_table,proj_out}",
    }


def ORIGINAL(c: Config) -> keys.Table:  # here: in Wan-AI/Wan2.1-*, and in adapters for ComfyUI
    return {
        "patch.weight": keys.View("patch_embedding.weight", (c.width, c.channels + c.condition, *c.patch)),
        "patch.bias": "patch_embedding.bias",
        "{time,text}.{up,down}": "{time_embedding,text_embedding}.{0,2}",
        "offsets": "time_projection.1",
        "image.{norm,mlp.up,mlp.down,norm_out,places}": "img_emb.{proj.0,proj.1,proj.3,proj.4,emb_pos}",
        "blocks.*.{self,cross}.{q,k,v,out,span.q,span.k}": "blocks.*.{self_attn,cross_attn}.{q,k,v,o,norm_q,norm_k}",
        "blocks.*.image.{k,v,span.k}": "blocks.*.cross_attn.{k_img,v_img,norm_k_img}",
        "blocks.*.{offsets,norm,mlp.up,mlp.down}": "blocks.*.{modulation,norm3,ffn.0,ffn.2}",
        "head.{offsets,out}": "head.{modulation,head}",
    }


WIDE = r"^time\.|^(blocks\.\d+|head)\.offsets|^(blocks\.\d+|image)\.norm"  # in float32 always, as diffusers keeps them
HUB = {"hidden": "ffn_dim", "heads": "num_attention_heads", "layers": "num_layers", "channels": "out_channels",
       "text": "text_dim", "time": "freq_dim", "positions": "rope_max_seq_len"}
FIXED = {"cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": 1e-6}


def config(hub: dict) -> Config:
    """The Config of a diffusers transformer/config.json."""
    for key, value in FIXED.items():
        if hub.get(key, value) != value:
            raise ValueError(f"{key} is {hub[key]!r} in config.json; wan knows {value!r} only")
    width, image = hub["num_attention_heads"] * hub["attention_head_dim"], hub.get("image_dim")
    condition = hub["in_channels"] - hub["out_channels"]
    if condition < 0:
        raise ValueError(f"in_channels {hub['in_channels']} are fewer than out_channels {hub['out_channels']}")
    if hub.get("added_kv_proj_dim") != (width if image else None):
        raise ValueError(f"added_kv_proj_dim is {hub.get('added_kv_proj_dim')!r} with image_dim {image!r}; wan knows "
                         f"the width {width} with image tokens and null without")
    known = {ours: hub[theirs] for ours, theirs in HUB.items() if theirs in hub}
    return Config(width, condition=condition, image=image or 0, places=hub.get("pos_embed_seq_len") or 0,
                  patch=tuple(hub["patch_size"]), **known)


def hub(c: Config) -> dict:
    """The config.json of a Config."""
    return {"_class_name": "WanTransformer3DModel", "_diffusers_version": "0.42.1", "attention_head_dim": c.k,
            "in_channels": c.channels + c.condition, "patch_size": list(c.patch), "image_dim": c.image or None,
            "added_kv_proj_dim": c.width if c.image else None, "pos_embed_seq_len": c.places or None,
            } | FIXED | {theirs: getattr(c, ours) for ours, theirs in HUB.items()}
