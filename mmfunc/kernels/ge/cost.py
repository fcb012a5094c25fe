"""FLOPs, bytes and a roofline time of a GE graph on an Ascend 910B, by type of operation; from shapes alone."""

from collections import Counter
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from mmfunc.kernels.ascend_ops import AttentionTiling
from mmfunc.kernels.ge import interpreter, own
from mmfunc.kernels.ge.lowering import Record
from mmfunc.kernels.ge.operations import VIEWS

CUBE = {torch.bfloat16: 353.9e12, torch.float16: 353.9e12, torch.float32: 88.5e12}  # FLOP/s of a 910B2, by dtype
MEMORY = 1.6 * 2**40  # bytes/s
PRODUCTS = {"MatMul", "MatMulV2", "BatchMatMul", "BatchMatMulV2"}
OURS = {"GeluV2", "GeluGradV2", "FlashAttentionScore", "FlashAttentionScoreGrad", *own.KINDS}  # by our converters


def flops(op: Any, given: list[Tensor | None], found: tuple[Tensor, ...]) -> int:
    """Multiply-adds count 2; elementwise operations count nothing."""
    kind, shape = op.type, found[0].shape
    if kind in PRODUCTS:
        across = any(op.attr[n].b for n in ("transpose_x1", "adj_x1") if n in op.attr)
        return 2 * found[0].numel() * given[0].shape[-2 if across else -1]
    if kind.startswith("FlashAttentionScore"):
        q, k = (t.shape for t in given[:2])
        order = op.attr["input_layout"].s.decode()
        rows = {"BNSD": (2, 0), "BSND": (1, 0), "BSH": (1, 0), "SBH": (0, 1)}[order]
        width = prod(q) // (q[rows[0]] * q[rows[1]])  # of all heads together
        seen = q[rows[0]] * k[rows[0]] // (2 if op.attr["sparse_mode"].i == 2 else 1)
        return (10 if kind.endswith("Grad") else 4) * q[rows[1]] * seen * width
    if kind in ("MmfuncAttentionForward", "MmfuncAttentionBackward"):
        t = AttentionTiling(*op.attr["whole"].list.i, *op.attr["real"].list.f)
        seen = t.queries * t.keys // (2 if t.right == 0 else 1)
        return (10 if kind.endswith("Backward") else 4) * t.batch * t.heads * seen * t.width
    if kind.endswith("BackpropInput"):
        return 2 * given[2].numel() * prod(given[1].shape[1:])
    if kind.endswith("BackpropFilter"):
        return 2 * given[2].numel() * prod(shape[1:])
    if kind in ("Conv2DTranspose", "Conv3DTranspose"):
        return 2 * given[1].numel() * prod(given[2].shape[1:])
    return 2 * found[0].numel() * prod(given[1].shape[1:]) if kind in ("Conv2D", "Conv3D") else 0


@dataclass
class Cost:
    """Sums by type of operation."""

    count: Counter = field(default_factory=Counter)
    flops: Counter = field(default_factory=Counter)
    bytes: Counter = field(default_factory=Counter)
    seconds: Counter = field(default_factory=Counter)
    undeclared: Counter = field(default_factory=Counter)  # dtypes that torchair's table does not allow

    def add(self, other: "Cost") -> None:
        """Take another's sums in."""
        for name in ("count", "flops", "bytes", "seconds", "undeclared"):
            getattr(self, name).update(getattr(other, name))

    def watch(self, op: Any, given: list[Tensor | None], found: tuple[Tensor, ...]) -> None:
        """Count one operation; what is small enough to be a constant counts as nothing."""
        self.count[op.type] += 1
        self.undeclared.update(interpreter.undeclared(op, given))
        if op.type in VIEWS or not any(t.is_meta for t in found):
            return
        moved = sum(t.numel() * t.element_size() for t in (*given, *found) if t is not None)
        done = flops(op, given, found)
        self.flops[op.type] += done
        self.bytes[op.type] += moved
        self.seconds[op.type] += max(done / CUBE.get(found[-1].dtype, CUBE[torch.float32]), moved / MEMORY)


def cost(graph: Any, inputs: list[Tensor], record: Record) -> tuple[Cost, list[Tensor]]:
    """What a graph costs, and its results on the meta device. Each operation reads and writes memory: no fusion."""
    total = Cost()
    with unset_fake_temporarily():  # constants have values here
        meta = [torch.empty(t.shape, dtype=t.dtype, device="meta") for t in inputs]
        return total, interpreter.run(graph, meta, record.expected.get(graph.name, {}), total.watch, record.failed)
