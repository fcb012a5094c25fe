"""The GE graphs that torchair makes of a program, on a machine without NPU and CANN.

Within `offline`, torch.compile with torchair's backend does all that it does on a device (Dynamo, AOT Autograd with its
partitioner, the passes over FX, the converters, the passes over the GE graph) but for the last step: instead of GE a
function of ours gets the finished graph and its inputs.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from google.protobuf import text_format
from torch import Tensor
from torch._guards import TracingContext, detect_fake_mode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torchair._ge_concrete_graph import fx2ge_converter
from torchair.core import _torchair
from torchair.ge._ge_graph import GeGraph

from mmfunc.kernels.ge import backend, interpreter, own
from mmfunc.shard.mesh import Mesh, connect

aten = torch.ops.aten


@dataclass
class Record:
    """What was lowered: graphs in the order in which they were made, operations converted, and those that failed."""

    graphs: list[GeGraph] = field(default_factory=list)
    converted: Counter = field(default_factory=Counter)  # operation: times
    failed: dict[str, list[tuple[str, str]]] = field(default_factory=dict)  # operation: (line of the program, why)
    expected: dict[str, dict[str, tuple]] = field(default_factory=dict)  # graph, name of a tensor: (shape, dtype) in FX
    single: int = 0  # graphs among those, of one operation each (Singly)

    def texts(self) -> list[str]:
        """The graphs as text."""
        return [text_format.MessageToString(g._proto) for g in self.graphs]


def _is_view(target: Any) -> bool:
    """Whether an operation gives its input in another shape."""
    return any(r.alias_info is not None for r in target._schema.returns) if hasattr(target, "_schema") else True


def _note(expected: dict[str, tuple], out: Any, meta: Any) -> None:
    """Remember which shape and dtype FX has for a tensor of GE."""
    if isinstance(out, (list, tuple)):
        for one, said in zip(out, meta):
            _note(expected, one, said)
    elif isinstance(meta, Tensor) and hasattr(out, "tensor"):
        expected.setdefault(out.tensor, (list(meta.shape), meta.dtype))


def _parser(record: Record) -> Callable:
    """GeConcreteGraph's conversion of one node, which notes what it does and goes on after a failure."""
    real = fx2ge_converter.GeConcreteGraph._parse_node_internal

    def parse(self: Any, target: Any, args: tuple, kwargs: dict, meta: Any) -> Any:
        try:
            # not the caller's, within which a backward pass is compiled
            with unset_fake_temporarily(), detect_fake_mode(meta) or nullcontext():
                out = real(self, target, args, dict(kwargs), meta)
        except Exception as e:  # whatever it is, the operations after it are still to be counted
            why = (str(e).strip().splitlines() or [""])[0]
            where = backend.line(self._converter_ctx.node)
            record.failed.setdefault(str(target), []).append((where, f"{type(e).__name__}: {why}"))
            out = self._create_mock_node_for_op(target, args, kwargs)
            if isinstance(meta, (list, tuple)):  # numbers stay numbers
                out = [m if isinstance(m, (int, float)) else o for o, m in zip(out, meta)]
            fx2ge_converter.set_ge_outputs(out, meta)
            _note(record.expected.setdefault(self.graph.name, {}), out, meta)
            return out
        record.converted[str(target)] += 1
        if not _is_view(target):  # torchair carries views along and works them out where they are read
            _note(record.expected.setdefault(self.graph.name, {}), out, meta)
        return out

    return parse


@contextmanager
def rank(mesh: Mesh):
    """Within, this process is the first rank of a mesh whose others are not there, and say what it says; gives its
    Net."""
    def repeat(out: list, said: object, group: Any = None) -> None:
        out[:] = [said] * len(out)

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=mesh.world)
    try:
        with mock.patch.object(dist, "all_gather_object", repeat):
            yield connect(mesh, "npu")
    finally:
        dist.destroy_process_group()


@contextmanager
def offline(run: Callable[[GeGraph, list[Tensor]], list[Tensor]]):
    """Within, torchair needs no engine: run(graph, inputs) gives what a compiled graph returns. Yields the Record."""
    record = Record()
    patches = [(fx2ge_converter, "initialize_graph_engine", lambda *a, **k: None),
               (_torchair, "check_cann_compat", lambda *a, **k: ""),  # "" stands for the newest CANN
               (_torchair, "get_registered_ir_def", own.declared),
               (fx2ge_converter.GeConcreteGraph, "_parse_node_internal", _parser(record)),
               (backend, "has_converter", lambda op: True),  # the failures are counted
               (fx2ge_converter.GeConcreteGraph, "update_graph_with_runtime", lambda *a: None),  # formats of the memory
               (GeGraph, "load", lambda self, *a, **k: record.graphs.append(self)),
               (GeGraph, "compile", lambda self: None),
               (GeGraph, "run", lambda self, inputs, assigned=(), stream=None: run(self, inputs))]
    with ExitStack() as stack:
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield record


# views, of which GE has operations that copy
COPIES = {aten.expand.default, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int}


class Singly(TorchDispatchMode):
    """Within, an operation outside of compiled graphs, which a device runs by itself, is lowered as a graph of its own.

    So a program in parts has the types of operations that it has as one graph. compiled makes a function of tensors one
    that is compiled.
    """

    def __init__(self, record: Record, compiled: Callable):
        super().__init__()
        self.record, self.compiled = record, compiled
        self.known: dict[str, Callable] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Whether functions are compiled within."""
        return True

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = op(*args, **kwargs or {})
        leaves, spec = torch.utils._pytree.tree_flatten((args, kwargs or {}))
        given = {i: t for i, t in enumerate(leaves) if isinstance(t, Tensor)}
        runs = given and all(t.device.type == "npu" for t in given.values()) and isinstance(out, (Tensor, tuple, list))
        if TracingContext.try_get() or not runs or (_is_view(op) and op not in COPIES):
            return out

        def single(*tensors: Tensor) -> Any:
            filled = dict(enumerate(leaves)) | dict(zip(given, tensors))
            args, kwargs = torch.utils._pytree.tree_unflatten(list(filled.values()), spec)
            return op(*args, **kwargs)

        like = {i: (t.shape, t.stride(), t.dtype) for i, t in given.items()}
        key = str((op, spec, *(like.get(i, x) for i, x in enumerate(leaves))))
        if key not in self.known:
            self.known[key] = self.compiled(single)
            self.record.single += 1
        self.known[key](*given.values())
        return out


@contextmanager
def simulated():
    """Within, jitted functions of the backend "npu" run on this machine: their GE graphs by the interpreter."""
    def run(graph: GeGraph, inputs: list[Tensor]) -> list[Tensor]:
        found = interpreter.run(graph, [t.cpu() for t in inputs], record.expected.get(graph.name))
        return [t.contiguous().to("npu") for t in found]

    with offline(run) as record:
        yield record
