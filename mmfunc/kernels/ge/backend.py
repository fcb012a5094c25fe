"""torchair as a backend for torch.compile, which says what cannot be lowered before anything is compiled."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchair
from torch import Tensor
from torchair._ge_concrete_graph.fx2ge_converter import _CONVERTERS

from mmfunc.kernels.ge import own
from mmfunc.kernels.ge.converters import DECOMPOSITIONS

PLACE = re.compile(r'File "([^"]*)", line (\d+), in (\S+)')
HOUSE = str(Path(__file__).parents[2])
LACKING = {torch.float64, torch.complex32, torch.complex64, torch.complex128}  # dtypes that cube and vector units lack


def line(node: torch.fx.Node) -> str:
    """The line of a program that an operation comes from: the innermost of a family, of a user's code, of mmfunc."""
    found = PLACE.findall(node.meta.get("stack_trace") or "")
    for of in (lambda f: "/mmfunc/models/" in f, lambda f: HOUSE not in f and "site-packages" not in f, lambda f: True):
        if here := [f"{Path(f).name}:{n} in {name}" for f, n, name in found if of(f)]:
            return here[-1]
    return "no known line"


def has_converter(op: Any) -> bool:
    """Whether torchair or mmfunc has a converter that does more than raise."""
    if not isinstance(op, torch._ops.OpOverload):
        return True  # getitem and other functions of Python
    found = getattr(op, "_ge_converter", None) or _CONVERTERS.get(op)
    while hasattr(found, "__wrapped__"):
        found = found.__wrapped__
    return found is not None and found.__code__.co_names not in (("NotImplementedError",), ("RuntimeError",))


def refuse(graph: torch.fx.GraphModule) -> None:
    """A ValueError for a graph that no NPU can run."""
    for node in graph.graph.nodes:
        for t in torch.utils._pytree.tree_leaves(node.meta.get("val")):
            sizes = t.shape if isinstance(t, Tensor) else [t]
            if any(isinstance(n, torch.SymInt) for n in sizes):
                raise ValueError(f"{node.name} has a size that is not known ({line(node)}); graphs for NPUs have fixed "
                                 "shapes: pad to declared ones (jit's buckets)")
            if isinstance(t, Tensor) and t.dtype in LACKING:
                raise ValueError(f"{node.name} is {str(t.dtype)[6:]} ({line(node)}), which NPUs lack; use float32, or "
                                 "pairs of real numbers")
        if node.op == "call_function" and own.lacking(node.target):
            raise ValueError(f"CANN does not know {own.kind(node.target.name()[8:])} ({line(node)}): python -m "
                             "mmfunc.kernels.ascend_build makes a package of it, to be installed")
        if node.op == "call_function" and not has_converter(node.target):
            raise ValueError(f"torchair has no converter for {node.target} ({line(node)}); write the line in other "
                             "operations, or add one to mmfunc/kernels/ge/converters.py")


def share(graph: torch.fx.GraphModule) -> None:
    """Compute once what each pass, forward or backward, computes twice: tables of angles, masks. What a remat policy
    computes again stays, and so do results of the graph."""
    seen: dict[tuple, torch.fx.Node] = {}
    given = graph.graph.output_node().all_input_nodes
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or node in given or node.is_impure() or node.name.endswith("_recomputed"):
            continue
        key = node.target, bool(node.meta.get("autograd_backward")), str(node.args), str(node.kwargs)
        if key not in seen:
            seen[key] = node
        elif torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
            node.replace_all_uses_with(seen[key])
            graph.graph.erase_node(node)
    graph.recompile()


def backend() -> Callable:
    """torchair's backend, in its mode for whole graphs, with our decompositions and converters."""
    config = torchair.CompilerConfig()

    def before(graph: torch.fx.GraphModule, *rest: Any) -> None:
        share(graph)
        refuse(graph)

    config.post_grad_custom_pre_pass = before
    return torchair.get_npu_backend(compiler_config=config, custom_decompositions=DECOMPOSITIONS)
