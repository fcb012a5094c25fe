"""A training step on one rank of a mesh that need not exist, part by part: FLOPs, bytes sent, bytes held.

Layers repeat, so one of each kind is lowered by itself, with its backward pass; all else is lowered once, with marks
where the layers stand. Nothing is allocated, and the size of the mesh costs nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.traceback import annotate
from torch.utils._python_dispatch import _disable_current_modes

from mmfunc import jit, lower, shard, tree
from mmfunc.nn import chain
from mmfunc.shard.layout import Layout, Spec, lengths
from mmfunc.shard.mesh import Mesh, Net, abstract
from mmfunc.shard.use import ALL, in_layer
from mmfunc.signature import named
from mmfunc.tree import Tree
from mmfunc.work import Graph, Work, early


@dataclass(frozen=True)
class Part:
    """A layer of a Chain, or what stands before, between and behind layers."""

    name: str
    forward: Work = Work()
    backward: Work = Work()
    flow: int = 0  # bytes of x where it starts, of a layer
    weights: int = 0  # elements of a layer's parameters that a rank has


@dataclass(frozen=True)
class Step:
    """A micro-batch on one rank: parts in order, what is done with parameters before and with gradients behind."""

    parts: list[Part]
    cast: Work
    sync: Work
    spread: Work  # of updated parameters
    batch: int  # bytes


    def held(self, parts: list[Part] | None = None, share: float = 1.0) -> tuple[float, float]:
        """(what the forward pass leaves for the backward pass, the most that is held at once), bytes besides the state
        and the batch; of some parts with a share of the parameters."""
        parts = self.parts if parts is None else parts
        around = [replace(w, high=w.high * share, change=w.change * share) for w in (self.cast, self.sync)]
        now = most = left = 0.0
        passes = [around[0], *(p.forward for p in parts), *(p.backward for p in parts[::-1]), around[1]]
        for i, w in enumerate(passes):
            most, now = max(most, now + w.high), now + w.change
            left = now if i == len(parts) else left
        return left, most


@dataclass(frozen=True)
class _Like:
    """A tensor without its content."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    live: bool  # has a gradient
    copy: bool = False  # of a stored parameter: cast, or gathered

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def copied(self) -> int:
        return self.nbytes if self.copy else 0

    def tensor(self, device: str = "meta") -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class _Layer:
    """A kind of layer as it was met: its block with what it was called with, and what that gives."""

    fn: Callable
    c: Any
    given: Tree  # (parameters, x, ctx)

    @cached_property
    def gives(self) -> Tree:
        with _disable_current_modes(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            p, x, ctx = tree.map(lambda t: t.tensor("cpu") if isinstance(t, _Like) else t, self.given)
            return tree.map(_like, self.fn(p, self.c, x, ctx))

    @property
    def flow(self) -> int:
        return sum(t.nbytes for t in tree.leaves(self.given[1]))

    @property
    def slopes(self) -> int:
        return sum(t.nbytes for t in tree.leaves(self.given[0]) if t.live)

    @property
    def copies(self) -> int:
        return sum(t.copied for t in tree.leaves(self.given[0]))


class _Stub(torch.autograd.Function):
    """Stands for a layer: what it gives and the gradients it gives back, without its work."""

    @staticmethod
    def forward(ctx: Any, place: int, gives: list[_Like], streams: int, live: Tensor, *tensors: Tensor
                ) -> tuple[Tensor, ...]:
        ctx.place, ctx.shapes = place, [t.shape for t in tensors[:streams]]
        ctx.save_for_backward(*tensors[streams:])
        with annotate({"part": ("forward", place)}):
            return tuple(t.new_empty(y.shape, dtype=y.dtype) for t, y in zip(tensors, gives, strict=False))

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple:
        need = ctx.needs_input_grad[4 + len(ctx.shapes) :]
        with annotate({"part": ("backward", ctx.place)}):
            rest = [torch.empty_like(t) if n else None for t, n in zip(ctx.saved_tensors, need)]
            return None, None, None, None, *(g.new_empty(s) for g, s in zip(slopes, ctx.shapes, strict=True)), *rest


@dataclass
class _Recorder:
    """The wrapper of a Chain's blocks that puts stubs in their place and remembers one layer of each kind."""

    kinds: dict[tuple, _Layer] = field(default_factory=dict)
    met: list[tuple] = field(default_factory=list)  # the kind of each layer, in order

    def __call__(self, fn: partial) -> Callable:
        def run(p: Tree, c: Any, x: Tree, ctx: Tree) -> Tree:
            key = *fn.args[:1], id(fn.args[1]), *fn.args[2:], *((n, t.shape) for n, t in tree.flatten(x).items())
            if key not in self.kinds:
                self.kinds[key] = _Layer(fn, c, tree.map(_like, (p, x, ctx)))
            self.met.append(key)
            flat = {n: t for n, t in tree.flatten((x, ctx)).items() if isinstance(t, Tensor)}
            streams = [n for n in flat if n.startswith("0")]
            live = torch.ones((), requires_grad=self.kinds[key].slopes > 0)
            gives = self.kinds[key].gives
            out = _Stub.apply(len(self.met) - 1, tree.leaves(gives), len(streams), live, *flat.values())
            return tree.unflatten(dict(zip(tree.flatten(gives), out)), gives)

        return run


def _like(t: Any) -> Any:
    return _Like(tuple(t.shape), t.dtype, t.requires_grad) if isinstance(t, Tensor) else t


def trace(loss: Callable, declared: Tree, batch: Tree, mesh: Mesh, *, trained: str = ".",
          compute: torch.dtype | None = torch.bfloat16, remat: jit.Policy | None = None, eager: bool = False) -> Step:
    """What loss(parameters, batch) and its gradients cost a rank of a mesh, which need not exist; batch (abstract) is
    this rank's micro-batch. Parameters are stored in float32 and cast to `compute`, as in optim.step. eager: operations
    run one by one."""
    recorder, wanted = _Recorder(), tree.flatten(tree.select(declared, trained))
    with shard.use(abstract(mesh), declared):
        specs = shard.using().layers[""].specs
        net, way = shard.using().net, "store" if mesh.zero == 3 else "compute"
        copy = {n: compute is not None or getattr(s, way) != s.store for n, s in specs.items()}
        like = {n: _Like(local(s, getattr(s, way), net), compute or torch.float32, n in wanted, copy[n])
                for n, s in specs.items()}
        layers = {n: t for n, t in like.items() if in_layer(n)}
        apart = [{n: torch.empty(local(s, s.store, net), dtype=like[n].dtype, device="meta") for n, s in specs.items()
                  if n not in layers and (n in wanted) == live} for live in (True, False)]

        def outer(params: dict, frozen: dict, batch: Tree) -> Any:
            value = lambda p, b: shard.share(loss(tree.unflatten(shard.ready(p | frozen) | layers, declared), b))
            with chain.running(chain.whole(recorder)):
                return jit.value_and_grad(value)(params, shard.counted(batch))

        low = jit.jit(outer).lower(*apart, batch)
        kinds = {key: (layer, *_layer(layer, remat, eager)) for key, layer in recorder.kinds.items()}
    parts = _assembled(Graph(low, eager), [kinds[key] for key in recorder.met])
    return Step(parts, *_around(specs, like, net), tree.nbytes(batch))


def local(s: Spec, layout: Layout, net: Net) -> tuple[int, ...]:
    """The shape of a rank's part of a parameter."""
    return tuple(lengths(s, dim, axes, net)[-1] for dim, axes in enumerate(layout.dims))


def _around(specs: dict[str, Spec], like: dict[str, _Like], net: Net) -> tuple[Work, Work, Work]:
    """The cast of parameters before a step, the sums of their gradients behind it, and what the update sends."""
    live = [n for n, t in like.items() if t.live]
    kept = {n: 4 * prod(local(specs[n], specs[n].optimize, net)) for n in live}
    narrow = sum(like[n].nbytes for n in live)
    wide = sum(kept.values()) if net.mesh.zero == 2 else sum(4 * prod(like[n].shape) for n in live)
    before, found, behind = {}, {}, {}

    def send(to: dict[str, dict], axes: tuple[str, ...], kind: str, size: int) -> None:
        n = net.size(axes)
        entry = to.setdefault("+".join(axes), {}).setdefault(kind, {"calls": 1, "bytes": 0})
        entry["bytes"] += size * (2 if kind == "all_reduce" else 1) * (n - 1) / n

    for n, s in specs.items():
        if net.mesh.zero == 2 and s.store != s.compute and in_layer(n):  # of the others the graph tells
            send(before, ("fsdp",), "all_gather", like[n].nbytes)
            if like[n].live:
                send(found, ("fsdp",), "reduce_scatter", like[n].nbytes)
        if net.mesh.zero == 1 and n in kept and s.optimize != s.compute:  # each rank updates its part
            send(found, ("fsdp",), "reduce_scatter", 4 * prod(like[n].shape))
            send(behind, ("fsdp",), "all_gather", 4 * prod(like[n].shape))
        if n in kept and (axes := net.axes(tuple(a for a in ALL if a not in s.optimize.axes))):
            send(found, axes, "all_reduce", kept[n])
    copies = sum(t.copied for t in like.values())
    left = sum(t.copied for n, t in like.items() if not in_layer(n))
    high = wide + (wide if found else 0) - narrow - left  # sums are taken of all at once
    sync = Work(sent=found, high=high, change=sum(kept.values()) - narrow - left)
    return Work(sent=before, high=copies, change=copies), sync, Work(sent=behind)


def _layer(layer: _Layer, remat: jit.Policy | None, eager: bool) -> tuple[Work, Work]:
    """A layer's forward and backward pass; what it gives is not counted as held behind them."""
    like = tree.flatten(layer.given)
    wanted = [n for n, t in like.items() if isinstance(t, _Like) and t.live]

    def joint(given: Tree, slopes: dict) -> Any:
        with torch.enable_grad():
            flat = {n: t.detach().requires_grad_() if n in wanted else t for n, t in tree.flatten(given).items()}
            p, x, ctx = tree.unflatten(flat, given)
            out = tree.flatten(jit.remat(layer.fn, remat or "everything")(p, layer.c, x, ctx))
            with lower.backward():
                slopes = {n: g for n, g in slopes.items() if out[n].requires_grad}
                found = torch.autograd.grad([out[n] for n in slopes], [flat[n] for n in wanted], [*slopes.values()],
                                            allow_unused=True) if slopes and wanted else ()
        return out, [g for g in found if g is not None]

    tensor = lambda t: t.tensor() if isinstance(t, _Like) else t
    given, gives = tree.map(tensor, layer.given), tree.map(tensor, layer.gives)
    args = given, tree.flatten(gives)
    g = Graph(jit.jit(joint).lower(*args), eager)
    start = next((i for i, n in enumerate(g.nodes) if not early(n)), len(g.nodes))
    names = [n for n, t in named(args) if isinstance(t, Tensor)]
    streams = {s for n, node in zip(names, g.nodes) if n.startswith("0.1") for s in g.own[node]}
    used = {s for n in g.nodes[start:] for m in n.all_input_nodes for s in g.own[m]}
    behind, out = g.timeline[start - 1][1], tree.nbytes(gives)
    saved = behind - out + (out if streams & used else 0)
    return g.work(range(start), 0, saved), g.work(range(start, len(g.nodes)), behind, -saved)


def _assembled(g: Graph, layers: list[tuple[_Layer, Work, Work]]) -> list[Part]:
    """The parts of a step in order, from the graph in which layers are stubs."""
    spans: dict[Any, list[int]] = {}
    mark, back = 0, False  # behind which layer
    for i, n in enumerate(g.nodes):
        said = n.meta.get("custom", {}).get("part")
        back = back or not early(n)
        if isinstance(said, tuple):
            mark = said[1] + (said[0] == "forward")
        if n.op == "call_function":
            spans.setdefault(said or ("backward" if back else "forward", -1, mark), []).append(i)

    def made(key: Any, base: Work | None = None, more: int = 0) -> Work:
        if key not in spans:
            return base or Work()
        at = spans[key]
        before = g.timeline[at[0] - 1][1] if at[0] else 0
        change = g.timeline[at[-1]][1] - before + more
        return replace(base, change=base.change + change) if base else g.work(at, before, change)

    parts = []
    for i in range(len(layers) + 1):
        between = [made((k, -1, i)) for k in ("forward", "backward")]
        name = "embed" if i == 0 else "head" if i == len(layers) else "between"
        parts += [Part(name, *between)] if between != [Work(), Work()] else []
        if i < len(layers):
            layer, forward, backward = layers[i]
            parts.append(Part(layer.fn.args[0].__name__, made(("forward", i), forward),
                              made(("backward", i), backward, layer.slopes - layer.copies), layer.flow,
                              sum(prod(t.shape) for t in tree.leaves(layer.given[0]))))
    return parts
