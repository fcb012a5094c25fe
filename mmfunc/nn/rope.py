"""Rotary position embedding (Su et al. 2021): angles from positions, then one rotation."""

import torch
from torch import Tensor

from mmfunc import shard


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


def rotate(x: Tensor, angles: Tensor, *, halves: bool = False) -> Tensor:
    """Rotate pairs of channels: neighbours, or the two halves. x [..., S, H, K], angles [..., S, K/2] of whole rows."""
    angles = angles if shard.block() is None else shard.local(angles, -2)
    cos, sin = angles.cos().unsqueeze(-2), angles.sin().unsqueeze(-2)
    a, b = x.float().chunk(2, -1) if halves else x.float().unflatten(-1, (-1, 2)).unbind(-1)
    a, b = a * cos - b * sin, b * cos + a * sin
    return (torch.cat([a, b], -1) if halves else torch.stack([a, b], -1).flatten(-2)).to(x.dtype)
