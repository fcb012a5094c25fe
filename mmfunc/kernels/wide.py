"""Matrix products and convolutions of 16-bit numbers on CPUs that have no instructions for them: in float32.

There PyTorch widens the numbers within its kernel, which takes five times as long as widening them before a float32
one (an Intel Xeon with AVX-512 but no AVX512-BF16, 2 threads: 62 GFLOP/s against 305). Products are summed in float32
either way, and results are rounded once.
"""

import platform
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

FEW = 32  # rows of a product: with fewer, widening the other side takes longer than it saves
_ops = torch.library.Library("mmfunc", "FRAGMENT")


def _widened(op: Callable, *args: Any) -> Any:
    """op(*args) in float32."""
    dtype = next(a.dtype for a in args if isinstance(a, Tensor))
    return tree_map_only(Tensor, lambda t: t.to(dtype), op(*tree_map_only(Tensor, Tensor.float, args)))


def _wide(name: str) -> tuple[Any, Any]:
    """An operation of aten, and mmfunc::wide_<name>, the same on float32 copies, which do not outlive it. Inductor
    would join conversions with what uses their results, and so keep float32 copies as long as these are needed."""
    op = getattr(torch.ops.aten, name).default
    _ops.define(str(op._schema).replace(f"aten::{name}", f"wide_{name}"), tags=torch.Tag.flexible_layout)
    _ops.impl(f"wide_{name}", partial(_widened, op), "CPU")
    torch.library.register_fake(f"mmfunc::wide_{name}", op)
    return op, getattr(torch.ops.mmfunc, f"wide_{name}").default


WIDE = dict(map(_wide, ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")))
DENSE = torch.ops.aten.mm.default, torch.ops.aten.addmm.default


@cache
def slow() -> tuple[torch.dtype, ...]:
    """The 16-bit dtypes that this CPU has no products for; none of a CPU that is not known."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ()
    known = getattr(torch.cpu, "get_capabilities", dict)()
    has = lambda *names: any(known.get(n, getattr(torch.cpu, f"_is_{n}_supported", bool)()) for n in names)
    needed = {torch.bfloat16: ("avx512_bf16", "amx_bf16", "avx10_2"), torch.float16: ("avx512_fp16", "amx_fp16")}
    return tuple(dtype for dtype, names in needed.items() if not has(*names))


def call(fn: Callable, x: Tensor, *args: Any) -> Tensor:
    """fn(x, *args), op by op and without gradients, in float32 where that is faster."""
    if (torch.compiler.is_compiling() or torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype not in slow()
            or x.numel() < FEW * x.shape[-1]):
        return fn(x, *args)
    return _widened(fn, x, *args)


def _suits(node: fx.Node) -> bool:
    """Whether a node is a product that is to be widened."""
    if node.op != "call_function" or node.target not in WIDE:
        return False
    few = node.target in DENSE and node.args[-2].meta["val"].shape[0] < FEW
    given = [n.meta["val"] for n in node.all_input_nodes]
    return not few and all(t.device.type == "cpu" and t.dtype in slow() for t in given)


def widen(graph: fx.Graph) -> None:
    """Put the products of a graph in float32."""
    for node in filter(_suits, graph.nodes):
        node.target = WIDE[node.target]
