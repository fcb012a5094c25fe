"""The fastest plan that fits: all divisions are estimated by scaling a few lowered steps, the best are lowered."""

from collections.abc import Iterator
from itertools import product
from math import prod
from typing import Any

from mmfunc import machines
from mmfunc.machines import Machine
from mmfunc.parts import Step
from mmfunc.plan import Forecast, Model, Plan, forecast, joined
from mmfunc.shard.mesh import Mesh
from mmfunc.work import Work

REMATS = None, "attention", "nothing"
ALONG = {"tp": Mesh(tp=2, sequence=True), "ulysses": Mesh(ulysses=2), "ring": Mesh(ring=2)}
SENT = {"tp": lambda n: 2 * (n - 1) / n, "ulysses": lambda n: 4 * (n - 1) / n**2, "ring": lambda n: 2 * (n - 1) / n}
TRIED = 4  # plans of the estimates that are lowered


def divisions(devices: int, batch: int, m: Machine) -> Iterator[Plan]:
    """Plans for so many devices and samples of an update that divide, whatever they need."""
    powers = [2**i for i in range(devices.bit_length())]
    for pp, tp, ulysses, ring in product(powers[:5], powers, powers, powers):
        inner = tp * ulysses * ring
        if devices % (pp * inner) or tp > m.node or inner > 8 * m.node:
            continue
        ranks = devices // (pp * inner)
        shards = {ranks, *(min(ranks, max(n // inner, 1)) for n in (m.node, 64, 512))}
        for fsdp, micro in product(sorted(shards), powers[:5]):
            if ranks % fsdp or batch % (ranks * micro):
                continue
            for zero, remat in product((1, 3) if fsdp > 1 else (3,), REMATS):
                mesh = Mesh(ranks // fsdp, fsdp, tp, ring, ulysses, pp, zero=zero, sequence=tp > 1)
                yield Plan(mesh, micro, batch // (ranks * micro), remat)


class Scale:
    """Steps of one sample, lowered without a mesh and along each axis, and how what they need falls along it."""

    def __init__(self, model: Model, m: Machine):
        self.m, self.size = m, model.elements(Mesh())[0]
        self.narrow = 4 if model.compute is None else 2
        self.steps = {r: self.counted(model.step(Plan(remat=r))) for r in REMATS}
        self.halves = {a: self.counted(model.step(Plan(mesh))) for a, mesh in ALONG.items()}

    def counted(self, step: Step) -> dict[str, Any]:
        """The forward and the backward pass of a step, and the activations that it leaves and needs besides."""
        passes = [joined([getattr(p, way) for p in step.parts]) for way in ("forward", "backward")]
        high = max(max(p.forward.high, p.backward.high) for p in step.parts)
        return {"passes": passes, "left": step.held()[0] - step.cast.change, "high": high} | {
            n: sum(getattr(w, n) for w in passes) for n in ("dense", "attention", "moved")}

    def share(self, mesh: Mesh, what: str) -> float:
        """What of a quantity a rank has, a + b / n along each axis."""
        falls = {a: 2 * (1 - half[what] / self.steps[None][what]) for a, half in self.halves.items()}
        return prod(1 - fall * (1 - 1 / getattr(mesh, a)) for a, fall in falls.items())

    def sent(self, plan: Plan, back: bool) -> dict[str, dict]:
        """Transfers of a pass along the axes that divide samples and layers."""
        mesh, again, out = plan.mesh, plan.remat is not None, {}
        inner = prod(getattr(mesh, a) for a in ALONG)
        for axis, half in self.halves.items():
            n = getattr(mesh, axis)
            counted = [half["passes"][back], *(half["passes"][:1] if back and again else ())] if n > 1 else []
            for kind, v in [item for w in counted for item in w.sent.get(axis, {}).items()]:
                entry = out.setdefault(axis, {}).setdefault(kind, {"calls": 0, "bytes": 0.0})
                entry["calls"] += v["calls"]
                entry["bytes"] += v["bytes"] * SENT[axis](n) * plan.micro * n / inner
        if mesh.fsdp > 1 and mesh.zero == 3:
            once = self.narrow * self.size / mesh.tp * (1 - 1 / mesh.fsdp)
            out["fsdp"] = {"all_gather": {"calls": 40, "bytes": once if again or not back else 0.0}}
            out["fsdp"] |= {"reduce_scatter": {"calls": 40, "bytes": once}} if back else {}
        return out

    def estimate(self, plan: Plan) -> tuple[float, float]:
        """About how many seconds an update takes, and bytes a rank needs."""
        mesh, m, base = plan.mesh, self.m, self.steps[plan.remat]
        scale = {n: self.share(mesh, n) * plan.micro for n in ("dense", "attention", "moved")}
        once = 0.0
        for back, w in enumerate(base["passes"]):
            w = Work(*(getattr(w, n) * scale.get(n, 0) for n in ("dense", "attention", "again", "moved")),
                     self.sent(plan, bool(back)))
            seconds = machines.compute(w, m, bool(back))
            once += seconds * (1 + machines.straggling(mesh.world))
            once += machines.exposed(w, mesh, m, seconds, machines.attention(w, m, bool(back)))
        n, inside, own = plan.accumulate, mesh.tp * mesh.pp, self.size / (mesh.tp * mesh.pp)
        later = [Work(sent={a: {"all_reduce": {"calls": 1, "bytes": 8 * own * (1 - 1 / getattr(mesh, a))}}})
                 for a in ("data", *ALONG) if getattr(mesh, a) > 1 and a != "tp"]
        late = sum(machines.exposed(w, mesh, m, once, 0.0) for w in later) / (mesh.fsdp if mesh.zero == 3 else 1)
        if mesh.zero == 1 and mesh.fsdp > 1:
            late += 6 * own * (1 - 1 / mesh.fsdp) / machines.bandwidth(("fsdp",), mesh, m)
        seconds = (n + mesh.pp - 1) * once / mesh.pp + n * late
        stored = own / (mesh.fsdp if mesh.zero == 3 else 1)
        held = (base["left"] * self.share(mesh, "left") * min(1.0, n / mesh.pp)
                + base["high"] * self.share(mesh, "high")) * plan.micro
        if plan.remat is None and mesh.zero == 3 and mesh.fsdp > 1:
            held += self.narrow * own  # what was gathered stays
        state = 4 * stored + (8 if n == 1 else 12) * own / mesh.fsdp
        sums = 4 * stored * (1 if mesh.world == mesh.fsdp * inside else 2)
        return seconds, state + max(held + 2 * self.narrow * stored, sums)


def fastest(model: Model, devices: int, batch: int, m: Machine) -> Forecast:
    """The fastest plan for so many devices and samples of an update; ValueError if none fits."""
    scale = Scale(model, m)
    plans = [(*scale.estimate(p), p) for p in divisions(devices, batch, m)]
    if not plans:
        raise ValueError(f"{batch} samples of an update cannot be divided among {devices} devices; "
                         f"a multiple or a divisor of {devices} can")
    best: list[Forecast] = []
    leanest = None
    for _, _, plan in sorted((p for p in plans if p[1] < m.memory), key=lambda p: p[0])[: 3 * TRIED]:
        f = forecast(model, plan, m)
        leanest = min((f, leanest or f), key=lambda f: f.memory["peak"])
        best += [f] if f.memory["peak"] <= m.memory else []
        if len(best) == TRIED:
            break
    if not best:
        leanest = leanest or forecast(model, min(plans, key=lambda p: p[1])[2], m)
        need, gib = leanest.memory["peak"], 2**30
        raise ValueError(f"no plan fits: {leanest.plan} needs {need / gib:.1f} GiB of a device's {m.memory / gib:.1f}, "
                         f"{(need - m.memory) / gib:.1f} GiB more than there are; the state alone is "
                         f"{(leanest.memory['parameters'] + leanest.memory['optimizer']) / gib:.1f}")
    return min(best, key=lambda f: f.total)
