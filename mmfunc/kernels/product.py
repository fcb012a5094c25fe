"""Dense maps of a few rows, as in decoding: bound by reading the weight, which csrc/cpu_matvec.cpp does once, in order.

PyTorch's product reads a bfloat16 weight at a third to a half of the bandwidth of a CPU then. A weight may be int8,
with scales [N, G] in the dtype of x: a row is G groups of ceil(K / G) numbers, of which the last may have fewer.
"""

from math import prod
from operator import getitem

import torch
from torch import Tensor, fx
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from mmfunc.kernels import native, wide

FEW = 8  # rows, as in the source

# csrc/torch_ops.cpp has them; no gradient
_ops = torch.library.Library("mmfunc", "FRAGMENT")
_ops.define("cpu_matvec(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_ops.define("cpu_matvecs(Tensor x, Tensor[] weights, Tensor?[] biases) -> Tensor[]")
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


@torch.library.register_fake("mmfunc::cpu_matvec")
@torch.library.register_fake("mmfunc::cpu_matvec_int8")
def _(x: Tensor, weight: Tensor, *more: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(weight)))


@torch.library.register_fake("mmfunc::cpu_matvecs")
def _(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], len(w))) for w in weights]


@register_flop_formula([torch.ops.mmfunc.cpu_matvec, torch.ops.mmfunc.cpu_matvec_int8])
def _(x: tuple, weight: tuple, *rest, **more) -> int:
    return 2 * prod(x) * weight[0]


def gather(graph: fx.Graph) -> None:
    """Products of the same rows with weights that a graph is given become one call: queries, keys and values, or the
    gate and the up map of an MLP."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.find_nodes(op="call_function", target=torch.ops.mmfunc.cpu_matvec.default):
        if all(n.op == "placeholder" for n in node.all_input_nodes if n is not node.args[0]):
            found.setdefault(node.args[0], []).append(node)
    for nodes in found.values():
        if len(nodes) == 1:
            continue
        with graph.inserting_before(nodes[0]):
            given = nodes[0].args[0], *([n.args[i] for n in nodes] for i in (1, 2))  # these rows may be new by now
            together = graph.call_function(torch.ops.mmfunc.cpu_matvecs.default, given)
            parts = [graph.call_function(getitem, (together, i)) for i in range(len(nodes))]
        together.meta["val"] = [n.meta["val"] for n in nodes]
        for node, part in zip(nodes, parts):
            part.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(part)
            graph.erase_node(node)
