"""Pipeline parallelism: ranks that hold stages of a loss go through micro-batches by a table of actions.

The ranks are those along the mesh's axis pp, each with its parts of a stage along the other axes; or, without that
axis, all of them are in one process (for tests: exact).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule

from mmfunc import jit, shard, stages, tree
from mmfunc.shard import schedule
from mmfunc.shard.schedule import Action
from mmfunc.shard.transfer import Between, Here, exchanged
from mmfunc.signature import signature
from mmfunc.tree import Tree


@dataclass(frozen=True)
class Plan:
    """How a loss is cut into stages, and in which order they work."""

    schedule: Literal["gpipe", "1f1b", "zero-bubble"] = "1f1b"
    virtual: int = 1  # stages on a rank: 1f1b interleaves them, of zero-bubble two lie on the ranks in a V
    sizes: tuple[int, ...] = ()  # how many of embed, layers and head each stage gets; none: balanced by FLOPs
    recompute: bool = False  # keep of a micro-batch what flows into a stage only, and run the forward again


@dataclass
class Pipeline:
    """A loss in stages on ranks; see pipeline()."""

    loss: stages.Loss
    params: Tree  # abstract, the trained ones and the frozen ones
    trained: set[str]
    batch: Tree  # abstract
    ranks: int
    plan: Plan
    backend: jit.Backend
    remat: jit.Policy | None
    traced: dict[Any, list[stages.Part]] = field(default_factory=dict)  # by signature of the batch
    made: dict[Any, stages.Stage] = field(default_factory=dict)  # by signature of the batch and number
    tables: dict[int, schedule.Table] = field(default_factory=dict)  # by number of micro-batches
    peak: dict[int, int] = field(default_factory=dict)  # of the last call: by rank, activations held at once

    def __post_init__(self):
        self.place = schedule.places(self.plan.schedule, self.ranks, self.plan.virtual)
        known = stages.names(self.loss, self.params, self.batch)
        # ranks with other samples may have traced other shapes: all keep to what the first one found
        flops, reads = shard.everyone(tuple(zip(*((p.flops, p.reads) for p in self.parts(self.batch)))))[0]
        sizes = self.plan.sizes or stages.balance(flops, len(self.place))
        if len(sizes) != len(self.place) or sum(sizes) != len(flops) or min(sizes) < 1:
            raise ValueError(f"the stages {list(sizes)} must be {len(self.place)} numbers above 0 that add up to the "
                             f"{len(flops)} parts of this model: {', '.join(known)}")
        self.ends = [0, *accumulate(sizes)]
        spans = [slice(*ends) for ends in zip(self.ends, self.ends[1:])]
        self.flops = [1 + sum(flops[span]) for span in spans]
        found = [set().union(*reads[span]) for span in spans]
        found[0] |= tree.flatten(self.params).keys() - set().union(*found)  # what nothing reads is somewhere too
        self.holds = [set().union(*(n for n, home in zip(found, self.place) if home == r)) for r in range(self.ranks)]

    @cached_property
    def holders(self) -> dict[str, tuple[int, ...]]:
        """The ranks that hold each parameter: several hold an embedding that is the head too."""
        return {n: tuple(r for r, names in enumerate(self.holds) if n in names) for n in tree.flatten(self.params)}

    def parts(self, batch: Tree) -> list[stages.Part]:
        """The traced parts of a batch of this signature."""
        key = signature(batch)[0]
        if key not in self.traced:
            self.traced[key] = stages.trace(self.loss, self.params, abstract(batch), self.trained)
        return self.traced[key]

    def stage(self, s: int, batch: Tree) -> stages.Stage:
        """The functions of a stage for a batch of this signature."""
        key = signature(batch)[0], s
        if key not in self.made:
            how = stages.How(self.compiled, self.plan.schedule == "zero-bubble", self.plan.recompute, self.remat)
            self.made[key] = stages.stage(self.loss, self.params, abstract(batch), self.parts(batch), self.ends[s],
                                          self.ends[s + 1], self.trained, how)
        return self.made[key]

    def compiled(self, graph: GraphModule) -> Callable:
        def piece(tensors: list[Tensor]) -> list[Tensor]:
            return graph(*tensors)

        return jit.jit(piece, "whole", self.backend)

    def table(self, micro: int) -> schedule.Table:
        """The table of actions for a number of micro-batches, made for the FLOPs of these stages."""
        if micro not in self.tables:
            self.tables[micro] = schedule.build(self.plan.schedule, self.ranks, micro, self.plan.virtual, self.cost)
        return self.tables[micro]

    def cost(self, a: Action) -> float:
        """How long an action takes: 1 for a forward of the mean stage."""
        return schedule.unit(a) * self.flops[a.stage] * len(self.flops) / sum(self.flops)

    def __call__(self, params: Tree, frozen: Tree, batches: list[Tree], slope: Tensor | float = 1.0
                 ) -> tuple[Tensor, Tree]:
        """(loss of each micro-batch [M], 0 on ranks without the last stage; slope times the sum of their gradients, in
        float32, like params)."""
        rank, group = shard.staged()
        link = Between(group) if group else Here()
        flat = tree.flatten(tree.merge(params, frozen))
        runs = [_Run(self, r, link, flat, batches, slope) for r in ([rank] if group else range(self.ranks))]
        working = [run.go() for run in runs]
        while working:
            working = [w for w in working if next(w, self) is None]
        link.close()
        self.peak = {run.rank: run.peak for run in runs}
        losses = {m: v for run in runs for m, v in run.losses.items()}
        zero = torch.zeros((), device=next(t.device for t in tree.leaves(batches[0]) if isinstance(t, Tensor)))
        value = torch.stack([losses.get(m, zero) for m in range(len(batches))])
        return value, tree.unflatten(self.summed({run.rank: run.grads for run in runs}, params), params)

    def summed(self, grads: dict[int, dict[str, Tensor]], params: Tree) -> dict[str, Tensor]:
        """Gradients by name; of what several ranks hold, the sum over them, in the order of ranks: the same bits."""
        flat = {n: t for n, t in tree.flatten(params).items() if n in self.trained}
        zero = lambda n: torch.zeros_like(flat[n], dtype=torch.float32)
        rank, group = shard.staged()
        if group:
            own = grads[rank]
            shared = {n: self.holders[n] for n in sorted(flat) if len(self.holders[n]) > 1}
            grads |= exchanged(group, rank, {n: (own.get(n, zero(n)), ranks) for n, ranks in shared.items()})
        parts = {n: [grads[r][n] for r in sorted(grads) if n in grads[r]] for n in flat}
        return {n: sum(found[1:], found[0]) if found else zero(n) for n, found in parts.items()}


@dataclass
class _Run:
    """One rank on its way through a table."""

    pipe: Pipeline
    rank: int
    link: Here | Between
    params: dict[str, Tensor]
    batches: list[Tree]
    slope: Tensor | float
    kept: dict[tuple[int, int], dict] = field(default_factory=dict)  # of each stage and micro-batch that is under way
    box: dict[Action, list[Tensor]] = field(default_factory=dict)  # on their way to another stage
    losses: dict[int, Tensor] = field(default_factory=dict)
    grads: dict[str, Tensor] = field(default_factory=dict)
    peak: int = 0

    def go(self) -> Iterator[None]:
        """All actions; yields where they wait for another rank of this process."""
        given = [stages.given(self.params, b) for b in self.batches]
        for a in self.pipe.table(len(self.batches))[self.rank]:
            stage = self.pipe.stage(a.stage, self.batches[a.micro])
            if a.kind in schedule.PEERS:
                self.transfer(a, stage)
                continue
            while (come := self.come(a, stage)) is None:
                yield
            env = self.kept.setdefault((a.stage, a.micro), {})
            self.peak = max(self.peak, len(self.kept))
            env.update(come)
            self.sort(a, stage, stage.run(a.kind, env, given[a.micro]))

    def transfer(self, a: Action, stage: stages.Stage) -> None:
        """Start to send or to receive."""
        other = self.pipe.place[schedule.peer(a).stage]
        if a.kind.startswith("send"):
            self.link.send(a, self.box.pop(a), other)
        else:
            forth = a.kind == "receive"
            flow = stage.come if forth else stage.go
            self.link.expect(a, [flow.tensors[n] for n in (flow.live if forth else flow.back)], other)

    def come(self, a: Action, stage: stages.Stage) -> dict[tuple, Tensor] | None:
        """What a computation gets from another stage, None if it is not there yet."""
        forth = a.kind == "forward"
        if a.kind == "weight" or (forth and a.stage == 0):
            return {}
        if not forth and a.stage == len(self.pipe.place) - 1:
            return {(3, "loss"): torch.ones_like(self.losses[a.micro]) * self.slope}
        key, (place, names) = Action(a.stage, "receive" if forth else "receive_back", a.micro), \
            (1, stage.come.live) if forth else (3, stage.go.back)
        other = self.pipe.place[schedule.peer(key).stage]
        tensors = self.box.pop(key) if other == self.rank else self.link.take(key)
        return None if tensors is None else {(place, n): t for n, t in zip(names, tensors)}

    def sort(self, a: Action, stage: stages.Stage, results: dict[tuple, Tensor]) -> None:
        """Put what a computation gave where it belongs."""
        s, kind, m = a
        for n, g in ((n, g.float()) for (what, n), g in results.items() if what == "params"):
            self.grads[n] = self.grads[n] + g if n in self.grads else g
        if kind == [*stage.pieces][-1]:
            del self.kept[s, m]
        if kind == "forward" and s == len(self.pipe.place) - 1:
            self.losses[m] = results["out", "loss"]
        elif kind == "forward" or (kind != "weight" and s):
            out, names = ("out", stage.go.live) if kind == "forward" else ("in", stage.come.back)
            key = Action(s, "send" if kind == "forward" else "send_back", m)
            own = self.pipe.place[schedule.peer(key).stage] == self.rank
            self.box[schedule.peer(key) if own else key] = [results[out, n] for n in names]


def abstract(t: Tree, device: torch.device | None = None) -> Tree:
    """Tensors that have a shape only."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device or x.device)
        return tree.map(lambda x: fake(x) if isinstance(x, Tensor) else x, t)


def pipeline(loss: stages.Loss, params: Tree, frozen: Tree, batch: Tree, ranks: int, plan: Plan = Plan(), *,
             backend: jit.Backend = "inductor", remat: jit.Policy | None = None) -> Pipeline:
    """Cut loss(parameters, batch) into stages on `ranks` ranks; nothing is run. On a mesh the loss is a rank's share.

    params (trained), frozen and batch (a micro-batch) are read for their shapes only. remat: what each block keeps.
    """
    device = next(t.device for t in tree.leaves(batch) if isinstance(t, Tensor))
    whole = abstract(tree.merge(params, frozen), device)
    pipe = Pipeline(loss, whole, {*tree.flatten(params)}, abstract(batch), ranks, plan, backend, remat)
    shard.hold(pipe.holders, ranks)
    return pipe


def check(ranks: int, plan: Plan, mode: jit.Mode) -> None:
    """Whether a program's flags go together."""
    if ranks == 1 and plan != Plan():
        raise ValueError(f"{plan} says how a model is cut into stages, but the mesh has pp 1, which is no cut")
    if ranks > 1 and mode != "whole":
        raise ValueError(f"with pp {ranks} each stage is compiled as graphs of its own: there is no mode {mode!r} of "
                         "that, only 'whole'")
