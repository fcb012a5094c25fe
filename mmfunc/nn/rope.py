"""Rotary position embedding (Su et al. 2021): angles from positions, then one rotation."""

import torch
from torch import Tensor

from mmfunc import kernels, shard
from mmfunc.tree import Tree


def _freqs(width: int, theta: float, device: torch.device) -> Tensor:
    """One frequency for each of width / 2 pairs of channels, float32."""
    return 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.int64, device=device).float() / width)


def axial(ids: Tensor, widths: tuple[int, ...], theta: float = 10000.0) -> Tensor:
    """Angles of positions on several axes, one width each. ids [..., A] -> [..., sum(widths) / 2]."""
    return torch.cat([ids[..., i, None].float() * _freqs(w, theta, ids.device) for i, w in enumerate(widths)], -1)


def sections(ids: Tensor, width: int, parts: tuple[int, ...], theta: float) -> Tensor:
    """Angles whose channels read different axes in turn (mrope). ids [A, B, S] -> [B, S, width / 2]."""
    angles = ids[..., None].float() * _freqs(width, theta, ids.device)
    return torch.cat([angles[i % len(ids), ..., a : a + n]
                      for i, (a, n) in enumerate(zip([sum(parts[:j]) for j in range(len(parts))], parts))], -1)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate each channel with the one half a head further. x [..., S, H, K], angles [..., S, K/2] of whole rows."""
    angles = angles if shard.block() is None else shard.local(angles, -2)
    if (turned := kernels.fused("rotate", x, angles)) is not None:
        return turned
    cos, sin = angles.cos().unsqueeze(-2), angles.sin().unsqueeze(-2)
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def unpaired(p: Tree, k: int) -> Tree:
    """Attention maps of a model that rotates neighbouring channels, whose queries and keys have the even channels of a
    head before the odd ones: scores stay, and what is rotated together lies half a head apart, which a compiler can
    vectorise."""
    move = lambda t: t.unflatten(0, (-1, k // 2, 2)).transpose(1, 2).flatten(0, 2)
    moved = lambda m: {n: m[n] if n in ("lora_a", "lora_scale") else move(m[n]) for n in m}
    both = lambda m: m | {n: moved(m[n]) for n in ("q", "k")}
    return both(p) | {n: both(p[n]) for n in ("norm", "span") if n in p}
