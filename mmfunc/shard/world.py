"""A run of several ranks from beginning to end, the same under torchrun, under Slurm and alone.

Slurm: srun starts the ranks, preferably with --kill-on-bad-exit. torchrun kills what has not ended 30 s after SIGTERM;
where a step or a save may take longer, give it --shutdown-timeout.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mmfunc.shard import meet
from mmfunc.shard.mesh import FOREVER, Mesh, connect
from mmfunc.shard.use import use
from mmfunc.shard.watch import Job

COMING = 300.0  # seconds in which ranks come, at most
SEEN = 5.0  # seconds after which all hosts see a file


@contextmanager
def world(mesh: Mesh | None = None, device: str | torch.device = "cpu", *, flags: Any = None,
          files: list[str] = (), out: Path | None = None, patience: float = 600.0) -> Iterator[Job]:
    """Within, the ranks that were started are used as a mesh (None: all along data) and watched; one alone goes on
    without a mesh.

    flags: a dataclass, the same on all ranks, as is the content of the paths that `files` names of it. out: a folder
    that all hosts share. patience: seconds without progress after which a rank is missing; a first step may take ten
    times as long.
    """
    at, seconds = meet.started(), min(COMING, patience)
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "100")  # collectives that torch remembers
    store = meet.opened(at, seconds)
    facts = {"torch": torch.__version__} | (meet.facts(flags, files) if flags and at.world > 1 else {})
    store, people = meet.check_in(store, at, facts, seconds)
    with Job(store.clone(), at, people, out=out, patience=patience) as job:
        if at.world > 1:
            _group(store, at, torch.device(device))
            _one_folder(out, at)
        net = connect(mesh or Mesh(data=at.world), device) if max(at.world, mesh.world if mesh else 1) > 1 else None
        job.mark("load")
        with use(net):
            yield job
    if at.world > 1:
        dist.destroy_process_group()


def _group(store: dist.Store, at: meet.Start, device: torch.device) -> None:
    """The group of all ranks."""
    backend = {"cpu": "gloo", "npu": "cpu:gloo,npu:hccl"}.get(device.type, f"cpu:gloo,{device.type}:nccl")
    if device.type != "cpu":
        torch.get_device_module(device.type).set_device(at.local)
    dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=at.rank, world_size=at.world,
                            timeout=FOREVER)
    dist.all_reduce(torch.ones(1, device=device))


def _one_folder(out: Path | None, at: meet.Start) -> None:
    """Whether all ranks see one folder; the first collective of all."""
    token = [f".seen-{os.getpid()}"]
    if out and at.rank == 0:
        Path(out).mkdir(parents=True, exist_ok=True)
        (Path(out) / token[0]).touch()
    dist.broadcast_object_list(token)
    told = [None] * at.world
    dist.all_gather_object(told, not out or _there(Path(out) / token[0]))
    if out and at.rank == 0:
        (Path(out) / token[0]).unlink()
    if blind := [r for r, seen in enumerate(told) if not seen]:
        raise meet.Agreed(f"{meet.shown(blind)} of {at.world} cannot see what rank 0 writes to {out}; it must be a "
                          "folder that all hosts share")


def _there(file: Path) -> bool:
    """Whether a file is seen, which a network's folder may show a little later."""
    end = time.monotonic() + SEEN
    while not file.exists() and time.monotonic() < end:
        time.sleep(0.1)
    return file.exists()
