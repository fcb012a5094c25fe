"""FLUX.1: a rectified-flow transformer over image latents (Black Forest Labs 2024), and FLUX.1 Kontext, which reads
reference images as more tokens (arXiv:2506.15742).

Text and image tokens attend jointly: first as two streams with their own weights, then as one stream whose attention
and MLP run in parallel. The timestep, the guidance strength and a pooled text vector modulate every block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad, silu

from mmfunc import diffusion, keys, nn
from mmfunc.tree import Tree

PATCH = 2, 2  # of a latent


@dataclass(frozen=True)
class Config:
    width: int = 3072
    heads: int = 24
    layers: int = 19  # of two streams
    single: int = 38  # of one stream
    channels: int = 16  # of the latent
    text: int = 4096  # width of the text tokens
    pooled: int = 768  # width of the pooled text
    guidance: bool = True  # the strength of guidance is an input
    axes: tuple[int, ...] = (16, 56, 56)  # channels of a head that read kind, row, column

    @property
    def k(self) -> int:
        return self.width // self.heads


_TINY = {"width": 32, "heads": 2, "layers": 2, "single": 2, "text": 24, "pooled": 12, "axes": (4, 6, 6)}
PRESETS = {
    "dev": Config(),
    "schnell": Config(guidance=False),
    "kontext": Config(),
    "tiny": Config(**_TINY),
    "tiny-schnell": Config(**_TINY, guidance=False),
}

_RUN = {"kind": "FluxPipeline", "vae": "sd_vae:flux", "text": ("clip:text-l", "t5:t5-v1.1-xxl"), "length": 512,
        "steps": 28, "guidance": 3.5, "strength": 0.6, "size": (1024, 1024),
        "sampler": ("flow_euler", {"shift": 3.0, "use_dynamic_shifting": True})}
_SIDES = (672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104)
PARTS = {  # what a preset goes with, and how it is run
    "dev": _RUN,
    "schnell": _RUN | {"length": 256, "steps": 4, "guidance": None, "sampler": ("flow_euler", {"shift": 1.0})},
    "kontext": _RUN | {"kind": "FluxKontextPipeline", "guidance": 2.5,
                       "references": (*_SIDES, (1024, 1024), *((b, a) for a, b in _SIDES))},  # of training; sizes too
}


def params(c: Config) -> Tree:
    d = c.width
    attention, mlp = nn.Attention(d, c.heads, c.k, norm="head"), nn.MLP(d, 4 * d)
    stream = {"offsets": nn.Linear(d, 6 * d, std=0), "attention": attention, "mlp": mlp}
    down = nn.Linear(4 * d, d, "mlp -> embed", bias=False)  # its bias is that of attention.out
    tree = {
        "image": nn.Linear(4 * c.channels, d),
        "text": nn.Linear(c.text, d),
        "time": nn.MLP(256, d, d),
        "pooled": nn.MLP(c.pooled, d, d),
        "double": [{"image": stream, "text": stream}] * c.layers,
        "single": [{"offsets": nn.Linear(d, 3 * d, std=0), "attention": attention,
                    "mlp": mlp | {"down": down}}] * c.single,
        "head": {"offsets": nn.Linear(d, 2 * d, std=0), "out": nn.Linear(d, 4 * c.channels, std=0)},
    }
    return tree | {"guidance": nn.MLP(256, d, d)} if c.guidance else tree


def ids(rows: int, columns: int, kind: int = 0, device: torch.device | None = None) -> Tensor:
    """Positions of a grid of patches, [rows * columns, 3]: kind (0 the image, 1, 2, ... references), row, column."""
    return pad(nn.grid((rows, columns), device), (1, 0), value=kind)


def embed(p: Tree, c: Config, batch: dict[str, Tensor]) -> tuple[tuple[Tensor, Tensor], Tree]:
    """batch: hidden_states [B, S, 64] (patches of latents), img_ids [S, 3] (see ids), timestep [B] in 0..1,
    encoder_hidden_states [B, L, text], pooled_projections [B, pooled], where the model has it guidance [B]; optional
    txt_ids [L, 3], zeros where absent."""
    dtype = p["image"]["weight"].dtype
    x = nn.linear(p["image"], batch["hidden_states"].to(dtype))
    text = nn.linear(p["text"], batch["encoder_hidden_states"].to(dtype))
    places, words = batch.get("img_ids"), batch.get("txt_ids")
    if places is None:
        raise ValueError("the batch has no img_ids [S, 3]; flux.ids(rows, columns) gives those of a grid of patches")
    words = places.new_zeros(text.shape[1], 3) if words is None else words
    angles = nn.axial(torch.cat([words.to(places.dtype), places]), c.axes)
    return (text, x), {"vector": vector(p, c, batch, dtype), "angles": angles, "words": text.shape[1]}


def vector(p: Tree, c: Config, batch: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """What modulates every block, [B, D]: time, guidance and pooled text."""
    if (batch.get("guidance") is not None) != c.guidance:
        raise ValueError("this model needs guidance [B], such as 3.5" if c.guidance else
                         "this model has no guidance, but the batch has")
    # numbers are rounded to the dtype of the weights before they are scaled: so they were in training
    number = lambda t: nn.sinusoid(1000 * t.to(dtype), 256).to(dtype)
    out = nn.mlp(p["time"], number(batch["timestep"]))
    out = out + nn.mlp(p["guidance"], number(batch["guidance"])) if c.guidance else out
    return out + nn.mlp(p["pooled"], batch["pooled_projections"].to(dtype))


def offsets(p: Tree, ctx: Tree, n: int) -> tuple[Tensor, ...]:
    """n modulation vectors [B, 1, D], float32."""
    return nn.linear(p, silu(ctx["vector"]))[:, None].float().chunk(n, -1)


def attend(q: Tensor, k: Tensor, v: Tensor, ctx: Tree) -> Tensor:
    """Attention of all tokens under their positions."""
    return nn.attend(nn.rotate(q, ctx["angles"]), nn.rotate(k, ctx["angles"]), v)


def double(p: Tree, c: Config, x: tuple[Tensor, Tensor], ctx: Tree) -> tuple[Tensor, Tensor]:
    """Two streams with their own weights and one joint attention."""
    streams = [(p[n], h, offsets(p[n]["offsets"], ctx, 6)) for n, h in zip(("text", "image"), x)]
    parts = [nn.qkv(nn.unpaired(s["attention"], c.k), nn.adaln(h, m[0], m[1]), c.k) for s, h, m in streams]
    heads = nn.joint(parts, lambda q, k, v: attend(q, k, v, ctx))
    out = []
    for (s, h, m), y in zip(streams, heads):
        h = nn.gated(h, nn.merge(s["attention"], y), m[2])
        out.append(nn.gated(h, nn.mlp(s["mlp"], nn.adaln(h, m[3], m[4]), nn.gelu_tanh), m[5]))
    return tuple(out)


def join(p: Tree, c: Config, x: tuple[Tensor, Tensor], ctx: Tree) -> tuple[Tensor, Tree]:
    """Text and image tokens as one stream."""
    return torch.cat(x, 1), ctx


def single(p: Tree, c: Config, x: Tensor, ctx: Tree) -> Tensor:
    """One stream; attention and MLP side by side."""
    shift, scale, gate = offsets(p["offsets"], ctx, 3)
    y = nn.adaln(x, shift, scale)
    heads = attend(*nn.qkv(nn.unpaired(p["attention"], c.k), y, c.k), ctx)
    return nn.gated(x, nn.merge(p["attention"], heads) + nn.mlp(p["mlp"], y, nn.gelu_tanh), gate)


def head(p: Tree, c: Config, x: Tensor, ctx: Tree) -> Tensor:
    """The velocity of the patches, [B, S, 64]."""
    scale, shift = offsets(p["head"]["offsets"], ctx, 2)
    return nn.linear(p["head"]["out"], nn.adaln(x[:, ctx["words"] :], shift, scale))


forward = nn.Chain(embed, (("double", double), join, ("single", single)), head)


def predict(p: Tree, c: Config, x: Tensor, t: Tensor, cond: dict) -> Tensor:
    """The velocity like x [B, C, Y, X], latents with noise of level t [B] in [0, 1].

    cond: what forward reads besides; for Kontext image_latents, a list of reference latents [B, C, Y', X'], whose
    patches follow those of x. The n-th has n as its first position: diffusers' pipeline, which takes one, gives it 1;
    the paper counts on.
    """
    images = [x, *(() if cond.get("image_latents") is None else cond["image_latents"])]
    for y in images:
        if y.ndim != 4 or y.shape[1] != c.channels or y.shape[2] % 2 or y.shape[3] % 2:
            raise ValueError(f"latents are {list(y.shape)}; they must be [B, {c.channels}, Y, X] with even Y and X")
    patches = torch.cat([nn.patchify(y.to(x.dtype), PATCH) for y in images], 1)
    places = torch.cat([ids(y.shape[2] // 2, y.shape[3] // 2, n, x.device) for n, y in enumerate(images)])
    batch = {k: v for k, v in cond.items() if k != "image_latents"}
    y = forward(p, c, batch | {"hidden_states": patches, "img_ids": places, "timestep": t})
    shape = x.shape[2] // 2, x.shape[3] // 2
    y = y[:, : shape[0] * shape[1]].unflatten(-1, (c.channels, -1)).transpose(-1, -2).flatten(-2)
    return nn.unpatchify(y, shape, PATCH).to(x.dtype)


def loss(p: Tree, c: Config, batch: dict) -> Tensor:
    """Mean squared error of the velocity. batch: latents and noise [B, C, Y, X], t [B], what predict reads; optional
    weight [B] and num_items_in_batch."""
    x, velocity = diffusion.blend(batch["latents"], batch["noise"], batch["t"])
    return diffusion.mean_error(predict(p, c, x, batch["t"], batch), velocity, batch)


KEYS = {  # here: in black-forest-labs/FLUX.1-*/transformer
    "{image,text}": "{x_embedder,context_embedder}",
    "{time,guidance,pooled}.{up,down}":
        "time_text_embed.{timestep_embedder,guidance_embedder,text_embedder}.{linear_1,linear_2}",
    "double.*.{image,text}.offsets": "transformer_blocks.*.{norm1,norm1_context}.linear",
    "double.*.image.attention.{q,k,v,out,norm.q,norm.k}":
        "transformer_blocks.*.attn.{to_q,to_k,to_v,to_out.0,norm_q,norm_k}",
    "double.*.text.attention.{q,k,v,out,norm.q,norm.k}":
        "transformer_blocks.*.attn.{add_q_proj,add_k_proj,add_v_proj,to_add_out,norm_added_q,norm_added_k}",
    "double.*.{image,text}.mlp.{up,down}": "transformer_blocks.*.{ff,ff_context}.net.{0.proj,2}",
    "single.*.{offsets,mlp.up}": "single_transformer_blocks.*.{norm.linear,proj_mlp}",
    "single.*.attention.{q,k,v,norm.q,norm.k}": "single_transformer_blocks.*.attn.{to_q,to_k,to_v,norm_q,norm_k}",
    "single.*.{attention.out,mlp.down}.weight": keys.Cut("single_transformer_blocks.*.proj_out.weight", dim=1),
    "single.*.attention.out.bias": "single_transformer_blocks.*.proj_out.bias",
    "head.{offsets,out}": "{norm_out.linear,proj_out}",
}

HUB = {"heads": "num_attention_heads", "layers": "num_layers", "single": "num_single_layers",
       "text": "joint_attention_dim", "pooled": "pooled_projection_dim", "guidance": "guidance_embeds"}


def config(hub: dict) -> Config:
    """The Config of a diffusers transformer/config.json."""
    width, channels = hub["num_attention_heads"] * hub["attention_head_dim"], hub["in_channels"] // 4
    if hub.get("patch_size", 1) != 1:
        raise ValueError(f"patch_size is {hub['patch_size']!r} in config.json; flux knows 1 only (packed latents)")
    if hub.get("out_channels") not in (None, 4 * channels) or hub["in_channels"] % 4:
        raise ValueError(f"in_channels {hub['in_channels']} with out_channels {hub.get('out_channels')!r}; flux knows "
                         "equal ones, a multiple of 4 (no Fill, Canny or Depth)")
    axes = tuple(hub.get("axes_dims_rope", Config.axes))
    if sum(axes) != hub["attention_head_dim"]:
        raise ValueError(f"axes_dims_rope {axes} do not add up to attention_head_dim {hub['attention_head_dim']}")
    return Config(width, channels=channels, axes=axes, **{a: hub[b] for a, b in HUB.items() if b in hub})


def hub(c: Config) -> dict:
    """The config.json of a Config."""
    return {"_class_name": "FluxTransformer2DModel", "_diffusers_version": "0.42.1", "attention_head_dim": c.k,
            "patch_size": 1, "in_channels": 4 * c.channels, "out_channels": None, "axes_dims_rope": list(c.axes),
            } | {theirs: getattr(c, ours) for ours, theirs in HUB.items()}
