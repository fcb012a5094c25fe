"""Convolutions and the norms between them. Channels are dimension 1."""

from math import prod

from torch import Tensor
from torch.nn import functional as F

from mmfunc.tree import Param, Tree, normal, ones


def Conv(c_in: int, c_out: int, kernel: tuple[int, ...], *, bias: bool = True) -> Tree:
    """A convolution over len(kernel) dimensions."""
    axes = " ".join("_" * (2 + len(kernel)))
    weight = Param((c_out, c_in, *kernel), axes, normal((c_in * prod(kernel)) ** -0.5))
    return {"weight": weight, "bias": Param((c_out,), "_")} if bias else {"weight": weight}


def conv(p: Tree, x: Tensor, *, stride: int | tuple[int, ...] = 1, padding: int | tuple[int, ...] = 0) -> Tensor:
    """[B, C, ...] -> [B, C', ...] over 1, 2 or 3 dimensions."""
    run = (F.conv1d, F.conv2d, F.conv3d)[p["weight"].ndim - 3]
    return run(x, p["weight"], p.get("bias"), stride, padding)


def GroupNorm(c: int) -> Tree:
    """Scale and shift of c channels."""
    return {"weight": Param((c,), "_", ones), "bias": Param((c,), "_")}


def groupnorm(p: Tree, x: Tensor, groups: int = 32, eps: float = 1e-6) -> Tensor:
    """Normalise groups of channels over all positions, in float32. [B, C, ...] -> [B, C, ...]."""
    return F.group_norm(x.float(), groups, p["weight"].float(), p["bias"].float(), eps).to(x.dtype)
