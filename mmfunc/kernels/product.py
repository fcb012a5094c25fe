"""Dense maps of a few rows, as in decoding: bound by reading the weight, which csrc/cpu_matvec.cpp does once, in order.

PyTorch's product reads a bfloat16 weight at a third to a half of the bandwidth of a CPU then.
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


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K], weight [N, K], bias [N] -> [..., N]."""
    few = x.device.type == "cpu" and not torch.is_grad_enabled() and x.numel() <= FEW * x.shape[-1]
    if few and x.dtype == weight.dtype == torch.bfloat16 and weight.is_contiguous() and native.available():
        return torch.ops.mmfunc.cpu_matvec(x, weight, bias)
    return wide.call(F.linear, x, weight, bias)


@torch.library.impl(_ops, "cpu_matvec", "CPU")
def _matvec(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y, x = x.new_empty((*x.shape[:-1], len(weight))), x.contiguous()
    addresses = (c_void_p(t.data_ptr() if t is not None else None) for t in (weight, x, bias, y))
    sizes = map(c_int64, (x.numel() // x.shape[-1], *weight.shape))
    native.library().matvec(*addresses, *sizes, c_int(torch.get_num_threads()))
    return y


@torch.library.register_fake("mmfunc::cpu_matvec")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(weight)))


@register_flop_formula(torch.ops.mmfunc.cpu_matvec)
def _(x: tuple, weight: tuple, bias: object, *rest, **more) -> int:
    return 2 * prod(x) * weight[0]
