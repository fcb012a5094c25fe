"""The Ascend C kernels in graphs: mmfunc::norm_forward becomes the operation MmfuncNormForward of GE, and so on.

On a device CANN has to know these operations (`mmfunc.kernels.ascend_build` makes a package of them); offline the same
table answers for it. The interpreter computes them by `ascend_meaning`.
"""

from collections.abc import Callable
from typing import Any

import torch
import torchair
from torch import Tensor
from torchair.core import _torchair

from mmfunc.kernels import ascend_attention  # noqa: F401  with its gradient
from mmfunc.kernels.ascend_build import kind
from mmfunc.kernels.ascend_meaning import MEANINGS
from mmfunc.kernels.ascend_ops import KERNELS, results

ATTRIBUTES = {"blocks": "VT_INT", "whole": "VT_LIST_INT", "real": "VT_LIST_FLOAT", "shapes": "VT_LIST_INT",
              "types": "VT_LIST_INT"}
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 27}  # GE's numbers
KINDS = {kind(name): name for name in KERNELS}


def declared(type_: str) -> tuple[str, list, list, list]:
    """What the registry of CANN answers for one of our operations: status, inputs, outputs, attributes."""
    if type_ not in KINDS:
        return "ERROR", [], [], []
    k = KERNELS[KINDS[type_]]
    how = lambda n: "optional" if f"{n}?" in k.inputs.split() else "required"
    inputs, outputs, _ = k.names()
    return "SUCCESS", [(n, how(n)) for n in inputs], [(n, "required") for n in outputs], list(ATTRIBUTES.items())


def lacking(op: Any) -> bool:
    """Whether an operation is one of our kernels and CANN does not know it."""
    name = getattr(op, "name", str)()
    known = {f"mmfunc::{k}": kind(k) for k in KERNELS}
    return name in known and _torchair.get_registered_ir_def(known[name])[0] != "SUCCESS"


def described(name: str, tensors: list, blocks: int, whole: list[int], real: list[float]) -> tuple[list, list]:
    """Rank and sizes of each output, one after the other, and their types."""
    k = KERNELS[name]
    said = [s or ((0,), tensors[0].dtype) for s in k.shapes(k.tiling(*whole, *real), blocks, *tensors)]
    return [n for shape, _ in said for n in (len(shape), *shape)], [TYPES[dtype] for _, dtype in said]


def converter(name: str) -> Callable:
    """A kernel's arguments to its operation of GE, whose results without scratch are those of the kernel."""
    inputs, outputs, marks = KERNELS[name].names()

    def run(*args: Any) -> Any:
        *tensors, blocks, whole, real = args
        attr, (shapes, types) = torchair.ge.attr, described(name, [t and t.meta for t in tensors], blocks, whole, real)
        found = torchair.ge.custom_op(
            kind(name), inputs=dict(zip(inputs, tensors)), outputs=outputs,
            attrs={"blocks": attr.Int(blocks), "whole": attr.ListInt(whole), "real": attr.ListFloat(real),
                   "shapes": attr.ListInt(shapes), "types": attr.ListInt(types)})
        if len(outputs) == 1:
            return found
        found = [f for f, how in zip(found, marks) if how != "scratch"]
        return tuple(found) if len(found) > 1 else found[0]

    return run


CONVERTERS = {getattr(torch.ops.mmfunc, name).default: converter(name) for name in KERNELS}


def operation(name: str) -> Callable:
    """What a kernel's operation computes; shapes only, where an input is on the meta device."""
    def run(a: dict, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        args = a["blocks"], a["whole"], a["real"]
        if (a["shapes"], a["types"]) != (said := described(name, list(inputs), *args)):
            raise ValueError(f"shapes {a['shapes']} and types {a['types']} of what has {said}")
        if any(t is not None and t.is_meta for t in inputs):
            return results(name, *inputs, *args)
        found = MEANINGS[name](KERNELS[name].tiling(*a["whole"], *a["real"]), a["blocks"], *inputs)
        return tuple(inputs[0].new_empty(0) if t is None else t for t in found)

    return run


OPERATIONS = {type_: operation(name) for type_, name in KINDS.items()}
