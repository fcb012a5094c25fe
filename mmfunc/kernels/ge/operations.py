"""What the operations of GE graphs compute, each written from its public definition and from nothing of the converters.

An operation is a function of its attributes and its inputs. Sizes, axes and other inputs that say what is to be done
(HOST) come as lists of numbers; the others are tensors, on the meta device where only shapes are asked for.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmfunc.kernels.ge import attention, collectives, norms, own
from mmfunc.kernels.ge import products as p

aten = torch.ops.aten
DTYPES = {0: torch.float32, 1: torch.float16, 2: torch.int8, 3: torch.int32, 4: torch.uint8, 6: torch.int16,
          9: torch.int64, 11: torch.float64, 12: torch.bool, 27: torch.bfloat16}  # by GE's number
HOST = {  # type: places of the inputs that are read on the host
    "ArgMaxV2": {1}, "BroadcastTo": {1}, "Fill": {0}, "GatherV2": {2}, "LayerNormV4": {1}, "PadV3": {1},
    "ReduceAny": {1}, "ReduceLogSumExp": {1}, "ReduceMax": {1}, "ReduceMean": {1}, "ReduceMin": {1},
    "ReduceSum": {1}, "Reshape": {1}, "SplitV": {1, 2}, "StridedSliceV2": {1, 2, 3, 4},
    "Transpose": {1}, "HcomAllToAllV": {1, 2, 3, 4},
    **{f"Conv{n}DBackpropInput": {0} for n in (2, 3)}, **{f"Conv{n}DBackpropFilter": {1} for n in (2, 3)},
    **{f"Conv{n}DTranspose": {0} for n in (2, 3)}}
VIEWS = {"Reshape", "Unsqueeze", "Squeeze", "FlattenV2", "Identity"}  # move nothing


# ---- shapes

def reshape(a: dict, x: Tensor, shape: list[int]) -> Tensor:
    """Zeros in the shape keep a size; axis and num_axes may name a part of the dimensions."""
    first, count = a["axis"], a["num_axes"]
    last = x.ndim if count == -1 else first + count
    kept = [x.shape[first + i] if n == 0 and x.numel() else n for i, n in enumerate(shape)]
    return x.reshape(*x.shape[:first], *kept, *x.shape[last:])


def strided_slice(a: dict, x: Tensor, begin: list, end: list, axes: list | None, strides: list | None) -> Tensor:
    """x[begin : end : stride] on some axes; past the end means the end."""
    if any(a[f"{n}_mask"] for n in ("begin", "end", "ellipsis", "new_axis", "shrink_axis")):
        raise ValueError("masks of StridedSliceV2 are not understood")
    for i, axis in enumerate(range(len(begin)) if axes is None else axes):
        size, step = x.shape[axis], 1 if strides is None else strides[i]
        ends = [min(max(n + size if n < 0 else n, 0), size) for n in (begin[i], end[i])]
        x = aten.slice.Tensor(x, axis, *ends, step)
    return x


def pad(a: dict, x: Tensor, paddings: list[int], value: Tensor | None) -> Tensor:
    """Pairs (before, after) of each dimension in turn."""
    if a["mode"] != "constant" or not a["paddings_contiguous"]:
        raise ValueError(f"PadV3 with mode {a['mode']} and paddings_contiguous {a['paddings_contiguous']}")
    pairs = [n for i in reversed(range(x.ndim)) for n in paddings[2 * i : 2 * i + 2]]
    return F.pad(x, pairs, value=0 if value is None else value.item())


def numbers(a: dict, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    """From start to limit by delta, in their dtype."""
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def squeeze(a: dict, x: Tensor) -> Tensor:
    """Drops dimensions of size 1; any other is an error."""
    if any(x.shape[i] != 1 for i in a["axis"]):
        raise ValueError(f"axes {a['axis']} of {list(x.shape)} are not all 1")
    return x.squeeze(tuple(a["axis"])) if a["axis"] else x.squeeze()


def unsqueeze(a: dict, x: Tensor) -> Tensor:
    """Axes count in the result."""
    rank = x.ndim + len(a["axes"])
    for axis in sorted(n % rank for n in a["axes"]):
        x = x.unsqueeze(axis)
    return x


def joined(a: dict, *xs: Any) -> Tensor:
    """The parts, then the dimension (ConcatV2 has it as its last input)."""
    *parts, dim = xs
    return torch.cat(counted(a["N"], parts), int(dim))


def counted(n: int, parts: Any) -> Any:
    """The parts, of which there must be n."""
    if len(parts) != n:
        raise ValueError(f"{len(parts)} parts, where the attribute says {n}")
    return parts


def split(a: dict, x: Tensor, sizes: list[int], dim: list[int]) -> tuple[Tensor, ...]:
    """Parts of given sizes, of which one may be -1: the rest."""
    rest = x.shape[dim[0]] - sum(n for n in sizes if n >= 0)
    return x.split([rest if n < 0 else n for n in counted(a["num_split"], sizes)], dim[0])


# ---- lookups

def gather(a: dict, x: Tensor, index: Tensor, axis: list[int] = (0,)) -> Tensor:
    """Slices of x along axis, in the shape of index; negative ones only where the attribute allows them."""
    if a["batch_dims"] or (not a["negative_index_support"] and not index.is_meta and (index < 0).any()):
        raise ValueError("batch_dims, or a negative index without negative_index_support")
    dim = axis[0] % x.ndim
    rows = x.index_select(dim, torch.where(index < 0, index + x.shape[dim], index).flatten().long())
    return rows.unflatten(dim, index.shape) if index.ndim else rows.squeeze(dim)


def by_tensors(a: dict, x: Tensor, *indices: Tensor) -> Tensor:
    """x[i0, i1, ...]; the mask says which dimensions have an index."""
    given = iter(indices)
    return x[tuple(next(given) if on else slice(None) for on in a["indices_mask"])]


def scatter(a: dict, x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    """Writes or adds elements along axis."""
    if a["reduction"] not in ("none", "add"):
        raise ValueError(f"reduction {a['reduction']!r}")
    return (x.scatter_add if a["reduction"] == "add" else x.scatter)(a["axis"], index.long(), updates)


def index_add(a: dict, x: Tensor, index: Tensor, updates: Tensor, alpha: Tensor | None) -> Tensor:
    """Adds slices along axis, alpha times."""
    return x.index_add(a["axis"], index, updates if alpha is None else updates * alpha)


def embedding_grad(a: dict, grad: Tensor, index: Tensor) -> Tensor:
    """Sum of the gradients of each row of a table."""
    if a["scale_grad_by_freq"]:
        raise ValueError("scale_grad_by_freq")
    index, rows = index.flatten(), grad.flatten(0, index.ndim - 1)
    if a["padding_idx"] >= 0:
        rows = torch.where((index == a["padding_idx"])[:, None], 0, rows)
    return grad.new_zeros(a["num_weights"], grad.shape[-1]).index_add(0, index, rows)


# ---- activations

def gelu_tanh(x: Tensor) -> Tensor:
    """The fit that the operation without an attribute computes."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu_tanh_grad(dy: Tensor, x: Tensor) -> Tensor:
    """Its gradient."""
    t = torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return dy * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2))


def gelu(a: dict, x: Tensor) -> Tensor:
    """Exact, or the fit by tanh."""
    wide = x.float()
    y = gelu_tanh(wide) if a["approximate"] == "tanh" else wide * 0.5 * (1 + torch.erf(wide / math.sqrt(2)))
    return y.to(x.dtype)


def gelu_grad(a: dict, dy: Tensor, x: Tensor) -> Tensor:
    """The gradient of gelu."""
    wide, slope = x.float(), dy.float()
    if a["approximate"] == "tanh":
        return gelu_tanh_grad(slope, wide).to(x.dtype)
    density = torch.exp(-wide * wide / 2) / math.sqrt(2 * math.pi)
    return (slope * (0.5 * (1 + torch.erf(wide / math.sqrt(2))) + wide * density)).to(x.dtype)


def swiglu(a: dict, x: Tensor) -> Tensor:
    """silu of the first half, times the second."""
    gate, up = x.float().chunk(2, a["dim"])
    return (gate * torch.sigmoid(gate) * up).to(x.dtype)


def swiglu_grad(a: dict, dy: Tensor, x: Tensor) -> Tensor:
    """The gradient of swiglu."""
    (gate, up), slope = x.float().chunk(2, a["dim"]), dy.float()
    s = torch.sigmoid(gate)
    return torch.cat([slope * up * s * (1 + gate * (1 - s)), slope * gate * s], a["dim"]).to(x.dtype)


def rotary(a: dict, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + (-second half, first half) sin, all of one dtype and four dimensions."""
    if {cos.dtype, sin.dtype} != {x.dtype} or {x.ndim, cos.ndim, sin.ndim} != {4} or cos.shape != sin.shape:
        raise ValueError("RotaryMul takes four dimensions and one dtype")
    first, second = x.float().chunk(2, -1)
    return (x * cos.float() + torch.cat([-second, first], -1) * sin.float()).to(x.dtype)


def power(a: dict, x: Tensor) -> Tensor:
    """base^(scale x + shift); base -1 stands for e."""
    y = a["scale"] * x + a["shift"]
    return torch.exp(y) if a["base"] == -1 else torch.pow(a["base"], y)


# ---- the table

def _plain(fn: Callable) -> Callable:
    """A function of tensors as an operation without attributes."""
    return lambda a, *xs: fn(*xs)


def arg_max(a: dict, x: Tensor, dim: list[int]) -> Tensor:
    """Where the first of the largest numbers is."""
    return x.argmax(dim[0]).to(DTYPES[a["dtype"]])


def divided(x: Tensor, y: Tensor) -> Tensor:
    """x / y in their dtype: whole numbers are cut off."""
    return torch.div(x, y, rounding_mode=None if x.is_floating_point() else "trunc")


def log(a: dict, x: Tensor) -> Tensor:
    """The logarithm of scale x + shift, to a base; -1 is e."""
    y = (a["scale"] * x + a["shift"]).log()
    return y if a["base"] == -1 else y / math.log(a["base"])


EVEN = {  # elementwise, both sides of one dtype
    "Add": torch.add, "Sub": torch.sub, "RealDiv": divided, "Equal": torch.eq, "Greater": torch.gt,
    "GreaterEqual": torch.ge, "Less": torch.lt, "LessEqual": torch.le, "LogicalAnd": torch.logical_and,
    "LogicalOr": torch.logical_or, "FloorMod": torch.remainder, "FloorDiv": torch.floor_divide,
    "Maximum": torch.maximum}
PLAIN = EVEN | {
    "Abs": torch.abs, "Cos": torch.cos, "Sin": torch.sin, "Neg": torch.neg, "Rsqrt": torch.rsqrt,
    "Sigmoid": torch.sigmoid, "Relu": torch.relu, "Reciprocal": torch.reciprocal, "LogicalNot": torch.logical_not,
    "Mul": torch.mul, "Pow": torch.pow, "OnesLike": torch.ones_like, "ZerosLike": torch.zeros_like,
    "Identity": lambda x: x, "TensorMove": torch.clone,
    "Sxpy": lambda x, y, alpha: x - (y if alpha is None else y * alpha),
    "ClipByValueV2": lambda x, low, high: torch.minimum(torch.maximum(x, low), high),
    "MaskedFill": lambda x, mask, value: torch.where(mask, value, x),
    "SelectV2": torch.where, "Fill": lambda dims, value: value.expand(dims).clone(),
    "BroadcastTo": lambda x, shape: x.expand(shape), "Transpose": lambda x, perm: x.permute(perm),
    "Gelu": gelu_tanh, "GeluGrad": lambda dy, x, y: gelu_tanh_grad(dy, x), "ReluGrad": lambda dy, x: dy * (x > 0)}
OPERATIONS: dict[str, Callable] = {name: _plain(fn) for name, fn in PLAIN.items()} | own.OPERATIONS | {
    "Muls": lambda a, x: x * a["value"], "Cast": lambda a, x: x.to(DTYPES[a["dst_type"]]),
    "Shape": lambda a, x: torch.tensor(x.shape, dtype=DTYPES[3 if a["dtype"] == "DT_INT32" else a["dtype"]]),
    "Reshape": reshape, "Squeeze": squeeze, "Unsqueeze": unsqueeze, "ConcatV2": joined, "SplitV": split, "PadV3": pad,
    "StridedSliceV2": strided_slice, "Range": numbers,
    "Log": log, "Tril": lambda a, x: x.tril(a["diagonal"]),
    "FlattenV2": lambda a, x: x.flatten(a["axis"], a["end_axis"]),
    "Pack": lambda a, *xs: torch.stack(counted(a["N"], xs), a["axis"]),
    "Unpack": lambda a, x: counted(a["num"], x.unbind(a["axis"])),
    "Gather": lambda a, x, index: gather({"batch_dims": a["batch_dims"], "negative_index_support": True}, x, index),
    "GatherV2": gather, "GatherElements": lambda a, x, index: x.gather(a["dim"], index.long()),
    "IndexByTensor": by_tensors, "ScatterElements": scatter, "InplaceIndexAdd": index_add, "ArgMaxV2": arg_max,
    "EmbeddingDenseGrad": embedding_grad, "ReduceSum": norms.reduce(torch.sum), "ReduceMean": norms.reduce(torch.mean),
    "ReduceMax": norms.reduce(torch.amax), "ReduceMin": norms.reduce(torch.amin),
    "ReduceLogSumExp": norms.reduce(torch.logsumexp),
    "ReduceAny": norms.reduce(norms.any_of), "Exp": power, "Swish": lambda a, x: x * torch.sigmoid(a["scale"] * x),
    "SigmoidGrad": lambda a, y, dy: dy * y * (1 - y), "GeluV2": gelu, "GeluGradV2": gelu_grad,
    "SoftmaxV2": lambda a, x: torch.softmax(x, a["axes"][0], torch.float32 if a["half_to_float"] else None),
    "SoftmaxGrad": norms.softmax_grad, "LayerNormV4": norms.layernorm, "LayerNormGradV3": norms.layernorm_grad,
    "RmsNorm": norms.rmsnorm, "RmsNormGrad": norms.rmsnorm_grad, "SwiGlu": swiglu, "SwiGluGrad": swiglu_grad,
    "RotaryMul": rotary, "GroupNorm": norms.groupnorm, "BNTrainingUpdateGrad": norms.batchnorm_update,
    "BNTrainingReduceGrad": norms.batchnorm_reduce, "LpNormV2": norms.lp_norm,
    "MatMul": p.matmul, "MatMulV2": p.matmul, "BatchMatMul": p.batch_matmul,
    "HcomAllReduce": collectives.all_reduce, "HcomAllGather": collectives.all_gather,
    "HcomReduceScatter": collectives.reduce_scatter, "HcomAllToAllV": collectives.all_to_all,
    "FlashAttentionScore": attention.forward, "FlashAttentionScoreGrad": attention.backward,
    **{f"Conv{n}D{kind}": made(n) for n in (2, 3) for kind, made in (
        ("", p.conv), ("BackpropInput", p.conv_input), ("BackpropFilter", p.conv_filter),
        ("Transpose", p.conv_transpose))}}
