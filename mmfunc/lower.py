"""What a function does before it runs: its graph of operations, FLOPs and bytes, memory over time; all from shapes."""

from collections.abc import Callable, Container
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._functorch._activation_checkpointing.remat_using_tags_for_fwd_loss_bwd_graph_pass import (
    remat_using_tags_for_fwd_loss_bwd_graph,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx import Node, traceback
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode

from mmfunc import shard, tree
from mmfunc.kernels import cpu  # noqa: F401  its operations have their FLOPs in torch's table
from mmfunc.signature import named

aten = torch.ops.aten


def _attention_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **kwargs: Any) -> int:
    return flop_counter.sdpa_backward_flop_count(g.shape, q.shape, k.shape, v.shape)


FLOPS = flop_counter.flop_registry | {  # of a call, from its arguments; what torch's own table lacks
    aten._scaled_dot_product_flash_attention_for_cpu:
        flop_counter.flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten.mv: lambda a, b, **kwargs: 2 * a.numel(),
    aten.dot: lambda a, b, **kwargs: 2 * a.numel(),
}


SENT = {  # bytes that a rank sends for a byte of input, where ranks form a ring: (arguments, ranks)
    "all_gather": lambda args, n: n - 1,
    "reduce_scatter": lambda args, n: 1 - 1 / n,
    "all_reduce": lambda args, n: 2 * (1 - 1 / n),
    "all_to_all": lambda args, n: 1 - min(args[2]) / max(sum(args[2]), 1),  # its own part stays
}


@dataclass(frozen=True)
class Lowered:
    """A traced function; nothing of it was allocated or run."""

    graph: torch.fx.GraphModule
    inputs: list[Tensor]  # fake
    shape: Callable  # (args, output tensors) -> the function's result
    backend: str
    options: dict[str, Any]  # of the backend
    groups: dict[str, tuple[str, int]] = field(default_factory=dict)  # by name: axes of the mesh, and ranks

    def text(self) -> str:
        """The graph, a line an operation with shapes and dtypes."""
        return self.graph.print_readable(print_output=False, include_stride=False)

    def cost(self) -> dict[str, Any]:
        """FLOPs (a multiply-add is 2; matrix products, convolutions, attention) in all and by operation, and bytes.

        Bytes are those that each operation reads and writes: what fusion saves is not known here.
        """
        by_op: dict[str, int] = {}
        moved = 0
        for node in calls(self.graph):
            if not is_view(node):
                moved += sum(t.nbytes for n in (node, *node.all_input_nodes) for t in outputs(n))
            if flops := flops_of(node):
                name = str(node.target).removeprefix("aten.")
                by_op[name] = by_op.get(name, 0) + flops
        return {"flops": sum(by_op.values()), "flops_by_op": by_op, "bytes": moved,
                "collectives": self.collectives(calls(self.graph))}

    def collectives(self, nodes: list[Node]) -> dict[str, dict[str, dict[str, float]]]:
        """What a rank sends: by axes of the mesh ("ring+ulysses") and kind, how many calls and bytes, in rings."""
        found: dict[str, dict[str, dict[str, float]]] = {}
        for n in nodes:
            kind = str(n.target).partition("_c10d_functional.")[2].partition(".")[0].removesuffix("_single")
            kind = kind.removesuffix("_into_tensor").removesuffix("_tensor")
            if kind not in SENT:
                continue
            axes, ranks = self.groups[n.args[-1]]
            entry = found.setdefault(axes, {}).setdefault(kind, {"calls": 0, "bytes": 0})
            entry["calls"] += 1
            entry["bytes"] += sum(t.nbytes for t in outputs(n.args[0])) * SENT[kind](n.args, ranks)
        return found

    def memory(self) -> dict[str, int]:
        """Bytes: arguments, outputs that are new, temporary (most held at once beside both), and peak, their sum.

        As if each operation had its own result: what fusion saves is not known here. A donated state is no output.
        """
        timeline, kept = self.held()
        arguments, most = sum(t.nbytes for t in self.inputs), max(during for during, _ in timeline)
        return {"arguments": arguments, "outputs": kept, "temporary": most - kept, "peak": arguments + most}

    def held(self, own: dict[Node, dict[int, int]] | None = None, more: dict[Node, dict[int, int]] | None = None,
             inside: Container[Node] = ()) -> tuple[list[tuple[int, int]], int]:
        """Bytes beside the arguments while each node runs and after it, and of new outputs. own: as of owned(); more:
        what nodes read besides; inside: nodes that may write where something lies that they read last."""
        nodes, own = list(self.graph.graph.nodes), own or owned(self.graph)
        reads = lambda n: {s: b for m in n.all_input_nodes for s, b in own[m].items()} | (more or {}).get(n, {})
        touched = {n: own[n] | reads(n) for n in nodes}
        given = {s for n in nodes if n.op == "placeholder" for s in own[n]}
        kept = touched[nodes[-1]].keys() - given
        last = {s: i for i, n in enumerate(nodes) for s in touched[n]}
        size: dict[int, int] = {}
        timeline, now = [], 0
        for i, n in enumerate(nodes[:-1]):
            new = {s: b for s, b in own[n].items() if s not in size and s not in given}
            size |= new
            gone = {s: size[s] for s in touched[n] if last[s] == i and s in size and s not in kept}
            now += sum(new.values())
            same = {gone[s] for s in gone.keys() - new} & {*new.values()} if n in inside else ()
            timeline.append((now - max(same, default=0), now - sum(gone.values())))
            now = timeline[-1][1]
        return timeline, sum(size.get(s, 0) for s in kept)

    def compile(self) -> Callable:
        """The function for arguments of these shapes, compiled ahead of its first call."""
        self.graph.recompile()
        call = self.graph
        if self.backend == "inductor":
            from torch._inductor.compile_fx import compile_fx

            call = compile_fx(self.graph, self.inputs, config_patches=self.options)

        def run(*args: Any) -> Any:
            with torch.no_grad():
                return self.shape(args, list(call(*[t for _, t in named(args) if isinstance(t, Tensor)])))

        return run


class Seeing(TorchDispatchMode):
    """Calls see(x) for each argument of each operation within."""

    def __init__(self, see: Callable):
        super().__init__()
        self.see = see

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        for x in torch.utils._pytree.tree_leaves((args, kwargs)):
            self.see(x)
        return op(*args, **kwargs or {})


def backward():
    """Marks the operations of a backward pass, so that what a remat policy runs again is found in the graph."""
    return traceback.annotate({"phase": "backward", "remat_pass_tag": "is_backward"})  # for torch 2.13; for 2.11


def unmark() -> None:
    """Ends the marks of a remat policy, which would last to the end of the graph."""
    for name in ("ac_graph_id", "recompute"):
        traceback.current_meta.pop(name, None)


def tracing() -> bool:
    """Whether operations are recorded in a graph just now."""
    return get_proxy_mode() is not None


def trace(flattened: Callable, args: tuple, backend: str, options: dict[str, Any]) -> Lowered:
    """Record what a function does on tensors like those of args.

    flattened(write) gives it as a function of a list of tensors, and what shapes its results; where the function is to
    overwrite a state it calls write(old, new).
    """
    writes: list[tuple[Tensor, Tensor]] = []
    body, shape = flattened(lambda old, new: writes.extend(zip(tree.leaves(old), tree.leaves(new), strict=True)))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        inputs = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu" if t.is_meta else t.device)
                  for _, t in named(args) if isinstance(t, Tensor)]
        with traceback.preserve_node_meta():
            graph = make_fx(partial(_functional, body, writes), tracing_mode="fake")(*inputs)
        plain, graph = graph, remat_using_tags_for_fwd_loss_bwd_graph(graph)
        graph.graph.eliminate_dead_code()
        if graph is not plain:  # what is run again has results of its own
            FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*inputs)
    _sink(graph)
    net = shard.using() and shard.using().net
    groups = {name: ("+".join(axes), net.size(axes)) for axes, name in net.groups.items()} if net else {}
    return Lowered(graph, inputs, shape, backend, options, groups)


def _functional(body: Callable, writes: list, *tensors: Tensor) -> list[Tensor]:
    """body with its operations in place replaced; what it overwrites of its arguments is written at the end."""
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.Functionalize)):
        with FunctionalTensorMode():
            given = [FunctionalTensor.to_functional(t) for t in tensors]
            out = [_plain(t) for t in body(given)]
            new = {id(old): _plain(t) for old, t in writes if t is not old}
            ends = [new.get(id(g), _plain(g)) for g in given]
    for t, end in zip(tensors, ends):
        if end is not t:
            t.copy_(end)
    return out


def _plain(t: Tensor) -> Tensor:
    if not isinstance(t, FunctionalTensor):
        return t
    torch._sync(t)
    return torch._from_functional_tensor(t.elem)


def _sink(graph: torch.fx.GraphModule) -> None:
    """Move each write into an argument to where its value is ready and the old one needed no more, as Inductor does."""
    order = {n: i for i, n in enumerate(graph.graph.nodes)}
    ends = [n for n in calls(graph) if n.target is aten.copy_.default]
    last = {storage(t): n for n in calls(graph) if n not in ends for m in n.all_input_nodes for t in outputs(m)}
    for node in ends:
        old, new = node.args[:2]
        after = max((new, last.get(storage(old.meta["val"]), new)), key=order.__getitem__)
        if after.op != "placeholder":
            after.append(node)


def owned(graph: torch.fx.GraphModule) -> dict[Node, dict[int, int]]:
    """The storages in which the results of each node lie, and their bytes."""
    return {n: {storage(t): t.untyped_storage().nbytes() for t in outputs(n)} for n in graph.graph.nodes}


def flops_of(node: Node) -> int:
    """FLOPs of an operation."""
    count = FLOPS.get(getattr(node.target, "_overloadpacket", None))
    return int(count(*vals(node.args), **vals(node.kwargs), out_val=node.meta["val"])) if count else 0


def calls(graph: torch.fx.GraphModule) -> list[Node]:
    """The operations of a graph."""
    return [n for n in graph.graph.nodes if n.op == "call_function"]


def vals(args: Any) -> Any:
    """Arguments of a node with tensors in place of nodes."""
    return torch.fx.node.map_arg(args, lambda n: n.meta.get("val"))


def outputs(node: Node) -> list[Tensor]:
    """The tensors that a node gives."""
    return [t for t in torch.utils._pytree.tree_leaves(node.meta.get("val")) if isinstance(t, Tensor)]


def storage(t: Tensor) -> int:
    """Which memory a tensor lies in."""
    return t.untyped_storage()._cdata


def is_view(node: Node) -> bool:
    """Whether a node only looks at its input in another way."""
    seen = {storage(t) for n in node.all_input_nodes for t in outputs(n)}
    return bool(outputs(node)) and all(storage(t) in seen for t in outputs(node))
