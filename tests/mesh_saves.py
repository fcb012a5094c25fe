"""Checkpoints on real ranks: written on one mesh, read on another."""

from pathlib import Path

import meshes
import torch

from mmfunc import checkpoint, optim, shard, tree
from mmfunc.shard.mesh import Mesh

PLANS = {"1": Mesh(), **{n: meshes.PLANS[n] for n in ("fsdp2", "zero1", "tp2", "ulysses2", "fsdp2 tp2")}}
TX = meshes.OPTIMIZERS["adamw"][0]


def session(rank: int, plan: str, name: str, source: Path, out: Path, steps: int) -> list[float]:
    """Losses of some steps behind the newest checkpoint of source; saved to out before the first and behind the last."""
    mesh = PLANS[plan]
    net = shard.connect(mesh) if mesh.world > 1 else None
    one = meshes.case(name)
    with shard.use(net, meshes.declared(name)):
        trained, frozen = (shard.place(t) if t else None for t in meshes.divided(name))
        state = optim.init(TX, tree.map(torch.clone, trained), frozen)
        found = checkpoint.restore(source, state)
        state = found[0] if found else state
        saver, losses, batch = checkpoint.Saver(out), [], one.batch(meshes.samples(mesh, rank))
        saver(int(state["step"]), state, {})
        for _ in range(steps):
            state, told = optim.step(lambda p, b: one.loss(p, one.c, b), TX, state, batch)
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
