"""Dense maps of a few rows, as in decoding: bound by reading the weight, which csrc/cpu_matvec.cpp does once, in order.

PyTorch's product reads a bfloat16 weight at a third to a half of the bandwidth of a CPU then. A weight may be int8,
with scales [N, G] in the dtype of x: a row is G groups of ceil(K / G) numbers, of which the last may have fewer.
"""

from ctypes import c_int, c_int64, c_void_p
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from mmfunc.kernels import native, wide

FEW = 8  # rows, as in the source

# no gradient, and no wrapper of custom_op: it would cost as much as a small product
_ops = torch.library.Library("mmfunc", "FRAGMENT")
_ops.define("cpu_matvec(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_ops.define("cpu_matvec_int8(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """x [..., K], weight [N, K], bias [N], scale [N, G] of an int8 weight -> [..., N]."""
    few = x.device.type == "cpu" and not torch.is_grad_enabled() and x.numel() <= FEW * x.shape[-1]
    few = few and weight.is_contiguous()
    if scale is not None:
        if few and x.dtype == scale.dtype and x.dtype in (torch.bfloat16, torch.float32) and native.available():
            return torch.ops.mmfunc.cpu_matvec_int8(x, weight, scale, bias)
        weight = dequantized(weight, scale).to(x.dtype)
    elif few and x.dtype == weight.dtype == torch.bfloat16 and native.available():
        return torch.ops.mmfunc.cpu_matvec(x, weight, bias)
    return wide.call(F.linear, x, weight, bias)


def dequantized(weight: Tensor, scale: Tensor) -> Tensor:
    """int8 [..., K] times its scales [..., G], in their dtype -> [..., K]."""
    k = weight.shape[-1]
    groups = scale[..., None].expand(*scale.shape, -(-k // scale.shape[-1]))
    return weight.to(scale.dtype) * groups.flatten(-2)[..., :k]


def _run(name: str, given: tuple[Tensor | None, ...], x: Tensor, sizes: tuple[int, ...], *more: int) -> Tensor:
    y = x.new_empty((*x.shape[:-1], sizes[0]))
    addresses = (c_void_p(t.data_ptr() if t is not None else None) for t in (*given, y))
    sizes = map(c_int64, (x.numel() // x.shape[-1], *sizes))
    getattr(native.library(), name)(*addresses, *sizes, *map(c_int, (*more, torch.get_num_threads())))
    return y


@torch.library.impl(_ops, "cpu_matvec", "CPU")
def _matvec(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x = x.contiguous()
    return _run("matvec", (weight, x, bias), x, weight.shape)


@torch.library.impl(_ops, "cpu_matvec_int8", "CPU")
def _matvec_int8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    x, scale = x.contiguous(), scale.contiguous()
    sizes = *weight.shape, scale.shape[1]
    return _run("matvec_int8", (weight, scale, x, bias), x, sizes, x.dtype == torch.float32)


@torch.library.register_fake("mmfunc::cpu_matvec")
@torch.library.register_fake("mmfunc::cpu_matvec_int8")
def _(x: Tensor, weight: Tensor, *more: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(weight)))


@register_flop_formula([torch.ops.mmfunc.cpu_matvec, torch.ops.mmfunc.cpu_matvec_int8])
def _(x: tuple, weight: tuple, *rest, **more) -> int:
    return 2 * prod(x) * weight[0]
