"""How a training step is divided, as one value, and what it needs and takes on a machine."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from math import prod

import torch

from mmfunc import jit, machines, stages, tree
from mmfunc.machines import Machine
from mmfunc.parts import Part, Step, local, trace
from mmfunc.shard import layout, schedule
from mmfunc.shard.layout import COMPUTE
from mmfunc.shard.mesh import BATCH, Mesh, abstract
from mmfunc.tree import Tree
from mmfunc.work import Work


@dataclass(frozen=True)
class Plan:
    """A division of training."""

    mesh: Mesh = Mesh()
    micro: int = 1  # samples of a micro-batch on a rank
    accumulate: int = 1  # micro-batches of an update
    remat: jit.Policy | None = None
    schedule: str = "1f1b"  # of the pipeline
    virtual: int = 1  # stages on a rank

    @property
    def batch(self) -> int:
        """Samples of an update."""
        return self.micro * self.accumulate * prod(getattr(self.mesh, a) for a in BATCH)

    def __str__(self) -> str:
        zero = f" (zero {self.mesh.zero})" if self.mesh.fsdp > 1 else ""
        rows = " with sequences" if self.mesh.sequence else ""
        pipe = f", {self.schedule} with {self.virtual} stages a rank" if self.mesh.pp > 1 else ""
        return (f"{self.mesh}{zero}{rows}, {self.accumulate} x {self.micro} samples a rank, "
                f"remat {self.remat or 'everything'}{pipe}")


@dataclass(frozen=True)
class Model:
    """What is trained: a loss, its declared parameters, and how a micro-batch of n samples looks."""

    name: str
    loss: Callable  # (p, batch) -> 0-d
    declared: Tree
    batch: Callable[[int], Tree]  # samples -> abstract batch
    trained: str = "."
    compute: torch.dtype | None = torch.bfloat16
    eager: bool = False  # operations run one by one
    memo: dict = field(default_factory=dict, compare=False)

    def step(self, plan: Plan) -> Step:
        """The work of a micro-batch on a rank of a plan."""
        mesh = replace(plan.mesh, pp=1)  # stages are cut from the parts
        key = mesh, plan.micro, plan.remat
        if key not in self.memo:
            self.memo[key] = trace(self.loss, self.declared, self.batch(plan.micro), mesh, trained=self.trained,
                                   compute=self.compute, remat=plan.remat, eager=self.eager)
        return self.memo[key]

    @cached_property
    def flops(self) -> float:
        """FLOPs that training on one sample takes, nothing run again; attention backward is twice forward."""
        parts = self.step(Plan()).parts
        return sum(p.forward.dense + p.forward.attention + p.backward.dense - p.backward.again
                   + 2 * p.forward.attention * (p.backward.attention > 0) for p in parts)

    def elements(self, mesh: Mesh) -> tuple[int, int]:
        """Elements of a rank's parameters, and of the trained ones in the optimizer's layout."""
        net = abstract(replace(mesh, pp=1))
        specs = {n: layout.spec(p, net) for n, p in tree.flatten(self.declared).items()}
        size = lambda s, way: prod(local(s, getattr(s, way), net))
        trained = tree.flatten(tree.select(self.declared, self.trained))
        return sum(size(s, "store") for s in specs.values()), sum(size(specs[n], "optimize") for n in trained)

    def check(self, mesh: Mesh) -> None:
        """A ValueError where an axis of a mesh has nothing to divide in this model."""
        axes = {a.partition("/")[0] for p in tree.leaves(self.declared) for a in p.axes.split()}
        for axis in ("tp", "ep"):
            known = [n for n, a in COMPUTE.items() if a == axis]
            if getattr(mesh, axis) > 1 and not axes & {*known}:
                raise ValueError(f"{self.name} cannot use {axis}, which divides {', '.join(known)}: its parameters are "
                                 f"declared with {', '.join(sorted(axes))}")
        layers = [p for p in self.step(Plan()).parts if p.flow]
        if mesh.pp > len(layers):
            raise ValueError(f"{self.name} cannot use pp {mesh.pp}: it has {len(layers)} layers to cut between")


@dataclass(frozen=True)
class Forecast:
    """What a plan needs and takes; bytes of the rank that needs most, seconds of an update."""

    plan: Plan
    memory: dict[str, int]  # parameters, gradients, optimizer, batch, activations, peak
    seconds: dict[str, float]  # compute, exposed, bubble, straggling, update
    flops: float  # of a rank and update
    sent: dict[str, dict[str, dict[str, float]]]  # by axes and kind: calls and bytes of a rank and update
    mfu: float

    @property
    def total(self) -> float:
        """Seconds of an update."""
        return sum(self.seconds.values())


def joined(works: list[Work]) -> Work:
    """Several passes as one; what is held is not added up."""
    sent: dict[str, dict] = {}
    for w in works:
        for axes, kinds in w.sent.items():
            for kind, v in kinds.items():
                entry = sent.setdefault(axes, {}).setdefault(kind, {"calls": 0, "bytes": 0})
                entry |= {k: entry[k] + v[k] for k in v}
    return Work(*(sum(getattr(w, n) for w in works) for n in ("dense", "attention", "again", "moved")), sent)


def scaled(sent: dict[str, dict], n: float) -> dict[str, dict]:
    """Transfers n times."""
    return {a: {k: {u: x * n for u, x in v.items()} for k, v in kinds.items()} for a, kinds in sent.items()}


def cut(parts: list[Part], plan: Plan, m: Machine) -> list[list[Part]]:
    """The parts of each stage of a pipeline, balanced by time."""
    count = plan.mesh.pp * plan.virtual
    if count == 1:
        return [parts]
    starts = [i for i, p in enumerate(parts) if p.flow]
    ends = [0, *starts[1:], len(parts)]  # a stage starts with a layer, the first one with what is before it
    groups = [parts[a:b] for a, b in zip(ends, ends[1:])]
    cost = [sum(machines.compute(p.forward, m) + machines.compute(p.backward, m, True) for p in g) for g in groups]
    if count > len(groups):
        raise ValueError(f"{len(groups)} layers cannot be cut into {plan.mesh.pp} x {plan.virtual} stages")
    edges = [0, *accumulate(stages.balance(cost, count))]
    return [sum(groups[a:b], []) for a, b in zip(edges, edges[1:])]


def passes(parts: list[Part], mesh: Mesh, m: Machine) -> list[tuple[float, float]]:
    """Seconds of the forward and the backward pass of some parts: (computation, transfers that show)."""
    out = []
    for back in (False, True):
        w = joined([p.backward if back else p.forward for p in parts])
        seconds = machines.compute(w, m, back)
        out.append((seconds, machines.exposed(w, mesh, m, seconds, machines.attention(w, m, back))))
    return out


def pipelined(plan: Plan, place: list[int], times: list[list[tuple[float, float]]], wait: float) -> schedule.Report:
    """The simulation of a pipeline with stages of these times, a transfer taking `wait`; of more micro-batches than 4 a
    rank, the later ones take what the busiest rank does."""
    def cost(a: schedule.Action) -> float:
        if a.kind in schedule.PEERS:
            return wait
        seconds = sum(times[a.stage][a.kind != "forward"])
        return seconds / 2 if a.kind in ("input", "weight") else seconds

    micro = min(plan.accumulate, 4 * plan.mesh.pp)
    table = schedule.build(plan.schedule, plan.mesh.pp, micro, plan.virtual, cost)
    found = schedule.simulate(table, place, cost)
    more = plan.accumulate / micro
    return schedule.Report(found.time + (more - 1) * max(found.busy), [b * more for b in found.busy], found.peak)


def forecast(model: Model, plan: Plan, m: Machine) -> Forecast:
    """Memory and time of a plan on a machine, from its lowered parts."""
    model.check(plan.mesh)
    step, mesh, n = model.step(plan), plan.mesh, plan.accumulate
    cuts, place = cut(step.parts, plan, m), schedule.places(plan.schedule, mesh.pp, plan.virtual)
    own = [sum((c for c, r in zip(cuts, place) if r == rank), []) for rank in range(mesh.pp)]
    flow = max((p.flow for c in cuts[1:] for p in c), default=0)
    found = pipelined(plan, place, [passes(c, mesh, m) for c in cuts], flow / machines.bandwidth(("pp",), mesh, m))
    memory = [_memory(model, plan, step, *of) for of in zip(own, found.peak, range(mesh.pp))]
    memory = max(memory, key=lambda b: b["peak"])
    compute = n * max(sum(c for c, _ in passes(parts, mesh, m)) for parts in own)
    sums = n if mesh.pp == 1 else 1  # a pipeline adds up its micro-batches first
    sync, *open_ = [replace(w, sent=scaled(w.sent, sums / mesh.pp)) for w in (step.sync, step.cast, step.spread)]
    late = machines.exposed(sync, mesh, m, n * max(passes(parts, mesh, m)[1][0] for parts in own), 0.0)
    late += sum(machines.exposed(w, mesh, m, 0.0, 0.0) for w in open_)  # nothing runs meanwhile
    seconds = {"compute": compute, "exposed": max(found.busy) - compute + late, "bubble": found.time - max(found.busy),
               "straggling": compute * machines.straggling(mesh.world),
               "update": (3 * memory["optimizer"] + memory["gradients"]) / (m.bandwidth * m.stream)}
    total = joined([w for p in max(own, key=len) for w in (p.forward, p.backward)])
    sent = joined([replace(total, sent=scaled(total.sent, n)), sync, *open_]).sent
    if mesh.pp > 1:
        sent["pp"] = {"send": {"calls": 2 * n * plan.virtual, "bytes": 2 * n * plan.virtual * flow}}
    mfu = model.flops * plan.batch / (sum(seconds.values()) * mesh.world * m.peak)
    return Forecast(plan, memory, seconds, n * (total.dense + total.attention), sent, mfu)


def _memory(model: Model, plan: Plan, step: Step, parts: list[Part], flying: int, rank: int) -> dict[str, int]:
    """What a rank of a pipeline holds, with activations of so many stages and micro-batches under way."""
    stored, kept = model.elements(plan.mesh)
    layers = sum(p.weights for p in step.parts)
    ends = (rank == 0) + (rank == plan.mesh.pp - 1)  # what is in no layer is half on the first, half on the last rank
    share = (sum(p.weights for p in parts) + (stored - layers) * ends / 2) / stored
    left, most = step.held(parts, share)
    more = sum(p.forward.change for p in parts) * (flying / plan.virtual - 1)
    copies = share * step.cast.change
    out = {"parameters": 4 * stored * share, "gradients": 4 * kept * share, "batch": step.batch,
           "optimizer": (8 if plan.accumulate == 1 or plan.mesh.pp > 1 else 12) * kept * share,
           "activations": left - copies + more}
    out["peak"] = out["parameters"] + out["optimizer"] + step.batch + max(most + more, out["gradients"])
    return {k: int(v) for k, v in out.items()}

