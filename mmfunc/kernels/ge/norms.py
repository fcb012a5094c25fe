"""Reductions and norms of GE graphs, by their public definitions; as in `operations`."""

from collections.abc import Callable

import torch
from torch import Tensor


def reduce(fn: Callable) -> Callable:
    """A reduction over axes; without axes over none or all, as noop_with_empty_axes says."""
    def run(a: dict, x: Tensor, axes: list[int]) -> Tensor:
        if not axes and a.get("noop_with_empty_axes"):
            return x
        return fn(x, tuple(axes or range(x.ndim)), a["keep_dims"])
    return run


def any_of(x: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
    """Whether any is true."""
    return x.sum(dims, keepdim=keep) > 0


def layernorm(a: dict, x: Tensor, shape: list[int], gamma: Tensor | None, beta: Tensor | None) -> tuple[Tensor, ...]:
    """y, mean and 1 / standard deviation, the last two in float32 and with dimensions of size 1."""
    dims = tuple(range(-len(shape), 0))
    wide = x.float()
    mean = wide.mean(dims, keepdim=True)
    rstd = ((wide - mean).square().mean(dims, keepdim=True) + a["epsilon"]).rsqrt()
    y = (wide - mean) * rstd
    y = y if gamma is None else y * gamma.float()
    return (y if beta is None else y + beta.float()).to(x.dtype), mean, rstd


def layernorm_grad(a: dict, dy: Tensor, x: Tensor, rstd: Tensor, mean: Tensor, gamma: Tensor) -> tuple[Tensor, ...]:
    """Gradients by x, gamma and beta."""
    dims, outer = tuple(range(x.ndim - gamma.ndim, x.ndim)), tuple(range(x.ndim - gamma.ndim))
    normed, slope = (x.float() - mean) * rstd, dy.float()
    inner = slope * gamma.float()
    dx = inner - inner.mean(dims, keepdim=True) - normed * (inner * normed).mean(dims, keepdim=True)
    return (dx * rstd).to(x.dtype), (slope * normed).sum(outer).to(gamma.dtype), slope.sum(outer).to(gamma.dtype)


def groupnorm(a: dict, x: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
    """y, mean and variance [B, groups]; channels are where the layout of the inputs says."""
    if a["layout"] - {"NCHW", "NCDHW"} or not a["layout"]:
        raise ValueError(f"GroupNorm with layout {a['layout']}")
    parts = x.float().reshape(len(x), a["num_groups"], -1)
    mean, variance = parts.mean(-1), parts.var(-1, correction=0)
    y = ((parts - mean[..., None]) * (variance[..., None] + a["eps"]).rsqrt()).view(x.shape)
    shape = (-1, *[1] * (x.ndim - 2))
    y = (y * gamma.float().view(shape) + beta.float().view(shape)).to(x.dtype)
    return y, mean.to(x.dtype), variance.to(x.dtype)


def rmsnorm(a: dict, x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """y and 1 / root mean square over the dimensions of gamma, the latter in float32 and of size 1 there."""
    wide = x.float()
    rstd = (wide.square().mean(tuple(range(-gamma.ndim, 0)), keepdim=True) + a["epsilon"]).rsqrt()
    return (wide * rstd * gamma.float()).to(x.dtype), rstd


def rmsnorm_grad(a: dict, dy: Tensor, x: Tensor, rstd: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients by x and gamma, the latter in float32."""
    inner, outer = tuple(range(-gamma.ndim, 0)), tuple(range(x.ndim - gamma.ndim))
    normed, slope = x.float() * rstd, dy.float()
    scaled = slope * gamma.float()
    dx = (scaled - normed * (scaled * normed).mean(inner, keepdim=True)) * rstd
    return dx.to(x.dtype), (slope * normed).sum(outer)


def channels(a: dict, x: Tensor, *of: Tensor) -> list[Tensor]:
    """Numbers of each channel, in the shape that x [B, C, ...] meets."""
    if a["layout"] != {"NCHW"}:
        raise ValueError(f"a batch norm with layout {a['layout']}")
    return [t.view(-1, *[1] * (x.ndim - 2)) for t in of]


def batchnorm_update(a: dict, grad: Tensor, x: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of scale and offset of each channel."""
    dims = tuple(i for i in range(x.ndim) if i != 1)
    mean, variance = channels(a, x, mean, variance)
    normed = (x.float() - mean) * (variance + a["epsilon"]).rsqrt()
    return (grad * normed).sum(dims), grad.float().sum(dims)


def batchnorm_reduce(a: dict, grad: Tensor, x: Tensor, dscale: Tensor, doffset: Tensor, scale: Tensor, mean: Tensor,
                     variance: Tensor) -> Tensor:
    """The gradient of the input."""
    dscale, doffset, scale, mean, variance = channels(a, x, dscale, doffset, scale, mean, variance)
    n, rstd = x.numel() // x.shape[1], (variance + a["epsilon"]).rsqrt()
    return (scale * rstd * (grad - doffset / n - (x - mean) * rstd * dscale / n)).to(x.dtype)


def lp_norm(a: dict, x: Tensor) -> Tensor:
    """(sum of |x|^p)^(1/p) + epsilon."""
    return torch.linalg.vector_norm(x, a["p"], tuple(a["axes"]) or None, a["keepdim"]) + a["epsilon"]


def softmax_grad(a: dict, y: Tensor, dy: Tensor) -> Tensor:
    """y (dy - sum of y dy)."""
    return y * (dy - (y * dy).sum(tuple(a["axes"]), keepdim=True))
