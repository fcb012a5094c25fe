"""The cases and plans of meshes.py on real ranks, processes that talk through gloo.

    python tests/mesh_ranks.py                     # all, as a table of shares of what is allowed
    python tests/mesh_ranks.py "qwen2,flux" "tp2,ring2"
"""

import multiprocessing
import os
import socket
import sys
import traceback
from typing import Any

import meshes
import torch
import torch.distributed as dist

from mmfunc import shard


def _work(fn: Any, rank: int, world: int, port: int, args: tuple, out: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", rank=rank, world_size=world)
        out.put((rank, None, fn(rank, world, *args)))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        out.put((rank, traceback.format_exc(), None))
        out.close()
        out.join_thread()
        os._exit(1)


def run(fn: Any, world: int, *args: Any, seconds: float = 600) -> list:
    """What fn(rank, world, *args) gives on each of so many ranks, forked from this process."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("fork")
    out = context.Queue()
    ranks = [context.Process(target=_work, args=(fn, r, world, port, args, out)) for r in range(world)]
    for p in ranks:
        p.start()
    found = {}
    try:
        while len(found) < world:
            rank, error, value = out.get(timeout=seconds)
            if error:
                killed = [f"rank {r} by signal {-p.exitcode}" for r, p in enumerate(ranks) if (p.exitcode or 0) < 0]
                raise AssertionError(f"rank {rank}: {error}" + "".join(f"; {k}" for k in killed))
            found[rank] = value
        for p in ranks:
            p.join(30)
    finally:
        for p in ranks:
            p.kill()
    return [found[r] for r in range(world)]


def check(rank: int, world: int, wanted: list[tuple[str, str]], optimizers: tuple[str, ...]) -> list[dict[str, float]]:
    """meshes.shares of each (case, plan)."""
    out = []
    for name, plan in wanted:
        mesh = meshes.PLANS[plan]
        ranks = meshes.Ranks(shard.connect(mesh), lambda fn: fn(rank), lambda x: x)
        some = tuple(o for o in optimizers if mesh.pp == 1 or o != "accumulated")  # stages always accumulate
        out.append(meshes.shares(name, *meshes.found(ranks, name, some, meshes.STAGES.get(plan, meshes.ONE))))
    return out


def matrix(wanted: list[tuple[str, str]], optimizers: tuple[str, ...]) -> dict[tuple[str, str], dict[str, float]]:
    """The worst rank's figures of each (case, plan)."""
    for name in {n for n, _ in wanted}:  # before the fork, once for all ranks
        meshes.reference(name)
        for o in optimizers:
            meshes.reference(name, o)
    out = {}
    for world in sorted({meshes.PLANS[p].world for _, p in wanted}):
        some = [at for at in wanted if meshes.PLANS[at[1]].world == world]
        found = run(check, world, some, optimizers)
        out |= {at: {k: max(f[i][k] for f in found) for k in found[0][i]} for i, at in enumerate(some)}
    return out


def main(names: str = ",".join(meshes.CASES), plans: str = ",".join(meshes.PLANS)) -> int:
    torch.set_num_threads(1)
    bad = 0
    for world in sorted({meshes.PLANS[p].world for p in plans.split(",")}):
        columns: list[str] = []
        for name in names.split(","):  # one at a time: each has its time, and is told at once
            found = matrix([(name, p) for p in plans.split(",") if meshes.PLANS[p].world == world],
                           tuple(meshes.OPTIMIZERS))
            if not columns:
                columns = list(max(found.values(), key=len))
                print(f"{'':12}{f'{world} ranks':20}" + "".join(f"{c:>18}" for c in columns))
            for (_, plan), f in found.items():
                print(f"{name:12}{plan:20}" + "".join(f"{f[c]:18.3f}" if c in f else f"{'':18}" for c in columns),
                      flush=True)
                bad += any(v >= 1 for v in f.values())
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
