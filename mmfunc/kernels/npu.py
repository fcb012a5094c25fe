"""Fused operations of torch_npu that nn takes on NPU in place of several plain ones, each where it is right.

They compute in float32 inside, as nn does. Not among them: npu_geglu and npu_add_rms_norm, whose backward passes are
broken in torch_npu 2.13, and rotations in bfloat16, whose tables would be rounded too.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("mmfunc::rotary", mutates_args=())
def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """npu_rotary_mul with the opposite rotation as its gradient. torch_npu's own keeps x, is for heads whose width is a
    multiple of 64 only, and gives gradients of the tables too."""
    return torch.ops.npu.npu_rotary_mul(x, cos, sin)


def _back(ctx: Any, g: Tensor) -> tuple:
    cos, sin = ctx.saved_tensors
    return rotary(g, cos, -sin), None, None


rotary.register_fake(lambda x, cos, sin: torch.empty_like(x))
rotary.register_autograd(_back, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[1:]))


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """As nn.rotate. x [B, S, H, K], angles [S, K/2] or [1 or B, S, K/2]."""
    cos, sin = (torch.cat([t, t], -1).view(-1, x.shape[1], 1, x.shape[3]) for t in (angles.cos(), angles.sin()))
    return rotary(x.float(), cos, sin).to(x.dtype)


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As nn.rmsnorm of whole rows."""
    return torch.ops.npu.npu_rms_norm(x, weight, eps)[0]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return torch.ops.npu.npu_swiglu(torch.cat([gate, up], -1))


def turns(x: Tensor, angles: Tensor) -> bool:
    """Whether the documented limits of npu_rotary_mul hold."""
    return x.ndim == 4 and max(x.shape[0], x.shape[2]) < 1000 and x.shape[3] < 896 and angles.dtype == torch.float32


FUSED: dict[str, tuple[Callable[..., bool], Callable[..., Tensor]]] = {  # what: (where it is right, how)
    "rotate": (turns, rotate),
    "rmsnorm": (lambda x, weight, eps: x.dtype == weight.dtype, rmsnorm),
    # joining gate and up moves more than it saves, unless the gradient of silu is saved too
    "swiglu": (lambda gate, up: gate.requires_grad and torch.is_grad_enabled(), swiglu),
}


def fused(what: str, x: Tensor, *args: Any) -> Tensor | None:
    """A row of FUSED on an NPU; None where plain operations are to be taken."""
    if x.device.type != "npu":
        return None
    right, run = FUSED[what]
    return run(x, *args) if right(x, *args) else None
