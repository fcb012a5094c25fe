"""Attention on CPU: csrc/cpu_attention.cpp."""

import ctypes
from math import ceil

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mmfunc.kernels import native
from mmfunc.kernels.native import available

BLOCK = 192  # as in the source: keys, and queries, of a step of the backward pass
SOME = 96  # as in the source: queries are padded to
FEW = 16, 32 * 32  # queries, and scores of a head, with fewer of which `few` serves
ITEMS = 16  # of work that the backward pass is cut into where there are not as many heads; no result depends on threads


def _run(name: str, problem: ctypes.Array, scale: float) -> None:
    getattr(native.library(), name)(problem, ctypes.c_double(scale))


def supports(q: Tensor, k: Tensor, v: Tensor, scale: float) -> bool:
    """Whether the kernels take these; queries, keys and values of one width up to 256, in float32 or bfloat16."""
    return (q.dtype in (torch.float32, torch.bfloat16) and q.dtype == k.dtype == v.dtype and scale > 0
            and q.shape[-1] == v.shape[-1] <= 256 and available())


def _problem(q: Tensor, k: Tensor, rows: Tensor | None, columns: Tensor | None, start: Tensor | None, causal: bool,
             lse: Tensor, delta: Tensor | None, sums: Tensor | None, touched: Tensor | None,
             *tensors: Tensor) -> ctypes.Array:
    """The struct Problem of the source: 64-bit numbers and addresses."""
    (batch, queries, heads, width), (_, keys, groups, _) = q.shape, k.shape
    address = lambda t: 0 if t is None else t.data_ptr()
    head = [q.dtype == torch.bfloat16, batch, queries, keys, heads, groups, width, causal,
            0 if start is None else int(start), torch.get_num_threads(),
            *map(address, (rows, columns, lse, delta, sums, touched)), 1 if sums is None else sums.shape[0]]
    each = [n for t in (q, k, *tensors) for n in (t.data_ptr(), *t.stride()[:3])]
    return (ctypes.c_int64 * (len(head) + len(each)))(*head, *each)


def ids(segments: Tensor | None, batch: int) -> Tensor | None:
    """Segments as the kernels read them: dense int32 [B, S]."""
    return None if segments is None else segments.expand(batch, -1).to(torch.int32).contiguous()


def _dense(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


@torch.library.custom_op("mmfunc::cpu_attention", mutates_args=(), device_types="cpu",
                         tags=[torch.Tag.flexible_layout])
def attention(q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None, columns: Tensor | None, start: Tensor | None,
              causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """q [B, S, H, K], k and v [B, L, G, K], segments [B, S] and [B, L] -> [B, S, H, K], log-sum-exp [B, H, S].

    A row that sees nothing gives zeros.
    """
    q, k, v = map(_dense, (q, k, v))
    rows, columns = ids(rows, len(q)), ids(columns, len(q))
    out, lse = torch.empty(q.shape, dtype=q.dtype), torch.empty(len(q), q.shape[2], q.shape[1])
    _run("attention_forward", _problem(q, k, rows, columns, start, causal, lse, None, None, None, v, out), scale)
    return out, lse


@torch.library.custom_op("mmfunc::cpu_attention_backward", mutates_args=(), device_types="cpu",
                         tags=[torch.Tag.flexible_layout])
def attention_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rows: Tensor | None,
                       columns: Tensor | None, start: Tensor | None, causal: bool, scale: float
                       ) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    g, q, k, v, out, lse = *map(_dense, (g, q, k, v, out)), lse.contiguous()
    rows, columns = ids(rows, len(q)), ids(columns, len(q))
    found = [torch.empty(t.shape, dtype=t.dtype) for t in (q, k, v)]
    splits = min(ceil(k.shape[1] / BLOCK), ceil(ITEMS / (len(q) * k.shape[2])))
    sums = torch.empty(splits, *lse.shape[:2], ceil(q.shape[1] / SOME) * SOME, ceil(q.shape[3] / 16) * 16)
    touched = torch.zeros(splits, *lse.shape[:2], ceil(q.shape[1] / BLOCK), dtype=torch.bool)
    delta = torch.empty_like(lse)
    given = _problem(q, k, rows, columns, start, causal, lse, delta, sums, touched, v, out, g, *found)
    _run("attention_backward", given, scale)
    return tuple(found)


# of few queries, as in decoding, for which keys and values are read once; csrc/torch_ops.cpp has it; no gradient
_ops = torch.library.Library("mmfunc", "FRAGMENT")
_ops.define("cpu_attention_few(Tensor q, Tensor k, Tensor v, Tensor? rows, Tensor? columns, Tensor? start, "
            "bool causal, float scale) -> Tensor", tags=torch.Tag.flexible_layout)


@torch.library.register_fake("mmfunc::cpu_attention_few")
def _(q: Tensor, *rest) -> Tensor:
    return q.new_empty(q.shape)


@attention.register_fake
def _(q: Tensor, *rest) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


@attention_backward.register_fake
def _(g: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.causal, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])


def _backward(ctx, g: Tensor, _: Tensor | None) -> tuple:
    return *attention_backward(g, *ctx.saved_tensors, ctx.causal, ctx.scale), None, None, None, None, None


attention.register_autograd(_backward, setup_context=_keep)


def _flops(q: tuple, k: tuple, products: int, causal: bool, start: object) -> int:
    (batch, queries, heads, width), keys = q, k[1]
    seen = sum(min(keys, i + 1) for i in range(queries)) if causal and start is None else queries * keys
    return 2 * products * batch * heads * seen * width


@register_flop_formula([torch.ops.mmfunc.cpu_attention, torch.ops.mmfunc.cpu_attention_few])
def _(q: tuple, k: tuple, v: tuple, rows: object, columns: object, start: object, causal: bool, *rest, **more) -> int:
    return _flops(q, k, 2, causal, start)


@register_flop_formula(torch.ops.mmfunc.cpu_attention_backward)
def _(g: tuple, q: tuple, k: tuple, v: tuple, out: tuple, lse: tuple, rows: object, columns: object, start: object,
      causal: bool, *rest, **more) -> int:
    return _flops(q, k, 5, causal, start)
