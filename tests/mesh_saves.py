"""Checkpoints on real ranks: written on one mesh, read on another."""

from functools import cache
from pathlib import Path

import meshes
import torch

from mmfunc import checkpoint, optim, shard, tree
from mmfunc.shard.mesh import Mesh

PLANS = {"1": Mesh(), **{n: meshes.PLANS[n] for n in ("fsdp2", "zero1", "tp2", "ulysses2", "pp2", "fsdp2 tp2")}}
TX = meshes.OPTIMIZERS["adamw"][0]


@cache
def net(plan: str) -> shard.Net | None:
    return shard.connect(PLANS[plan]) if PLANS[plan].world > 1 else None


@cache
def begun(rank: int, plan: str, name: str) -> tuple:
    """(step, batch), traced once."""
    trained, frozen = (shard.place(t) if t else None for t in meshes.divided(name))
    return meshes.stepping(name, TX, trained, frozen, meshes.samples(PLANS[plan], rank), meshes.ONE)


def session(rank: int, plan: str, name: str, source: Path, out: Path, steps: int) -> list[float]:
    """Losses of some steps behind the newest checkpoint of source; saved to out before the first and behind the last."""
    with shard.use(net(plan), meshes.declared(name)):
        trained, frozen = (shard.place(t) if t else None for t in meshes.divided(name))
        step, batch = begun(rank, plan, name)
        if PLANS[plan].pp > 1:
            shard.hold(step.pipe.holders, PLANS[plan].pp)
        state = optim.init(TX, tree.map(torch.clone, trained), frozen)
        found = checkpoint.restore(source, state)
        state = found[0] if found else state
        saver, losses = checkpoint.Saver(out), []
        saver(int(state["step"]), state, {})
        for _ in range(steps):
            state, told = step(state, batch)
            losses.append(told["loss"].item())
        saver(int(state["step"]), state, {})
        saver.close()
    return losses


def all_of(rank: int, world: int, jobs: list[tuple]) -> list[list[float]]:
    """Sessions one after the other."""
    return [session(rank, *job) for job in jobs]


def whole(name: str, folder: Path, step: int) -> tree.Tree:
    """The state of a checkpoint, read by one rank."""
    trained, frozen = meshes.divided(name)
    for newer in [s for s in checkpoint.steps(folder) if s > step]:
        checkpoint.place(folder, newer).rename(folder / f"later-{newer}")
    found = checkpoint.restore(folder, optim.init(TX, trained, frozen))[0]
    for later in folder.glob("later-*"):
        later.rename(checkpoint.place(folder, int(later.name[6:])))
    return found
