"""What a function does before it runs: its graph of operations, FLOPs and bytes, memory over time; all from shapes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._functorch._activation_checkpointing.remat_using_tags_for_fwd_loss_bwd_graph_pass import (
    remat_using_tags_for_fwd_loss_bwd_graph,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import traceback
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import flop_registry

from mmfunc.signature import named


@dataclass(frozen=True)
class Lowered:
    """A traced function; nothing of it was allocated or run."""

    graph: torch.fx.GraphModule
    inputs: list[Tensor]  # fake
    shape: Callable  # (args, output tensors) -> the function's result
    donated: int  # how many of the inputs are updated in place
    backend: str

    def text(self) -> str:
        """The graph, a line an operation with shapes and dtypes."""
        return self.graph.print_readable(print_output=False, include_stride=False)

    def cost(self) -> dict[str, Any]:
        """FLOPs (1 multiply-add = 2; matrix products, convolutions, attention), in all and by operation, and bytes moved."""
        by_op: dict[str, int] = {}
        moved = 0
        for node in calls(self.graph):
            values = [a for a in torch.utils._pytree.tree_leaves((vals(node.args), vals(node.kwargs))) if isinstance(a, Tensor)]
            moved += sum(t.nbytes for t in (*values, *outputs(node)) if not is_view(node))
            count = flop_registry.get(getattr(node.target, "_overloadpacket", None))
            if count is not None:
                name = str(node.target).removeprefix("aten.")
                by_op[name] = by_op.get(name, 0) + int(count(*vals(node.args), **vals(node.kwargs), out_val=node.meta["val"]))
        return {"flops": sum(by_op.values()), "flops_by_op": by_op, "bytes": moved, "collectives": {}}

    def memory(self) -> dict[str, int]:
        """Bytes: arguments, outputs that are new, temporary (most held at once beside both), and peak, their sum."""
        nodes = list(self.graph.graph.nodes)
        last: dict[int, int] = {}
        for i, node in enumerate(nodes):
            for n in (node, *node.all_input_nodes):
                last |= {storage(t): i for t in outputs(n)}
        given = {storage(t) for n in nodes if n.op == "placeholder" for t in outputs(n)}
        kept = {storage(t) for n in nodes[-1].all_input_nodes for t in outputs(n)} - given
        live, size, held, most = set(given), {}, 0, 0
        for i, node in enumerate(nodes[:-1]):
            for t in outputs(node):
                if storage(t) not in live:
                    live.add(storage(t))
                    size[storage(t)] = t.untyped_storage().nbytes()
                    held += size[storage(t)]
            most = max(most, held)
            gone = [s for n in (node, *node.all_input_nodes) for s in {storage(t) for t in outputs(n)}
                    if s in size and last[s] == i and s not in kept]
            held -= sum(size.pop(s) for s in set(gone))
        arguments = sum(t.nbytes for t in self.inputs)
        new = sum(size.get(s, 0) for s in kept)
        return {"arguments": arguments, "outputs": new, "temporary": max(most - new, 0), "peak": arguments + max(most, new)}

    def compile(self) -> Callable:
        """The function for arguments of these shapes, compiled ahead of its first call."""
        call = self.graph
        if self.backend == "inductor":
            from torch._inductor.compile_fx import compile_fx

            call = compile_fx(self.graph, self.inputs)

        def run(*args: Any) -> Any:
            with torch.no_grad():
                return self.shape(args, list(call(*[t for _, t in named(args) if isinstance(t, Tensor)])))

        return run


def backward():
    """Marks the operations of a backward pass, so that what a remat policy runs again is found in the graph."""
    return traceback.annotate({"phase": "backward"})


def trace(body: Callable, args: tuple, shape: Callable, donated: int, backend: str) -> Lowered:
    """Record what body, a function of a list of tensors, does on tensors like those of args."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        inputs = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu" if t.is_meta else t.device)
                  for _, t in named(args) if isinstance(t, Tensor)]
        with traceback.preserve_node_meta():
            graph = make_fx(lambda *tensors: body(list(tensors)), tracing_mode="fake")(*inputs)
        graph = remat_using_tags_for_fwd_loss_bwd_graph(graph)
    graph.graph.eliminate_dead_code()
    return Lowered(graph, inputs, shape, donated, backend)


def calls(graph: torch.fx.GraphModule) -> list[torch.fx.Node]:
    """The operations of a graph."""
    return [n for n in graph.graph.nodes if n.op == "call_function"]


def vals(args: Any) -> Any:
    """Arguments of a node with tensors in place of nodes."""
    return torch.fx.node.map_arg(args, lambda n: n.meta.get("val"))


def outputs(node: torch.fx.Node) -> list[Tensor]:
    """The tensors that a node gives."""
    return [t for t in torch.utils._pytree.tree_leaves(node.meta.get("val")) if isinstance(t, Tensor)]


def storage(t: Tensor) -> int:
    """Which memory a tensor lies in."""
    return t.untyped_storage()._cdata


def is_view(node: torch.fx.Node) -> bool:
    """Whether a node only looks at its input in another way."""
    seen = {storage(t) for n in node.all_input_nodes for t in outputs(n)}
    return bool(outputs(node)) and all(storage(t) in seen for t in outputs(node))
