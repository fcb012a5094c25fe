"""Partial evaluation: what a function does with arguments that stay is done once, the rest of it at each call.

    made = partial_eval(call, changing=(1, 2))     # call(p, x, time, cond) -> velocity
    kept = made.known(p, x, time, cond)            # of x and time only shapes and dtypes matter
    y = made.rest(kept, x, time)                   # at each step

The function is traced once for a signature, and its graph is cut in two. Known is what depends on no changing argument.
Of that a value is kept if products, convolutions or attention led to it (keys and values of the text), or no argument
at all (rotary angles): it is held for as long as `kept` lives. The rest does again what only moves, casts or looks
at arguments: to keep that would be a second copy of them (weights whose rows change places, int8 ones in bfloat16).
In sampling that leaves what depends on the time: modulation, and FLUX's text from its first block on.
"""

from collections.abc import Callable, Container
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx
from torch._functorch.compile_utils import fx_graph_cse
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from mmfunc import jit
from mmfunc.lower import Lowered, flops_of, is_view
from mmfunc.signature import CompileError, described, difference, distinct, explained, named, signature

aten = torch.ops.aten


@dataclass(frozen=True)
class Kept:
    """What the known part of a function leaves for the rest, for one signature."""

    values: list[Tensor]  # that were computed
    run: Callable  # (changing arguments by position, their tensors) -> the function's result
    key: tuple | None = None  # the signature of the changing arguments; None: any
    leaves: dict[str, tuple] | None = None  # the same, by name


@dataclass
class Partial(jit.Jitted):
    """A function in two parts, each compiled as one graph for each declared signature; it can be called as a whole.
    Seconds of stats are those of the known part."""

    changing: tuple[int, ...] = ()

    def __call__(self, *args: Any) -> Any:
        return self.rest(self.known(*args), *(args[i] for i in self.changing))

    def known(self, *args: Any) -> Kept:
        """What the rest needs, computed; all arguments are given, of those that change only the signature matters.

        The backend "eager" computes nothing ahead. Errors are those of jit: a CompileError for what is no graph, and
        for a signature beyond the buckets.
        """
        if self.backend == "eager":
            return Kept([], lambda given, tensors: self.fn(*(given.get(i, a) for i, a in enumerate(args))))
        return super().__call__(*args)

    def rest(self, kept: Kept, *changing: Any) -> Any:
        """The function's result for the changing arguments, in their order; with another signature than known saw
        they are a CompileError."""
        given = dict(zip(self.changing, changing, strict=True))
        key, tensors = signature(given)
        if kept.key not in (None, key):
            raise CompileError(f"{jit._name(self.fn)} goes on with {difference(described(given), [kept.leaves])}: call "
                               "known with it first")
        with jit.flags(), torch.no_grad(), explained(jit._name(self.fn)):
            return kept.run(given, tensors)

    def parts(self, *args: Any) -> tuple[Lowered, Lowered]:
        """What both parts do, from abstract arguments (on the meta device, or real): nothing is run."""
        return self._parts(args)[:2]

    def _parts(self, args: tuple) -> tuple[Lowered, Lowered, tuple[list[int], list[int]], set[int]]:
        """Both graphs, which of the tensors among args each reads, and which of these change."""
        with explained(jit._name(self.fn)), _compiling():
            low = self.lower(*args)
        low.graph.graph = fx_graph_cse(low.graph.graph)  # else a table of angles is kept for each of its readers
        FakeTensorProp(low.graph, low.inputs[0].fake_mode if low.inputs else None).propagate_dont_convert_inputs(
            *low.inputs)
        names = [n for n, t in named(args) if isinstance(t, Tensor)]
        moving = {i for i, n in enumerate(names) if int(n.partition(".")[0]) in self.changing}
        known, rest, *reads = cut(low.graph, moving)
        fake = lambda g: [n.meta["val"] for n in g.graph.find_nodes(op="placeholder")]
        return *(replace(low, graph=g, inputs=fake(g)) for g in (known, rest)), reads, moving

    def _build(self, args: tuple) -> Callable:
        known, rest, reads, moving = self._parts(args)
        first, then = (self._graph(part) for part in (known, rest))
        given = {i: args[i] for i in self.changing}
        key, leaves = signature(given)[0], described(given)

        def run(tensors: list[Tensor], args: tuple) -> Kept:
            values = first(distinct([tensors[i] for i in reads[0]]))
            stay = {i: tensors[i] for i in reads[1] if i not in moving}  # no others: what was read can go

            def run(given: dict, tensors: list[Tensor]) -> Any:
                now = stay | dict(zip(sorted(moving), tensors))
                return rest.shape((), then(distinct([*(now[i] for i in reads[1]), *values])))

            return Kept(values, run, key, leaves)

        return run

    def _graph(self, part: Lowered) -> Callable:
        """A part compiled, (tensors) -> tensors."""
        forward = part.graph.forward
        if not part.graph.graph.output_node().args[0]:
            return lambda tensors: []

        def body(tensors: list[Tensor]) -> list[Tensor]:
            return forward(*tensors)

        return self._torch(body, jit._name(self.fn), torch.compiler.skip_all_guards_unsafe)


@contextmanager
def _compiling():
    """Operations are traced as torch.compile would have them: some are written in another way op by op."""
    was, torch.compiler._is_compiling_flag = torch.compiler._is_compiling_flag, True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = was


def partial_eval(fn: Callable, changing: tuple[int, ...], backend: jit.Backend = "inductor", *, buckets: int = 1
                 ) -> Partial:
    """fn over trees in two parts; changing: which positional arguments may have new values after the known part, each
    a tree of tensors. backend, buckets: as jit has them. What fn reads besides its arguments is constant."""
    made = jit.jit(fn, backend=backend, buckets=buckets)
    return Partial(**vars(made), changing=tuple(sorted(changing)))


def cut(graph: fx.GraphModule, changing: Container[int]
        ) -> tuple[fx.GraphModule, fx.GraphModule, list[int], list[int]]:
    """A graph as its known part (values to keep) and the rest (its output), by the indices of inputs that change; and
    which inputs each reads. What is kept follows the inputs of the rest."""
    nodes, inputs = list(graph.graph.nodes), graph.graph.find_nodes(op="placeholder")
    moving = {n for i, n in enumerate(inputs) if i in changing} | {n for n in nodes if _unsteady(n)}
    told, worked = set(inputs), set()  # what depends on an argument, on a product or so
    for n in nodes:
        for found in (moving, told, worked):
            if not found.isdisjoint(n.all_input_nodes):
                found.add(n)
        worked |= {n} if flops_of(n) else set()
    keep = {n for n in nodes if n not in moving and _owns(n) and (n in worked or n not in told)}
    rest = _before([nodes[-1], *filter(_unsteady, nodes)], keep)
    kept = [n for n in nodes if n in rest & keep]
    known = _before(kept, set())
    out = [(kept, known, []), (nodes[-1].args[0], rest - keep, kept)]
    made = [_made(graph, [*(n for n in inputs if n in body), *more], [n for n in nodes if n in body], result)
            for result, body, more in out]
    return *made, *([i for i, n in enumerate(inputs) if n in body] for _, body, _ in out)


def _unsteady(n: fx.Node) -> bool:
    """Whether an operation has to run at each call whatever it reads: it draws numbers, or writes into its input."""
    return isinstance(n.target, torch._ops.OpOverload) and (
        torch.Tag.nondeterministic_seeded in n.target.tags or n.target._schema.is_mutable)


def _owns(n: fx.Node) -> bool:
    """Whether a node gives one tensor that it computed: no constant, view, cast to more bytes, nor several tensors."""
    if n.op != "call_function" or not n.all_input_nodes or not isinstance(n.meta["val"], Tensor):
        return False
    view = is_view(n) and (n.target is not getitem or is_view(n.args[0]))
    return not view and (n.target is not aten._to_copy.default or n.meta["val"].nbytes <= n.args[0].meta["val"].nbytes)


def _before(nodes: list[fx.Node], ends: Container[fx.Node]) -> set[fx.Node]:
    """Nodes and all that they read, up to `ends`."""
    found, todo = set(), list(nodes)
    while todo:
        n = todo.pop()
        if n not in found:
            found.add(n)
            todo += [] if n in ends else n.all_input_nodes
    return found


def _made(graph: fx.GraphModule, inputs: list[fx.Node], nodes: list[fx.Node], out: list[fx.Node]) -> fx.GraphModule:
    """A graph of some of another's nodes."""
    new, at = fx.Graph(), {}
    for n in inputs:
        at[n] = new.placeholder(n.name)
        at[n].meta = dict(n.meta)
    for n in nodes:
        if n.op not in ("placeholder", "output"):
            at[n] = new.node_copy(n, at.__getitem__)
    new.output(fx.map_arg(out, at.__getitem__))
    return fx.GraphModule(graph, new)
