"""The video autoencoder of Wan2.1 (Wan Team 2025, arXiv:2503.20314): causal in time, so that it runs as a stream.

A latent stands for 8 x 8 pixels of 4 frames, the first one for those of the first frame alone. Between chunks of a
video each convolution remembers the last frames that it saw; the first chunk starts from a cache of empty entries.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, silu

from mmfunc import diffusion, keys, nn
from mmfunc.tree import Param, Tree, ones

MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508, 0.4134, -0.0715, 0.5517, -0.3632, -0.1922,
        -0.9497, 0.2503, -0.2921)
STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253,
       2.8251, 1.9160)


@dataclass(frozen=True)
class Config:
    channels: int = 3  # of a video
    latent: int = 16
    width: int = 96
    decoder: int | None = None  # the decoder's width, if it is another
    multiples: tuple[int, ...] = (1, 2, 4, 4)  # of the width, at each resolution
    blocks: int = 2  # of a resolution; one more when decoding
    time: tuple[bool, ...] = (False, True, True)  # which halvings of the resolution halve the frames too
    mean: tuple[float, ...] = MEAN  # of each latent channel
    std: tuple[float, ...] = STD

    @property
    def factor(self) -> int:  # pixels of a latent, each way
        return 2 ** (len(self.multiples) - 1)

    @property
    def frames(self) -> int:  # of a latent
        return 2 ** sum(self.time)


PRESETS = {"2.1": Config(), "tiny": Config(width=8, latent=4, blocks=1, mean=MEAN[:4], std=STD[:4])}


def Norm(d: int, axes: int) -> Tree:
    """Scale of d channels, over so many axes."""
    return {"weight": Param((d, *[1] * axes), " ".join("_" * (1 + axes)), ones)}


def Resnet(d: int, f: int) -> Tree:
    skip = {} if d == f else {"skip": nn.Conv(d, f, (1, 1, 1))}
    conv1, conv2 = nn.Conv(d, f, (3, 3, 3)), nn.Conv(f, f, (3, 3, 3))
    return {"norm1": Norm(d, 3), "conv1": conv1, "norm2": Norm(f, 3), "conv2": conv2} | skip


def Middle(d: int) -> list:
    return [Resnet(d, d), {"norm": Norm(d, 2), "qkv": nn.Conv(d, 3 * d, (1, 1)), "out": nn.Conv(d, d, (1, 1))},
            Resnet(d, d)]


def Ladder(d: int, widths: list[int], blocks: int, time: tuple[bool, ...], resize: str) -> list:
    """The layers at one resolution after the other; `up` halves the channels too."""
    layers = []
    for f, also in zip(widths, (*time, None)):
        layers += [Resnet(d, f), *([Resnet(f, f)] * (blocks - 1))]
        d, wide = (f, f) if resize == "down" else (f // 2, 2 * f)
        if also is not None:
            layers.append({resize: nn.Conv(f, d, (3, 3))} | ({"time": nn.Conv(f, wide, (3, 1, 1))} if also else {}))
    return layers


def params(c: Config) -> Tree:
    three, one, z = (3, 3, 3), (1, 1, 1), c.latent
    narrow, wide = ([w * m for m in c.multiples] for w in (c.width, c.decoder or c.width))
    last = lambda d, f: {"norm": Norm(d, 3), "conv": nn.Conv(d, f, three)}
    return {
        "encoder": {"in": nn.Conv(c.channels, c.width, three), "mid": Middle(narrow[-1]),
                    "down": Ladder(c.width, narrow, c.blocks, c.time, "down"), "out": last(narrow[-1], 2 * z)},
        "quant": nn.Conv(2 * z, 2 * z, one), "unquant": nn.Conv(z, z, one),
        "decoder": {"in": nn.Conv(z, wide[-1], three), "mid": Middle(wide[-1]), "out": last(wide[0], c.channels),
                    "up": Ladder(wide[-1], wide[::-1], c.blocks + 1, c.time[::-1], "up")},
    }


def norm(p: Tree, x: Tensor) -> Tensor:
    """Divide each position by the root mean square of its channels, in float32. [B, C, T, Y, X] -> the same."""
    return (p["weight"].float().view(-1, 1, 1, 1) * x.shape[1] ** 0.5 * normalize(x.float(), dim=1)).to(x.dtype)


def resnet(p: Tree, x: Tensor, past: Tree) -> tuple[Tensor, Tree]:
    h, first = nn.causal(p["conv1"], silu(norm(p["norm1"], x)), past.get("conv1"))
    h, second = nn.causal(p["conv2"], silu(norm(p["norm2"], h)), past.get("conv2"))
    return (nn.conv(p["skip"], x) if "skip" in p else x) + h, {"conv1": first, "conv2": second}


def attention(p: Tree, x: Tensor, past: Tree) -> tuple[Tensor, Tree]:
    """Within each frame."""
    dense = lambda name, x: nn.linear({**p[name], "weight": p[name]["weight"].flatten(1)}, x)
    h = norm(p["norm"], x).permute(0, 2, 3, 4, 1)
    q, k, v = dense("qkv", h.flatten(0, 1).flatten(1, 2)).unflatten(-1, (3, 1, -1)).unbind(2)
    h = dense("out", nn.attend(q, k, v).flatten(2)).view(h.shape)
    return x + h.permute(0, 4, 1, 2, 3), {}


def down(p: Tree, x: Tensor, past: Tree) -> tuple[Tensor, Tree]:
    """Halve the sides, and perhaps the frames."""
    x, later = nn.halve(p["down"], x), {}
    if "time" in p:
        x, later["time"] = nn.halve_frames(p["time"], x, past.get("time"))
    return x, later


def up(p: Tree, x: Tensor, past: Tree) -> tuple[Tensor, Tree]:
    """Double the sides, and perhaps the frames."""
    later = {}
    if "time" in p:
        x, later["time"] = nn.double_frames(p["time"], x, past.get("time"))
    return nn.double(p["up"], x), later


def edge(p: Tree, x: Tensor, past: Tree) -> tuple[Tensor, Tree]:
    """The first convolution, or the last one behind its norm."""
    p, x = (p["conv"], silu(norm(p["norm"], x))) if "norm" in p else (p, x)
    x, later = nn.causal(p, x, past.get("conv"))
    return x, {"conv": later}


KINDS = {"conv1": resnet, "qkv": attention, "down": down, "up": up, "conv": edge, "weight": edge}


def block(p: Tree, c: Config, x: Tensor, ctx: Tree, entry: Tree | None = None) -> Any:
    """Any layer: its tree says of which kind it is. [B, C, T, Y, X] -> [B, C', T', Y', X'], and what it remembers."""
    kind = next(fn for name, fn in KINDS.items() if name in p)
    x, later = kind(p, x, entry or {})
    return x if entry is None else (x, later)


def look(p: Tree, c: Config, batch: dict[str, Tensor]) -> tuple[Tensor, Tree]:
    """batch: pixel_values [B, C, T, Y, X] in -1..1."""
    return batch["pixel_values"].to(p["encoder"]["in"]["weight"].dtype), {}


def moments(p: Tree, c: Config, x: Tensor, ctx: Tree) -> Tensor:
    """Mean and log variance of the latents, [B, 2C, T, Y, X]."""
    return nn.conv(p["quant"], x)


def begin(p: Tree, c: Config, batch: dict[str, Tensor]) -> tuple[Tensor, Tree]:
    """batch: latents [B, C, T, Y, X]."""
    return nn.conv(p["unquant"], batch["latents"]), {}


def between(p: Tree, c: Config, x: Tensor, ctx: Tree) -> tuple[Tensor, Tree]:
    """From the encoder to the decoder, through the mean."""
    return begin(p, c, {"latents": moments(p, c, x, ctx).chunk(2, 1)[0]})


ENCODER = tuple((f"encoder.{name}", block) for name in ("in", "down", "mid", "out"))
DECODER = tuple((f"decoder.{name}", block) for name in ("in", "mid", "up", "out"))
encode_forward = nn.Chain(look, ENCODER, moments)
decode_forward = nn.Chain(begin, DECODER, lambda p, c, x, ctx: x)  # not yet clamped to -1..1
forward = nn.Chain(look, (*ENCODER, between, *DECODER), decode_forward.head)  # pixels -> pixels, through the mean


def cache(chain: nn.Chain, p: Tree, c: Config) -> dict[str, Tree]:
    """What the layers of a Chain remember before the first frame: nothing."""
    return {path: {} for path, _ in chain.steps(p, c) if path}


def check(c: Config, x: Tensor) -> None:
    """A video [B, C, T, Y, X] whose latents would not be of its size is a ValueError."""
    t, y, x = x.shape[2:]
    if (t - 1) % c.frames:
        less = max(t - 1, 0) // c.frames * c.frames + 1
        raise ValueError(f"a video of {t} frames: it must have {c.frames}k + 1, such as {less} or {less + c.frames}")
    if y % c.factor or x % c.factor:
        near = " x ".join(str(max(round(n / c.factor), 1) * c.factor) for n in (y, x))
        raise ValueError(f"a video of {y} x {x} pixels: sides must be multiples of {c.factor}, such as {near}")


def _stream(chain: nn.Chain, p: Tree, c: Config, name: str, x: Tensor, size: int | None) -> Iterator[Tensor]:
    """A Chain over the first frame, then over `size` frames at a time; None: over all at once, without a cache."""
    if size is None:
        yield chain(p, c, {name: x})
        return
    memory = cache(chain, p, c)
    for part in (x[:, :, :1], *(x[:, :, 1:].split(size, 2) if x.shape[2] > 1 else ())):
        memory = nn.Once(memory)
        y, memory = chain(p, c, {name: part}, memory)
        yield y


def decode_step(p: Tree, c: Config, latents: Tensor, memory: dict[str, Tree]) -> tuple[Tensor, dict[str, Tree]]:
    """The next latents of a video: (their pixels, the memory for the next call); cache() is the first memory."""
    y, memory = decode_forward(p, c, {"latents": latents}, memory)
    return y.clamp(-1, 1), memory


def _split(y: Tensor) -> tuple[Tensor, Tensor]:
    mean, logvar = y.chunk(2, 1)
    return mean, logvar.clamp(-30, 20)


def encode_stream(p: Tree, c: Config, pixels: Tensor, *, chunk: int | None = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """Pixels [B, C, 4k + 1, Y, X] in -1..1 -> (mean, log variance) of the first latent, then of `chunk` at a time."""
    check(c, pixels)
    yield from map(_split, _stream(encode_forward, p, c, "pixel_values", pixels, chunk and chunk * c.frames))


def decode_stream(p: Tree, c: Config, latents: Tensor, *, chunk: int | None = 1) -> Iterator[Tensor]:
    """Latents [B, C', T, Y, X] -> pixels [B, C, 1, 8Y, 8X] of the first, then [B, C, 4 chunk, 8Y, 8X] at a time."""
    yield from (y.clamp(-1, 1) for y in _stream(decode_forward, p, c, "latents", latents, chunk))


def encode(p: Tree, c: Config, pixels: Tensor, *, chunk: int | None = 1, tile: int | None = None,
           overlap: int | None = None) -> tuple[Tensor, Tensor]:
    """Pixels [B, C, 4k + 1, Y, X] in -1..1 -> mean and log variance of the latents [B, C', k + 1, Y / 8, X / 8].

    chunk: latents at a time, None for all at once without a cache (for training); tiles as nn.tiled.
    """
    check(c, pixels)
    run = lambda x: nn.joined(_stream(encode_forward, p, c, "pixel_values", x, chunk and chunk * c.frames),
                            x.shape[2] // c.frames + 1)
    return _split(nn.tiled(run, pixels, tile, overlap, reduce=c.factor))


def decode(p: Tree, c: Config, latents: Tensor, *, chunk: int | None = 1, tile: int | None = None,
           overlap: int | None = None) -> Tensor:
    """Latents [B, C', T, Y, X] -> pixels [B, C, 4T - 3, 8Y, 8X] in -1..1; chunk and tiles as encode."""
    run = lambda z: nn.joined(_stream(decode_forward, p, c, "latents", z, chunk), c.frames * (z.shape[2] - 1) + 1)
    return nn.tiled(run, latents, tile, overlap, enlarge=c.factor).clamp_(-1, 1)


def _table(values: tuple[float, ...], z: Tensor) -> Tensor:
    return torch.tensor(values, dtype=z.dtype, device=z.device).view(-1, 1, 1, 1)


def normalise(c: Config, z: Tensor) -> Tensor:
    """Latents [B, C, T, Y, X] as diffusion models take them."""
    return (z - _table(c.mean, z)) / _table(c.std, z)


def restore(c: Config, z: Tensor) -> Tensor:
    """The inverse of normalise."""
    return z * _table(c.std, z) + _table(c.mean, z)


def loss(p: Tree, c: Config, batch: dict[str, Tensor]) -> Tensor:
    """Error of pixel_values [B, C, T, Y, X] decoded, without clamping, from the mean of their latents, as
    diffusion.mean_error has it."""
    check(c, batch["pixel_values"])
    return diffusion.mean_error(forward(p, c, batch), batch["pixel_values"], batch)


def KEYS(c: Config) -> keys.Table:  # here: in the vae folder of Wan-AI/Wan2.1-*-Diffusers
    ours = "norm.weight,norm1.weight,norm2.weight,conv1,conv2,skip,qkv,out,down,up,time"
    theirs = "norm.gamma,norm1.gamma,norm2.gamma,conv1,conv2,conv_shortcut,to_qkv,proj,resample.1,resample.1,time_conv"
    layers, n = {"encoder.down.*": "encoder.down_blocks.*", "{encoder,decoder}.mid.{0,1,2}":
                 "{encoder,decoder}.mid_block.{resnets.0,attentions.0,resnets.1}"}, c.blocks + 1
    names = [*(f"resnets.{j}" for j in range(n)), "upsamplers.0"]
    for at in range(len(c.multiples) * (n + 1)):
        layers[f"decoder.up.{at}"] = f"decoder.up_blocks.{at // (n + 1)}.{names[at % (n + 1)]}"
    return {f"{a}.{{{ours}}}": f"{b}.{{{theirs}}}" for a, b in layers.items()} | {
        "{encoder,decoder}.{in,out.norm.weight,out.conv}": "{encoder,decoder}.{conv_in,norm_out.gamma,conv_out}",
        "{quant,unquant}": "{quant_conv,post_quant_conv}"}


HUB = {"channels": "in_channels", "latent": "z_dim", "width": "base_dim", "decoder": "decoder_base_dim",
       "multiples": "dim_mult", "blocks": "num_res_blocks", "time": "temperal_downsample", "mean": "latents_mean",
       "std": "latents_std"}


def config(hub: dict) -> Config:
    """The Config of a config.json."""
    for name, allowed in (("is_residual", False), ("patch_size", None), ("attn_scales", []), ("dropout", 0.0),
                          ("out_channels", hub.get("in_channels", 3))):
        if hub.get(name, allowed) != allowed:
            raise ValueError(f"{name} {hub[name]!r} is not supported; wan_vae (of Wan2.1) takes {allowed!r}")
    fixed = lambda v: tuple(v) if isinstance(v, list) else v
    return Config(**{ours: fixed(hub[theirs]) for ours, theirs in HUB.items() if theirs in hub})


def hub(c: Config) -> dict:
    """The config.json of a Config."""
    said = {theirs: getattr(c, ours) for ours, theirs in HUB.items()}
    return {"_class_name": "AutoencoderKLWan", "attn_scales": [], "dropout": 0.0, "is_residual": False,
            "out_channels": c.channels, "patch_size": None, "scale_factor_spatial": c.factor,
            "scale_factor_temporal": c.frames} | {k: list(v) if isinstance(v, tuple) else v for k, v in said.items()}
