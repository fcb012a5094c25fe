"""What diffusion transformers share: patches, timestep features, modulation. Modulation is computed in float32."""

import math

import torch
from torch import Tensor

from mmfunc import kernels
from mmfunc.nn.basic import layernorm
from mmfunc.tree import Param, normal


def patchify(x: Tensor, patch: tuple[int, ...]) -> Tensor:
    """[B, C, T, Y, X] -> [B, S, C * prod(patch)], for any number of dimensions in time and space."""
    n = len(patch)
    for i, size in enumerate(patch):
        x = x.unflatten(2 + 2 * i, (-1, size))
    return x.permute(0, *range(2, 2 + 2 * n, 2), 1, *range(3, 3 + 2 * n, 2)).flatten(1, n).flatten(2)


def unpatchify(x: Tensor, shape: tuple[int, ...], patch: tuple[int, ...]) -> Tensor:
    """[B, S, prod(patch) * C] -> [B, C, T, Y, X] for a grid of patches of this shape; channels vary fastest."""
    n = len(shape)
    x = x.unflatten(1, shape).unflatten(-1, (*patch, -1))
    x = x.permute(0, -1, *(d for i in range(n) for d in (1 + i, 1 + n + i)))
    for i in range(n):
        x = x.flatten(2 + i, 3 + i)
    return x


def grid(shape: tuple[int, ...], device: torch.device | None = None) -> Tensor:
    """Row-major positions of a grid: (T, Y, X) -> int64 [T * Y * X, 3]."""
    axes = torch.meshgrid(*(torch.arange(n, device=device) for n in shape), indexing="ij")
    return torch.stack([a.flatten() for a in axes], -1)


def sinusoid(t: Tensor, width: int, period: float = 10000.0) -> Tensor:
    """Timestep features in float32, cosines first. t [B] -> [B, width]."""
    freqs = torch.exp(-math.log(period) * torch.arange(width // 2, dtype=torch.float32, device=t.device) / (width // 2))
    angle = t.float()[:, None] * freqs
    return torch.cat([angle.cos(), angle.sin()], -1)


def Offsets(n: int, d: int) -> Param:
    """n learned modulation vectors of width d."""
    return Param((1, n, d), "_ _ embed", normal(d**-0.5))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift, computed in float32, in the dtype of x."""
    return (x.float() * (1 + scale) + shift).to(x.dtype)


def adaln(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive layer norm (Peebles & Xie 2023): x [B, S, D] normalised, scaled and shifted, all of it in float32, then
    in the dtype of x."""
    if (normed := kernels.fused("adaln", x, shift, scale)) is not None:
        return normed
    return modulate(layernorm(None, x.float()), shift, scale).to(x.dtype)


def gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """The residual x + gate * y, computed in float32, in the dtype of x."""
    return (x.float() + gate * y).to(x.dtype)
