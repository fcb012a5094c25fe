"""Pipeline parallelism: ranks that hold stages of a loss go through micro-batches by a table of actions.

The same code runs all ranks in one process (for tests: exact) and one rank of a process group.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule

from mmfunc import jit, stages, tree
from mmfunc.shard import schedule
from mmfunc.shard.schedule import Action
from mmfunc.signature import signature
from mmfunc.tree import Tree


@dataclass
class Here:
    """Transfers within one process."""

    boxes: dict[Action, list[Tensor]] = field(default_factory=dict)

    def send(self, a: Action, tensors: list[Tensor], to: int) -> None:
        self.boxes[schedule.peer(a)] = tensors

    def expect(self, a: Action, like: list[Tensor], source: int) -> None:
        pass

    def take(self, a: Action) -> list[Tensor] | None:
        return self.boxes.pop(a, None)

    def close(self) -> None:
        pass


@dataclass
class Between:
    """Transfers between the ranks of a process group; none of them waits before its tensors are needed."""

    group: Any
    sent: list[tuple] = field(default_factory=list)
    coming: dict[Action, tuple] = field(default_factory=dict)

    def start(self, op: Callable, tensors: list[Tensor], other: int) -> list:
        ops = [dist.P2POp(op, t, group=self.group, group_peer=other) for t in tensors]
        return dist.batch_isend_irecv(ops) if ops else []

    def send(self, a: Action, tensors: list[Tensor], to: int) -> None:
        self.sent = [s for s in self.sent if not all(w.is_completed() for w in s[0])]
        self.sent.append((self.start(dist.isend, tensors, to), tensors))

    def expect(self, a: Action, like: list[Tensor], source: int) -> None:
        tensors = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in like]
        self.coming[a] = self.start(dist.irecv, tensors, source), tensors

    def take(self, a: Action) -> list[Tensor]:
        works, tensors = self.coming.pop(a)
        for w in works:
            w.wait()
        return tensors

    def close(self) -> None:
        for works, _ in self.sent:
            for w in works:
                w.wait()


@dataclass
class Pipeline:
    """A loss in stages on ranks; see pipeline()."""

    loss: stages.Loss
    params: Tree  # abstract, the trained ones and the frozen ones
    trained: set[str]
    batch: Tree  # abstract
    ranks: int
    name: str  # of the schedule
    virtual: int
    sizes: list[int] | None
    backend: jit.Backend
    recompute: bool
    remat: jit.Policy | None
    group: Any
    traced: dict[Any, list[stages.Part]] = field(default_factory=dict)  # by signature of the batch
    made: dict[Any, stages.Stage] = field(default_factory=dict)  # by signature of the batch and number
    tables: dict[int, schedule.Table] = field(default_factory=dict)  # by number of micro-batches
    peak: dict[int, int] = field(default_factory=dict)  # of the last call: by rank, activations held at once

    def __post_init__(self):
        self.place = schedule.places(self.name, self.ranks, self.virtual)
        parts, known = self.parts(self.batch), stages.names(self.loss, self.params, self.batch)
        if self.sizes is None:
            self.sizes = stages.balance([p.flops for p in parts], len(self.place))
        if len(self.sizes) != len(self.place) or sum(self.sizes) != len(parts) or min(self.sizes) < 1:
            raise ValueError(f"the stages {self.sizes} must be {len(self.place)} numbers above 0 that add up to the "
                             f"{len(parts)} parts of this model: {', '.join(known)}")
        self.ends = [0, *accumulate(self.sizes)]
        spans = [parts[a:b] for a, b in zip(self.ends, self.ends[1:])]
        self.flops = [1 + sum(p.flops for p in span) for span in spans]
        reads = [set().union(*(p.reads for p in span)) for span in spans]
        reads[0] |= tree.flatten(self.params).keys() - set().union(*reads)  # what nothing reads is somewhere too
        self.holds = [set().union(*(n for n, home in zip(reads, self.place) if home == r)) for r in range(self.ranks)]

    @cached_property
    def shared(self) -> dict[str, list[int]]:
        """Trained parameters that several ranks hold, such as an embedding that is the head too, and these ranks."""
        held = {n: [r for r, names in enumerate(self.holds) if n in names] for n in sorted(self.trained)}
        return {n: ranks for n, ranks in held.items() if len(ranks) > 1}

    def part(self, params: Tree, rank: int) -> Tree:
        """What a rank holds of a tree of parameters; None elsewhere."""
        flat = tree.flatten(params)
        return tree.unflatten({n: t for n, t in flat.items() if n in self.holds[rank]}, params)

    def first(self, rank: int) -> set[str]:
        """What a rank holds and no rank before it: what it counts in norms and writes to checkpoints."""
        return self.holds[rank] - set().union(*self.holds[:rank])

    def parts(self, batch: Tree) -> list[stages.Part]:
        """The traced parts of a batch of this signature."""
        key = signature(batch)[0]
        if key not in self.traced:
            self.traced[key] = stages.trace(self.loss, self.params, _abstract(batch), self.trained)
        return self.traced[key]

    def stage(self, s: int, batch: Tree) -> stages.Stage:
        """The functions of a stage for a batch of this signature."""
        key = signature(batch)[0], s
        if key not in self.made:
            how = stages.How(self.compiled, self.name == "zero-bubble", self.recompute, self.remat)
            self.made[key] = stages.stage(self.loss, self.params, _abstract(batch), self.parts(batch), self.ends[s],
                                          self.ends[s + 1], self.trained, how)
        return self.made[key]

    def compiled(self, graph: GraphModule) -> Callable:
        def piece(tensors: list[Tensor]) -> list[Tensor]:
            return graph(*tensors)

        return jit.jit(piece, "whole", self.backend)

    def table(self, micro: int) -> schedule.Table:
        """The table of actions for a number of micro-batches, made for the FLOPs of these stages."""
        if micro not in self.tables:
            self.tables[micro] = schedule.build(self.name, self.ranks, micro, self.virtual, self.cost)
        return self.tables[micro]

    def cost(self, a: Action) -> float:
        """How long an action takes: 1 for a forward of the mean stage."""
        return schedule.unit(a) * self.flops[a.stage] * len(self.flops) / sum(self.flops)

    def __call__(self, params: Tree, frozen: Tree, batches: list[Tree]) -> tuple[Tensor, Tree]:
        """(loss of each micro-batch [M], the sum of their gradients in float32, like params)."""
        ranks = range(self.ranks) if self.group is None else [dist.get_rank(self.group)]
        link = Here() if self.group is None else Between(self.group)
        runs = [_Run(self, r, link, tree.flatten(tree.merge(params, frozen)), batches) for r in ranks]
        working = [run.go() for run in runs]
        while working:
            working = [w for w in working if next(w, self) is None]
        link.close()
        self.peak = {run.rank: run.peak for run in runs}
        losses = {m: v for run in runs for m, v in run.losses.items()}
        device = tree.leaves(params)[0].device
        value = torch.stack([losses.get(m, torch.zeros((), device=device)) for m in range(len(batches))])
        if self.group is not None:
            dist.broadcast(value, group=self.group, group_src=self.place[-1])
        return value, tree.unflatten(self.summed({run.rank: run.grads for run in runs}, params), params)

    def summed(self, grads: dict[int, dict[str, Tensor]], params: Tree) -> dict[str, Tensor]:
        """Gradients by name; of what several ranks hold, the sum over them, in the order of ranks: the same bits."""
        flat = {n: t for n, t in tree.flatten(params).items() if n in self.trained}
        zero = lambda n: torch.zeros_like(flat[n], dtype=torch.float32)
        if self.group is not None:
            (rank, own), = grads.items()
            grads = {rank: own} | _exchanged(self.group, rank, {
                n: (own.get(n, zero(n)), ranks) for n, ranks in self.shared.items() if rank in ranks})
        parts = {n: [grads[r][n] for r in sorted(grads) if n in grads[r]] for n in flat}
        return {n: sum(found[1:], found[0]) if found else zero(n) for n, found in parts.items()}


def _exchanged(group: Any, rank: int, shared: dict[str, tuple[Tensor, list[int]]]) -> dict[int, dict[str, Tensor]]:
    """By rank, the others' gradients of what is shared with them."""
    found: dict[int, dict[str, Tensor]] = {}
    ops = []
    for n, (own, ranks) in shared.items():
        for other in [r for r in ranks if r != rank]:
            buffer = found.setdefault(other, {})[n] = torch.empty_like(own)
            pair = [dist.P2POp(dist.isend, own, group=group, group_peer=other),
                    dist.P2POp(dist.irecv, buffer, group=group, group_peer=other)]
            ops += pair if rank < other else pair[::-1]
    for w in dist.batch_isend_irecv(ops) if ops else []:
        w.wait()
    return found


@dataclass
class _Run:
    """One rank on its way through a table."""

    pipe: Pipeline
    rank: int
    link: Here | Between
    params: dict[str, Tensor]
    batches: list[Tree]
    kept: dict[tuple[int, int], dict] = field(default_factory=dict)  # of each stage and micro-batch that is under way
    box: dict[Action, list[Tensor]] = field(default_factory=dict)  # on their way to another stage
    losses: dict[int, Tensor] = field(default_factory=dict)
    grads: dict[str, Tensor] = field(default_factory=dict)
    peak: int = 0

    def go(self) -> Iterator[None]:
        """All actions; yields where they wait for another rank of this process."""
        weights = {(0, n): t for n, t in self.params.items()}
        given = [weights | {(2, n): t for n, t in tree.flatten(b).items()} for b in self.batches]
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
            return {(3, "loss"): torch.ones_like(self.losses[a.micro])}
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


def _abstract(t: Tree, device: torch.device | None = None) -> Tree:
    """Tensors that have a shape only."""
    with FakeTensorMode():
        fake = lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device or x.device)
        return tree.map(lambda x: fake(x) if isinstance(x, Tensor) else x, t)


def pipeline(loss: stages.Loss, params: Tree, frozen: Tree, batch: Tree, ranks: int, *, name: str = "1f1b",
             virtual: int = 1, sizes: list[int] | None = None, backend: jit.Backend = "inductor",
             recompute: bool = False, remat: jit.Policy | None = None, group: Any = None) -> Pipeline:
    """Cut loss(parameters, batch) into stages on `ranks` ranks, `virtual` on each; nothing is run.

    params (trained), frozen and batch (a micro-batch) are read for their shapes only. name: of the schedule. sizes: how
    many of stages.names() each stage gets; None: balanced by FLOPs. recompute: keep of a micro-batch what flows into a
    stage only. group: the process group of these ranks; None: all of them are here.
    """
    device = next(t.device for t in tree.leaves(batch) if isinstance(t, Tensor))
    whole = _abstract(tree.merge(params, frozen), device)
    return Pipeline(loss, whole, {*tree.flatten(params)}, _abstract(batch), ranks, name, virtual, sizes, backend,
                    recompute, remat, group)
