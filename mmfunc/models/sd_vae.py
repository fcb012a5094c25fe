"""The autoencoder of latent diffusion (Rombach et al. 2022, arXiv:2112.10752): of Stable Diffusion, SDXL, SD3, FLUX.

Residual convolutions at falling, then rising resolution, with one attention over all positions in the middle of each
half. A pixel of the latent stands for 8 x 8 pixels of the image.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from mmfunc import diffusion, keys, nn
from mmfunc.tree import Tree


@dataclass(frozen=True)
class Config:
    channels: int = 3  # of an image
    latent: int = 16
    widths: tuple[int, ...] = (128, 256, 512, 512)  # of each resolution
    blocks: int = 2  # of a resolution; one more when decoding
    groups: int = 32
    attention: bool = True
    quant: bool = False  # a 1 x 1 convolution on both sides of the latent
    scale: float = 0.3611
    shift: float = 0.1159
    mean: tuple[float, ...] = ()  # of each latent channel, in place of shift
    std: tuple[float, ...] = ()
    size: int = 1024  # pixels of an image side in training
    upcast: bool = True  # float16 overflows

    @property
    def factor(self) -> int:
        return 2 ** (len(self.widths) - 1)


_SD = Config(latent=4, quant=True, scale=0.18215, shift=0, size=512)
_TINY = Config(widths=(8, 16), blocks=1, groups=4, size=32)
PRESETS = {
    "sd": _SD,
    "sdxl": Config(latent=4, quant=True, scale=0.13025, shift=0),
    "sd3": Config(scale=1.5305, shift=0.0609),
    "flux": Config(),
    "tiny": _TINY,
    "tiny-quant": Config(latent=4, widths=(8, 8, 16), blocks=2, groups=4, quant=True, scale=0.5, shift=0,
                         mean=(0.1, -0.2, 0.3, 0.4), std=(1.5, 0.5, 2.0, 1.0), size=32, upcast=False),
}


def Resnet(d: int, f: int) -> Tree:
    tree = {"norm1": nn.GroupNorm(d), "conv1": nn.Conv(d, f, (3, 3)), "norm2": nn.GroupNorm(f),
            "conv2": nn.Conv(f, f, (3, 3))}
    return tree if d == f else tree | {"skip": nn.Conv(d, f, (1, 1))}


def Middle(c: Config) -> list:
    d = c.widths[-1]
    attention = {"norm": nn.GroupNorm(d), "self": nn.Attention(d, 1, d)}
    return [Resnet(d, d), *([attention] if c.attention else []), Resnet(d, d)]


def Ladder(c: Config, widths: tuple[int, ...], blocks: int, resize: str) -> list:
    """The layers at one resolution after the other."""
    layers, d = [], widths[0]
    for i, f in enumerate(widths):
        layers += [Resnet(d, f), *([Resnet(f, f)] * (blocks - 1))]
        layers += [{resize: nn.Conv(f, f, (3, 3))}] if i < len(widths) - 1 else []
        d = f
    return layers


def params(c: Config) -> Tree:
    first, last, z = c.widths[0], c.widths[-1], c.latent
    out = lambda d, f: {"norm": nn.GroupNorm(d), "conv": nn.Conv(d, f, (3, 3))}
    tree = {
        "encoder": {"in": nn.Conv(c.channels, first, (3, 3)), "down": Ladder(c, c.widths, c.blocks, "down"),
                    "mid": Middle(c), "out": out(last, 2 * z)},
        "decoder": {"in": nn.Conv(z, last, (3, 3)), "mid": Middle(c),
                    "up": Ladder(c, c.widths[::-1], c.blocks + 1, "up"), "out": out(first, c.channels)},
    }
    return tree | ({"quant": nn.Conv(2 * z, 2 * z, (1, 1)), "unquant": nn.Conv(z, z, (1, 1))} if c.quant else {})


def resnet(p: Tree, c: Config, x: Tensor) -> Tensor:
    h = nn.conv(p["conv1"], silu(nn.groupnorm(p["norm1"], x, c.groups)), padding=1)
    h = nn.conv(p["conv2"], silu(nn.groupnorm(p["norm2"], h, c.groups)), padding=1)
    return (nn.conv(p["skip"], x) if "skip" in p else x) + h


def attention(p: Tree, c: Config, x: Tensor) -> Tensor:
    h = nn.groupnorm(p["norm"], x, c.groups).flatten(2).transpose(1, 2)
    h = nn.merge(p["self"], nn.attend(*nn.qkv(p["self"], h, x.shape[1])))
    return x + h.transpose(1, 2).reshape(x.shape)


def out(p: Tree, c: Config, x: Tensor) -> Tensor:
    return nn.conv(p["conv"], silu(nn.groupnorm(p["norm"], x, c.groups)), padding=1)


def block(p: Tree, c: Config, x: Tensor, ctx: Tree) -> Tensor:
    """Any layer: its tree says of which kind it is. [B, C, Y, X] -> [B, C', Y', X']."""
    if "conv1" in p:
        return resnet(p, c, x)
    if "self" in p:
        return attention(p, c, x)
    if "conv" in p:
        return out(p, c, x)
    if "weight" in p:
        return nn.conv(p, x, padding=1)
    return nn.halve(p["down"], x) if "down" in p else nn.double(p["up"], x)


def look(p: Tree, c: Config, batch: dict[str, Tensor]) -> tuple[Tensor, Tree]:
    """batch: pixel_values [B, C, Y, X] in -1..1."""
    x = batch["pixel_values"].to(p["encoder"]["in"]["weight"].dtype)
    if x.shape[-2] % c.factor or x.shape[-1] % c.factor:
        near = " x ".join(str(max(round(n / c.factor), 1) * c.factor) for n in x.shape[-2:])
        raise ValueError(f"an image of {x.shape[-2]} x {x.shape[-1]} pixels: sides must be multiples of {c.factor}, "
                         f"such as {near}")
    return x, {}


def moments(p: Tree, c: Config, x: Tensor, ctx: Tree) -> Tensor:
    """Mean and log variance of the latents, [B, 2C, Y, X]."""
    return nn.conv(p["quant"], x) if c.quant else x


def begin(p: Tree, c: Config, batch: dict[str, Tensor]) -> tuple[Tensor, Tree]:
    """batch: latents [B, C, Y, X]."""
    z = batch["latents"]
    return nn.conv(p["unquant"], z) if c.quant else z, {}


def between(p: Tree, c: Config, x: Tensor, ctx: Tree) -> tuple[Tensor, Tree]:
    """From the encoder to the decoder, through the mean."""
    return begin(p, c, {"latents": moments(p, c, x, ctx).chunk(2, 1)[0]})


def head(p: Tree, c: Config, x: Tensor, ctx: Tree) -> Tensor:
    """Pixels [B, C, Y, X]."""
    return x


ENCODER = tuple((f"encoder.{name}", block) for name in ("in", "down", "mid", "out"))
DECODER = tuple((f"decoder.{name}", block) for name in ("in", "mid", "up", "out"))
encode_forward = nn.Chain(look, ENCODER, moments)
decode_forward = nn.Chain(begin, DECODER, head)
forward = nn.Chain(look, (*ENCODER, between, *DECODER), head)  # pixel_values -> pixels, through the mean


def encode(p: Tree, c: Config, pixels: Tensor, *, tile: int | None = None,
           overlap: int | None = None) -> tuple[Tensor, Tensor]:
    """Pixels [B, C, Y, X] in -1..1 -> mean and log variance of the latents [B, C', Y / 8, X / 8]; tiles as nn.tiled."""
    run = lambda x: encode_forward(p, c, {"pixel_values": x})
    mean, logvar = nn.tiled(run, look(p, c, {"pixel_values": pixels})[0], tile, overlap, reduce=c.factor).chunk(2, 1)
    return mean, logvar.clamp(-30, 20)


def decode(p: Tree, c: Config, latents: Tensor, *, tile: int | None = None, overlap: int | None = None) -> Tensor:
    """Latents [B, C', Y, X] -> pixels [B, C, 8Y, 8X]; tiles as nn.tiled, in pixels."""
    run = lambda z: decode_forward(p, c, {"latents": z})
    return nn.tiled(run, latents, tile, overlap, enlarge=c.factor)


def _spread(c: Config, z: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """What is subtracted from latents, and what they are divided by."""
    table = lambda values: torch.tensor(values, dtype=z.dtype, device=z.device).view(-1, 1, 1)
    return table(c.mean) if c.mean else c.shift, (table(c.std) if c.std else 1.0) / c.scale


def normalise(c: Config, z: Tensor) -> Tensor:
    """Latents [B, C, Y, X] as diffusion models take them."""
    centre, width = _spread(c, z)
    return (z - centre) / width


def restore(c: Config, z: Tensor) -> Tensor:
    """The inverse of normalise."""
    centre, width = _spread(c, z)
    return z * width + centre


def loss(p: Tree, c: Config, batch: dict[str, Tensor]) -> Tensor:
    """Error of pixel_values [B, C, Y, X] decoded from the mean of their latents, as diffusion.mean_error has it."""
    return diffusion.mean_error(forward(p, c, batch), batch["pixel_values"], batch)


def KEYS(c: Config) -> keys.Table:  # here: in the vae folder of the diffusers pipelines
    table = {"{encoder,decoder}.{in,out.norm,out.conv}": "{encoder,decoder}.{conv_in,conv_norm_out,conv_out}",
             "{quant,unquant}": "{quant_conv,post_quant_conv}"}
    names = {f"{side}.mid.{2 * i if c.attention else i}": f"{side}.mid_block.resnets.{i}"
             for side in ("encoder", "decoder") for i in (0, 1)}
    for ours, theirs, resize, n in (("encoder.down", "encoder.down_blocks", "down", c.blocks),
                                    ("decoder.up", "decoder.up_blocks", "up", c.blocks + 1)):
        for i in range(len(c.widths)):
            at = i * (n + 1)
            names |= {f"{ours}.{at + j}": f"{theirs}.{i}.resnets.{j}" for j in range(n)}
            table[f"{ours}.{at + n}.{resize}"] = f"{theirs}.{i}.{resize}samplers.0.conv"
    skips = {f"{a}.skip": f"{b}.conv_shortcut" for a, b in names.items()}
    attention = {"{encoder,decoder}.mid.1.{norm,self.q,self.k,self.v,self.out}":
                 "{encoder,decoder}.mid_block.attentions.0.{group_norm,to_q,to_k,to_v,to_out.0}"}
    return table | names | skips | (attention if c.attention else {})


SPELLINGS = {f"{side}.mid_block.attentions.0.{old}.": f"{side}.mid_block.attentions.0.{new}."  # of 2022: of today
             for side in ("encoder", "decoder")
             for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))}

HUB = {"channels": "in_channels", "latent": "latent_channels", "widths": "block_out_channels", "quant":
       "use_quant_conv", "blocks": "layers_per_block", "groups": "norm_num_groups", "scale": "scaling_factor",
       "attention": "mid_block_add_attention", "size": "sample_size", "upcast": "force_upcast"}
DEFAULTS = {"in_channels": 3, "latent_channels": 4, "block_out_channels": (64,), "use_quant_conv": True,
            "layers_per_block": 1, "norm_num_groups": 32, "scaling_factor": 0.18215, "mid_block_add_attention": True,
            "sample_size": 32, "force_upcast": True}  # of diffusers, where a config.json is silent


def config(hub: dict) -> Config:
    """The Config of a config.json."""
    said = DEFAULTS | hub
    for name, allowed in (("act_fn", "silu"), ("out_channels", said["in_channels"]),
                          ("use_post_quant_conv", said["use_quant_conv"]),
                          ("down_block_types", ["DownEncoderBlock2D"] * len(said["block_out_channels"])),
                          ("up_block_types", ["UpDecoderBlock2D"] * len(said["block_out_channels"]))):
        if name in hub and hub[name] != allowed:
            raise ValueError(f"{name} {hub[name]!r} is not supported; sd_vae takes {allowed!r}")
    own: dict[str, Any] = {ours: said[theirs] for ours, theirs in HUB.items()} | {"widths": tuple(said[HUB["widths"]])}
    own |= {"mean": tuple(said.get("latents_mean") or ()), "std": tuple(said.get("latents_std") or ())}
    return Config(**own, shift=said.get("shift_factor") or 0)


def hub(c: Config) -> dict:
    """The config.json of a Config."""
    n = len(c.widths)
    return {"_class_name": "AutoencoderKL", "act_fn": "silu", "out_channels": c.channels,
            "down_block_types": ["DownEncoderBlock2D"] * n, "up_block_types": ["UpDecoderBlock2D"] * n,
            "use_post_quant_conv": c.quant, "shift_factor": c.shift or None, "latents_mean": list(c.mean) or None,
            "latents_std": list(c.std) or None,
            } | {theirs: getattr(c, ours) for ours, theirs in HUB.items()} | {HUB["widths"]: list(c.widths)}
