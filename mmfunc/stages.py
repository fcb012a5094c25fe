"""A loss through a Chain in stages: cut between steps, each stage a few pure graphs, run by a table of actions.

The loss is traced, never changed: stage s is the function up to its last step, where an exception leaves it with what
flows on. A rank holds the parameters that its stages read. The graph of a stage and its gradients is cut by what needs
what: what the forward computes, what the gradient of its input needs, what only the gradients of parameters need.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate, count
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node

from mmfunc import jit, lower, tree
from mmfunc.nn import chain
from mmfunc.shard.cutting import Piece, cut, needed
from mmfunc.signature import named
from mmfunc.tree import Tree

Loss = Callable[[Tree, Tree], Tensor]  # (parameters, batch) -> 0-d; calls one Chain


class _Left(Exception):
    """Ends a stage with what it found."""


def _inside(loss: Loss, part: Callable, p: Tree, batch: Tree) -> Any:
    """What loss gives when its Chain is run by part(chain, p, c, batch), or what part leaves with."""
    calls = []

    def run(found: chain.Chain, p: Tree, c: Any, batch: Tree, cache: Any) -> Any:
        if calls:
            raise ValueError("stages are cut in one Chain; this loss calls two")
        calls.append(found)
        return part(found, p, c, batch)

    with chain.running(run):
        try:
            out = loss(p, batch)
        except _Left as left:
            out = left.args[0]
    if not calls:
        raise ValueError("stages are cut in a Chain; this loss calls none")
    return out


def names(loss: Loss, params: Tree, batch: Tree) -> list[str]:
    """What a stage consists of, in order: "embed", paths of layers and names of plain functions, "head"."""
    def part(found: chain.Chain, p: Tree, c: Any, batch: Tree) -> Any:
        raise _Left(["embed", *(path or fn.__name__ for path, fn in found.steps(p, c)), "head"])

    return _inside(loss, part, params, batch)


def touched(loss: Loss, params: Tree, batch: Tree) -> list[set[str]]:
    """The parameters that each part of names() may read, found by running the loss once on shapes.

    To trace every part with all parameters as inputs costs the square of the number of layers.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        fresh = lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) \
            if isinstance(t, Tensor) else t
        params, batch = tree.map(fresh, params), tree.map(fresh, batch)
        known = {id(t): n for n, t in tree.flatten(params).items()}
        found: dict[int | None, set[str]] = {None: set()}  # None: read outside of the Chain, where every part passes
        number, now = count(), [None]

        def see(t: Any) -> None:
            if id(t) in known:
                found[now[-1]].add(known[id(t)])

        def wrap(fn: Callable) -> Callable:
            def run(*args: Any) -> Any:
                now.append(next(number))
                found[now[-1]] = set()
                out = fn(*args)
                tree.map(see, out)  # a parameter may flow on as it is
                now.pop()
                return out

            return run

        with lower.Seeing(see), torch.no_grad():
            _inside(loss, lambda *args: chain.whole(wrap, wrap)(*args, None), params, batch)
    always = found.pop(None)
    return [found[i] | always for i in sorted(found)]


def advance(loss: Loss, lo: int, hi: int, wrap: Callable, p: Tree, flow: Tree, batch: Tree) -> Tree:
    """Parts lo to hi of names(): (x, ctx) that flows in, None at first -> (x, ctx) that flows out, {"loss"} at last."""
    def leave(p: Tree, c: Any, x: Tree, ctx: Tree) -> Any:
        raise _Left((x, ctx))

    def part(found: chain.Chain, p: Tree, c: Any, batch: Tree) -> Any:
        steps = tuple(found.steps(p, c))
        cut = chain.Chain((lambda *_: flow) if lo else found.embed, steps[max(lo - 1, 0) : hi - 1],
                          found.head if hi == len(steps) + 2 else leave)
        return chain.whole(wrap)(cut, p, c, batch, None)

    out = _inside(loss, part, p, batch)
    return {"loss": out} if isinstance(out, Tensor) else out


@dataclass
class Flow:
    """What flows between two stages."""

    like: Tree  # its structure
    static: dict[str, Any]  # leaves that are no tensors
    batch: dict[str, str]  # leaves that every stage finds in the batch, under these names
    tensors: dict[str, Tensor]  # the others, abstract
    slopes: set[str]  # those of them that have a gradient
    live: list[str] = field(default_factory=list)  # those of them that are read behind here

    @property
    def back(self) -> list[str]:
        """Those whose gradient flows back."""
        return [n for n in self.live if n in self.slopes]

    def tree(self, sent: dict[str, Tensor], batch: Tree) -> Tree:
        """The flow as a tree again; what is not read is there as a shape only."""
        given, dead = tree.flatten(batch), {n: t for n, t in self.tensors.items() if n not in sent}
        dead = {n: torch.empty(t.shape, dtype=t.dtype, device=t.device) for n, t in dead.items()}
        return tree.unflatten(self.static | {n: given[b] for n, b in self.batch.items()} | dead | sent, self.like)


NOTHING = Flow({}, {}, {}, {}, set())  # flows into the first stage


def live(t: Tensor, wanted: bool) -> Tensor:
    """A tensor of its own, that requires grad or does not."""
    return t.detach().requires_grad_() if wanted else t


@dataclass
class Part:
    """A part of names(), traced from shapes: what flows out of it, what it reads, its FLOPs."""

    out: Flow
    flops: int
    inputs: dict[Node, tuple[int, str]]  # (0, parameter), (1, what flows in), (2, of the batch)
    ends: dict[str, Node]  # the nodes of what flows out
    reads: set[str] = field(default_factory=set)  # parameters


def trace(loss: Loss, params: Tree, batch: Tree, trained: set[str]) -> list[Part]:
    """Each part of names(), from shapes only."""
    parts, flow = [], NOTHING
    flat = tree.flatten(params)
    for i, reads in enumerate(touched(loss, params, batch)):
        def forward(p: dict, sent: dict, batch: Tree, flow: Flow = flow, i: int = i) -> tuple[Tree, dict]:
            with torch.enable_grad():
                p = tree.unflatten(flat | {n: live(t, n in trained) for n, t in p.items()}, params)
                sent = {n: live(t, n in flow.slopes) for n, t in sent.items()}
                out = advance(loss, i, i + 1, lambda fn: fn, p, flow.tree(sent, batch), batch)
            return out, {n: t.requires_grad for n, t in tree.flatten(out).items() if isinstance(t, Tensor)}

        parts.append(_part(jit.jit(forward), ({n: flat[n] for n in flat if n in reads}, flow.tensors, batch)))
        flow = parts[-1].out
    wanted = ["loss"]
    for part in reversed(parts):  # what is read behind a part is known from behind
        part.out.live = [n for n in part.out.tensors if n in wanted]
        found = needed([part.ends[n] for n in part.out.live])
        used = [place for node, place in part.inputs.items() if node in found]
        part.reads, wanted = {n for k, n in used if k == 0}, {n for k, n in used if k == 1}
    return parts


def _ends(low: lower.Lowered, args: tuple) -> tuple[dict[Node, tuple], Tree]:
    """Of a traced function, (number of the argument, name) of each input, and its result with nodes for tensors."""
    given = [(int(n[0]), n[2:]) for n, t in named(args) if isinstance(t, Tensor)]
    inputs = dict(zip(low.graph.graph.find_nodes(op="placeholder"), given))
    return inputs, low.shape(args, list(low.graph.graph.output_node().args[0]))


def _part(fn: jit.Jitted, args: tuple) -> Part:
    low = fn.lower(*args)
    inputs, (out, slopes) = _ends(low, args)
    ends = {n: v for n, v in tree.flatten(out).items() if isinstance(v, Node)}
    batch = {n: inputs[v][1] for n, v in ends.items() if inputs.get(v, (0,))[0] == 2}
    static = {n: v for n, v in tree.flatten(out).items() if n not in ends}
    # contiguous, as they are sent: a graph that was traced with other strides may be wrong for these
    tensors = {n: v.meta["val"].contiguous() for n, v in ends.items() if n not in batch}
    flow = Flow(tree.map(lambda _: 0, out), static, batch, tensors, {n for n in tensors if slopes[n]})
    return Part(flow, low.cost()["flops"], inputs, ends)


def balance(costs: list[float], count: int) -> list[int]:
    """How many parts each of some stages gets, so that the dearest stage is as cheap as can be."""
    if not 1 <= count <= len(costs):
        raise ValueError(f"{len(costs)} parts cannot be cut into {count} stages")
    sums = [0, *accumulate(costs)]
    best = {(0, 0): (0.0, 0.0, ())}  # (parts, stages): (dearest stage, sum of squares, sizes)
    for k in range(1, count + 1):
        for n in range(k, len(costs) - count + k + 1):
            options = []
            for m in range(k - 1, n):
                if (m, k - 1) in best:
                    most, square, sizes = best[m, k - 1]
                    cost = sums[n] - sums[m]
                    options.append((max(most, cost), square + cost**2, (*sizes, n - m)))
            best[n, k] = min(options)
    return list(best[len(costs), count][2])


# ---- the graphs of a stage

def _early(node: Node) -> bool:
    """Whether a node was recorded before the backward pass."""
    return node.meta.get("custom", {}).get("phase") != "backward" and not node.name.endswith("_recomputed")


@dataclass
class Stage:
    """Some parts of names() as functions: "forward", and "backward" or "input" and "weight"."""

    come: Flow
    go: Flow
    pieces: dict[str, Piece]

    def run(self, kind: str, env: dict[Any, Tensor], given: dict[tuple, Tensor]) -> dict[tuple, Tensor]:
        """One of them. env is what is kept for a micro-batch, given are parameters and batch."""
        piece, kinds = self.pieces[kind], list(self.pieces)
        out = piece.call([env[k] if k in env else given[k] for k in piece.needs]) if piece.gives else []
        later = {k for after in kinds[kinds.index(kind) + 1 :] for k in self.pieces[after].needs}
        kept = {k: t for k, t in (env | dict(zip(piece.gives, out))).items() if k in later}
        env.clear()
        env.update(kept)
        return {k: t for k, t in zip(piece.gives, out) if isinstance(k, tuple)}


def given(params: Tree, batch: Tree) -> dict[tuple[int, str], Tensor]:
    """Parameters and a batch as the pieces of a Stage are given them."""
    return {(k, n): t for k, part in ((0, params), (2, batch)) for n, t in tree.flatten(part).items()}


@dataclass(frozen=True)
class How:
    """How stages are made."""

    compiled: Callable  # GraphModule -> function of a list of tensors
    split: bool  # "input" and "weight" apart
    recompute: bool = False  # keep what flows in only, and run the forward again on the way back
    remat: jit.Policy | None = None  # what each Chain block keeps


def stage(loss: Loss, params: Tree, batch: Tree, parts: list[Part], lo: int, hi: int, trained: set[str],
          how: How) -> Stage:
    """Parts lo to hi of a loss, from shapes only."""
    come, go = parts[lo - 1].out if lo else NOTHING, parts[hi - 1].out
    own = sorted(set().union(*(p.reads for p in parts[lo:hi])) & trained)
    whole = tree.flatten(params)
    read = {n for part in parts[lo:hi] for k, n in part.inputs.values() if k == 0}
    wrap = (lambda fn: jit.remat(fn, how.remat)) if how.remat else lambda fn: fn

    def joint(p: dict, sent: dict, batch: Tree, slopes: dict) -> dict[str, dict]:
        with torch.enable_grad():
            flat = {n: live(t, n in own) for n, t in p.items()}
            sent = {n: live(t, n in come.slopes) for n, t in sent.items()}
            out = advance(loss, lo, hi, wrap, tree.unflatten(whole | flat, params), come.tree(sent, batch), batch)
            out = {n: t.contiguous() for n, t in tree.flatten(out).items() if n in go.live}
            ins = [sent[n] for n in come.back] + [flat[n] for n in own]
            with lower.backward():
                slopes = slopes if ins else {}
                found = torch.autograd.grad([out[n] for n in slopes], ins, list(slopes.values()), allow_unused=True) \
                    if slopes else [None] * len(ins)
                found = [torch.zeros_like(t) if g is None else g.contiguous() for t, g in zip(ins, found)]
        return {"out": out, "in": dict(zip(come.back, found)),
                "params": dict(zip(own, found[len(found) - len(own) :]))}

    args = {n: whole[n] for n in whole if n in read}, {n: come.tensors[n] for n in come.live}, batch, \
        {n: go.tensors[n] for n in go.back}
    low = jit.jit(joint).lower(*args)
    inputs, ends = _ends(low, args)
    results = [{(k, n): v for n, v in ends[k].items()} for k in ("out", "in", "params")]
    results = results if how.split else [results[0], results[1] | results[2]]
    early: set[Node] = set()
    for n in low.graph.graph.nodes:
        if _early(n) and early.issuperset(n.all_input_nodes):
            early.add(n)
    pieces = cut(low.graph, inputs, results[:1], set()) + cut(low.graph, inputs, results[1:], set()) \
        if how.recompute else cut(low.graph, inputs, results, early)
    for piece in pieces:
        piece.call = how.compiled(piece.call)
    return Stage(come, go, dict(zip(("forward", "input", "weight") if how.split else ("forward", "backward"), pieces)))
