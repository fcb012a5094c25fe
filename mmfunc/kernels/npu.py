"""Fused operations that nn takes on NPU in place of several plain ones, each where it is right: torch_npu's, or with
`using("mmfunc")` our Ascend C kernels where they fit.

All compute in float32 inside, as nn does. Not among them: npu_geglu and npu_add_rms_norm, whose backward passes are
broken in torch_npu 2.13, and rotations by npu_rotary_mul in bfloat16, whose tables would be rounded too.
"""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mmfunc.kernels import ascend, ascend_attention

Own = Literal["torch_npu", "mmfunc"]


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


# ---- torch_npu's

def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """As nn.rotate. x [B, S, H, K] or [S, H, K], angles [S, K/2] or [1 or B, S, K/2]."""
    cos, sin = (torch.cat([t, t], -1).view(-1, x.shape[-3], 1, x.shape[-1]) for t in (angles.cos(), angles.sin()))
    return rotary(x.float().view(-1, *x.shape[-3:]), cos, sin).to(x.dtype).view(x.shape)


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As nn.rmsnorm of whole rows."""
    return torch.ops.npu.npu_rms_norm(x, weight, eps)[0]


def glu(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """silu(gate) * up."""
    return torch.ops.npu.npu_swiglu(torch.cat([gate, up], -1))


def turns(x: Tensor, angles: Tensor) -> bool:
    """Whether the documented limits of npu_rotary_mul hold."""
    few = max(x.shape[-2], x.shape[0] if x.ndim == 4 else 1) < 1000
    return x.ndim in (3, 4) and few and x.shape[-1] < 896 and angles.dtype == torch.float32


def trains(gate: Tensor, up: Tensor, act: str) -> bool:
    """Joining gate and up moves more than it saves, unless the gradient of silu is saved too."""
    return act == "silu" and gate.requires_grad and torch.is_grad_enabled()


# ---- ours

def own_rotate(x: Tensor, angles: Tensor) -> Tensor:
    """As rotate, in one pass over x."""
    angles = angles.expand(*x.shape[:-2], angles.shape[-1]).reshape(-1, angles.shape[-1])
    return ascend.rope(x.contiguous().view(-1, *x.shape[-2:]), angles, halves=True).view(x.shape)


def own_rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As rmsnorm."""
    return ascend.norm(x.contiguous(), weight, eps=eps)[0]


def own_layernorm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """As nn.layernorm."""
    return ascend.norm(x.contiguous(), weight, bias, center=True, eps=eps)[0]


def own_adaln(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """As nn.adaln. x [B, S, D], shift and scale [1 or B, 1, D]."""
    rows = (t.expand(len(x), 1, x.shape[2])[:, 0] for t in (scale, shift))
    return ascend.norm(x.contiguous(), *rows, center=True, plus=1.0)[0]


def own_glu(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """act(gate) * up."""
    return ascend.gate(gate.contiguous(), up.contiguous(), act)


def own_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, segments: Any, scale: float) -> Tensor:
    """As kernels.attend."""
    q, k, v = (t.contiguous() for t in (q, k, v))
    return ascend_attention.attention(q, k, v, causal=causal, segments=segments, scale=scale)[0]


def attends(q: Tensor, k: Tensor, *rest: Any) -> bool:
    """Whether our kernel takes these heads: the cube unit transposes no float32."""
    return q.dtype in (torch.bfloat16, torch.float16) and 16 <= q.shape[-1] <= 256 and q.shape[-1] % 8 == 0


Row = tuple[Callable[..., bool], Callable[..., Tensor]]
THEIRS: dict[str, Row] = {  # what: (where it is right, how)
    "rotate": (turns, rotate),
    "rmsnorm": (lambda x, weight, eps: x.dtype == weight.dtype, rmsnorm),
    "glu": (trains, glu),
    "gelu_tanh": (lambda x: True, lambda x: F.gelu(x, approximate="tanh")),
}
OURS: dict[str, Row] = {
    "rotate": (lambda x, angles: x.shape[-1] <= 256, own_rotate),
    "rmsnorm": (lambda x, *rest: True, own_rmsnorm),
    "layernorm": (lambda x, *rest: True, own_layernorm),
    "adaln": (lambda x, shift, scale: x.ndim == 3 and shift.shape[-2] == scale.shape[-2] == 1, own_adaln),
    "glu": (lambda gate, up, act: act in ascend.ACTS, own_glu),
    "gelu_tanh": (lambda x: True, lambda x: ascend.gate(x.contiguous(), None, "gelu_tanh")),
    "attention": (attends, own_attention),
}
_tables: list[list[dict[str, Row]]] = [[THEIRS]]


@contextmanager
def using(whose: Own):
    """Within, what is compiled for NPUs takes our kernels where they fit ("mmfunc"), or none of them; what was compiled
    before stays as it is."""
    _tables.append({"torch_npu": [THEIRS], "mmfunc": [OURS, THEIRS]}[whose])
    try:
        yield
    finally:
        _tables.pop()


def fused(what: str, x: Tensor, *args: Any) -> Tensor | None:
    """One operation on an NPU; None where plain operations are to be taken."""
    if x.device.type != "npu":
        return None
    for table in _tables[-1]:
        if what in table and table[what][0](x, *args):
            return table[what][1](x, *args)
    return None
