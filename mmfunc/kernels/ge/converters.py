"""What torchair lacks, or has wrong, for the programs of mmfunc: decompositions into operations that it has, and
converters. Each row of NEEDED says since which wheel it is needed; the tests say when it is no more.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torchair
from torch import Tensor
from torch.nn import functional as F
from torchair._ge_concrete_graph import ge_apis as ge
from torchair._ge_concrete_graph.ge_converter import aten as _theirs  # noqa: F401  before ours, which replace some
from torchair._ge_concrete_graph.ge_converter import custom as _more  # noqa: F401

from mmfunc.kernels import attention as _attention  # noqa: F401  registers mmfunc::keep
from mmfunc.kernels import npu as _npu  # noqa: F401  registers mmfunc::rotary
from mmfunc.kernels.ge import own

aten, npu = torch.ops.aten, torch.ops.npu


# ---- decompositions

def silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of x * sigmoid(x)."""
    s = torch.sigmoid(x)
    return grad * (s * (1 + x * (1 - s)))


def matmul_backward(grad: Tensor, a: Tensor, b: Tensor, mask: list[bool]) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a @ b, of those that mask asks for; a weight [K, N] behind many rows gets one product."""
    if b.ndim == 2 and a.ndim > 2:
        rows = grad.reshape(-1, grad.shape[-1])
        return ((rows @ b.mT).view(a.shape) if mask[0] else None,
                a.reshape(-1, a.shape[-1]).mT @ rows if mask[1] else None)
    return ((grad @ b.mT).sum_to_size(a.shape) if mask[0] else None,
            (a.mT @ grad).sum_to_size(b.shape) if mask[1] else None)


def index_copy(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    """x with the slices that index [N] names along dim replaced by those of source."""
    shape = [-1 if d == dim % x.ndim else 1 for d in range(x.ndim)]
    return x.scatter(dim, index.view(shape).expand_as(source), source)


def index_put(x: Tensor, indices: list[Tensor | None], values: Tensor, accumulate: bool = False) -> Tensor:
    """x with values added (or written) at the places that indices of its first dimensions name."""
    if any(i is None or i.dtype == torch.bool for i in indices):
        raise ValueError("index_put with a mask, or with a whole dimension in front, is not lowered for NPUs: use "
                         "torch.where, or index the first dimensions by numbers")
    n = len(indices)
    place = torch.zeros_like(indices[0])
    for i, size in zip(indices, x.shape):
        place = place * size + torch.where(i < 0, i + size, i)
    rows = x.reshape(-1, *x.shape[n:])
    place, values = place.flatten(), values.expand(*place.shape, *x.shape[n:]).reshape(-1, *x.shape[n:])
    return (rows.index_add(0, place, values) if accumulate else index_copy(rows, 0, place, values)).view(x.shape)


def select_backward(grad: Tensor, sizes: list[int], dim: int, index: int) -> Tensor:
    """Zeros of the given sizes but for the slice that grad is."""
    dim = dim % len(sizes)
    index = index % sizes[dim]
    return F.pad(grad.unsqueeze(dim), [0, 0] * (len(sizes) - 1 - dim) + [index, sizes[dim] - 1 - index])


def logaddexp(a: Tensor, b: Tensor) -> Tensor:
    """log(e^a + e^b); infinite numbers may be equal."""
    apart = torch.where(a == b, 0.0, (a - b).abs())
    return torch.maximum(a, b) + (1 + (-apart).exp()).log()


def group_norm(x: Tensor, *given: Any) -> tuple[Tensor, ...]:
    """A norm of groups in half precision, in float32; what it keeps for its gradient stays in float32."""
    if x.dtype == torch.float32:
        return NotImplemented
    y, *kept = aten.native_group_norm(*(t.float() if isinstance(t, Tensor) else t for t in (x, *given)))
    return y.to(x.dtype), *kept


def group_norm_backward(grad: Tensor, x: Tensor, *given: Any) -> tuple[Tensor | None, ...]:
    """Gradients of group_norm, in the dtype of x."""
    if x.dtype == torch.float32:
        return NotImplemented
    wide = (t.float() if isinstance(t, Tensor) else t for t in (grad, x, *given))
    return tuple(t if t is None else t.to(x.dtype) for t in aten.native_group_norm_backward(*wide))


DECOMPOSITIONS = {aten.silu_backward.default: silu_backward, aten.matmul_backward.default: matmul_backward,
                  aten.native_group_norm.default: group_norm,
                  aten.native_group_norm_backward.default: group_norm_backward,
                  aten.index_copy.default: index_copy, aten.index_put.default: index_put,
                  aten.select_backward.default: select_backward, aten.logaddexp.default: logaddexp}


# ---- converters

def keep(x: Any) -> Any:
    """mmfunc::keep only gives a name to what a remat policy keeps."""
    return ge.Identity(x)


def rotary(x: Any, cos: Any, sin: Any) -> Any:
    """mmfunc::rotary is npu_rotary_mul but for its gradient."""
    return ge.RotaryMul(x, cos, sin)


def gelu(x: Any, approximate: str = "none") -> Any:
    """GELU as it is asked for: the operation Gelu is the fit by tanh, whatever is said."""
    return ge.GeluV2(x, approximate=approximate)


def gelu_backward(grad: Any, x: Any, approximate: str = "none") -> Any:
    """The gradient of gelu."""
    return ge.GeluGradV2(grad, x, approximate=approximate)


def extreme(reduce: Callable) -> Callable:
    """amax or amin."""
    return lambda x, dim=(), keepdim=False: reduce(x, list(dim), keep_dims=keepdim)


FLAGS = {  # arguments of npu_fusion_attention that are attributes of the GE operation, and their defaults
    "keep_prob": 1.0, "pre_tockens": 2147483647, "next_tockens": 2147483647, "inner_precise": 0, "sparse_mode": 0}
UNUSED = ("pse", "padding_mask", "prefix", "actual_seq_qlen", "actual_seq_kvlen", "softmax_layout", "sink",
          "dropout_mask")  # which have no counterpart here
LAYOUTS = "BSH", "SBH", "BNSD", "BSND"


def _given(op: Any, args: tuple, kwargs: dict) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the arguments of a call by name, the attributes of the GE operation); what GE could not be told is an error."""
    found = dict(zip((a.name for a in op._schema.arguments), args)) | kwargs
    flags = {k: found.get(k, default) for k, default in FLAGS.items()}
    odd = [k for k in UNUSED if found.get(k) not in (None, "")]
    if found["input_layout"] not in LAYOUTS or odd or not math.isclose(flags["keep_prob"], 1.0):
        said = ", ".join([f"layout {found['input_layout']}", f"keep_prob {flags['keep_prob']}", *odd])
        raise ValueError(f"{op} with {said} is not lowered for NPUs; layouts are {', '.join(LAYOUTS)}, without dropout")
    return found, flags | {"head_num": found["head_num"], "input_layout": found["input_layout"]}


def fusion_attention(*args: Any, **kwargs: Any) -> tuple:
    """npu_fusion_attention to FlashAttentionScore."""
    a, flags = _given(npu.npu_fusion_attention.default, args, kwargs)
    none = dict.fromkeys(("real_shift", "drop_mask", "padding_mask", "prefix", "actual_seq_qlen", "actual_seq_kvlen",
                          "q_start_idx", "kv_start_idx"))
    top, total, empty, out = ge.FlashAttentionScore(a["query"], a["key"], a["value"], atten_mask=a.get("atten_mask"),
                                                    scale_value=a.get("scale", 1.0), **none, **flags)
    return out, top, total, empty, 0, 0, 0  # seed, offset and size of a dropout mask, which there is none of


def fusion_attention_grad(*args: Any, **kwargs: Any) -> tuple:
    """npu_fusion_attention_grad to FlashAttentionScoreGrad."""
    a, flags = _given(npu.npu_fusion_attention_grad.default, args, kwargs)
    none = dict.fromkeys(("pse_shift", "drop_mask", "padding_mask", "prefix", "actual_seq_qlen", "actual_seq_kvlen",
                          "q_start_idx", "kv_start_idx"))
    kept = {k: a.get(k) for k in ("atten_mask", "softmax_max", "softmax_sum", "softmax_in", "attention_in")}
    found = ge.FlashAttentionScoreGrad(a["query"], a["key"], a["value"], a["dy"], scale_value=a.get("scale_value", 1.0),
                                       **none, **kept, **flags)
    return *found, ge.Const([], dtype=ge.DataType.DT_FLOAT)  # for the sinks, which there are none of


CONVERTERS: dict[Any, Callable] = {
    torch.ops.mmfunc.keep.default: keep, torch.ops.mmfunc.rotary.default: rotary,
    aten.amax.default: extreme(ge.ReduceMax), aten.amin.default: extreme(ge.ReduceMin),
    aten.gelu.default: gelu, aten.gelu_backward.default: gelu_backward,
    npu.npu_fusion_attention.default: fusion_attention,
    npu.npu_fusion_attention_grad.default: fusion_attention_grad, **own.CONVERTERS,
}
UPSTREAM = {op: getattr(op, "_ge_converter", None) for op in CONVERTERS}
for _op, _fn in CONVERTERS.items():
    torchair.register_fx_node_ge_converter(_op)(_fn)

NEEDED = {  # operation: (the wheel of torch_npu that needs ours, what its own does)
    aten.native_group_norm_backward.default: ("2.13.0", "subtracts float32 from bfloat16"),
    aten.select_backward.default: ("2.13.0", "scatters into memory that nothing has written"),
    aten.silu_backward.default: ("2.13.0", "raises NotImplementedError"),
    aten.matmul_backward.default: ("2.13.0", "takes no mask but [True, True]"),
    aten.index_copy.default: ("2.13.0", "raises NotImplementedError"),
    aten.index_put.default: ("2.13.0", "raises NotImplementedError"),
    aten.logaddexp.default: ("2.13.0", "raises NotImplementedError"),
    aten.amax.default: ("2.13.0", "raises NotImplementedError"),
    aten.amin.default: ("2.13.0", "raises NotImplementedError"),
    aten.gelu.default: ("2.13.0", "always takes the fit by tanh"),
    aten.gelu_backward.default: ("2.13.0", "always takes the fit by tanh"),
    npu.npu_fusion_attention.default: ("2.13.0", "takes the layouts BSH and BNSD only"),
    npu.npu_fusion_attention_grad.default: ("2.13.0", "gives four results of five"),
}
