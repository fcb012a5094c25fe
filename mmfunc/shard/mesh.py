"""A mesh: how many ranks each axis has, and the process groups of a world that has so many."""

from dataclasses import dataclass
from datetime import timedelta
from itertools import combinations
from math import prod
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

AXES = "pp", "data", "fsdp", "ep", "ring", "ulysses", "tp"  # neighbours along the last axis are closest
BATCH = "data", "fsdp", "ep"  # axes along which samples are divided
ROWS = "ring", "ulysses"  # axes along which sequences are divided
PEERS = tuple(a for a in AXES if a not in BATCH)  # along which ranks have the same samples
FOREVER = timedelta(days=30)  # of a collective: whoever watches the ranks knows what takes too long


@dataclass(frozen=True)
class Mesh:
    """Ranks along each axis; an axis of one costs nothing."""

    data: int = 1  # copies of everything, each with its own samples
    fsdp: int = 1  # samples too, but parameters and what the optimizer keeps are divided
    tp: int = 1  # heads, hidden channels and vocabulary
    ring: int = 1  # sequences; keys and values go around
    ulysses: int = 1  # sequences, within attention heads
    pp: int = 1  # layers
    ep: int = 1  # samples, within layers of experts those
    zero: Literal[1, 2, 3] = 3  # what fsdp divides: 1 the optimizer's state, 2 parameters too, 3 gathered by layer
    sequence: bool = False  # tp divides sequences too, where it divides nothing else
    reduce: Literal["fp32", "own"] = "fp32"  # dtype in which ranks' gradients are summed; own: that of the computation

    @property
    def world(self) -> int:
        return prod([getattr(self, a) for a in AXES])

    def __str__(self) -> str:
        return " x ".join(f"{a} {n}" for a in AXES if (n := getattr(self, a)) > 1) or "one rank"


def fitting(mesh: Mesh, world: int) -> list[str]:
    """Changes of one axis with which a mesh has so many ranks."""
    other = {a: mesh.world // getattr(mesh, a) for a in ("data", "fsdp", "tp", "ulysses")}
    return [f"{a} {world // n}" for a, n in other.items() if world % n == 0]


@dataclass
class Net:
    """A mesh on running ranks: the groups of each set of axes, and this rank's place among them."""

    mesh: Mesh
    groups: dict[tuple[str, ...], str]
    at: tuple[int, ...]  # this rank's place on each of AXES
    place: Tensor  # the same as data, int64: an input of compiled graphs, which are therefore the same on all ranks

    @property
    def rank(self) -> int:
        """The number of this rank in the world."""
        i = 0
        for a, at in zip(AXES, self.at):
            i = i * getattr(self.mesh, a) + at
        return i

    def axes(self, among: tuple[str, ...]) -> tuple[str, ...]:
        """Those of some axes that have more than one rank, in the order of the mesh."""
        return tuple(a for a in AXES if a in among and getattr(self.mesh, a) > 1)

    def size(self, axes: tuple[str, ...]) -> int:
        """Ranks along a product of axes."""
        return prod([getattr(self.mesh, a) for a in axes])

    def index(self, axes: tuple[str, ...]) -> Tensor:
        """This rank's place along a product of axes, [1]."""
        at = torch.zeros_like(self.place[:1])
        for a in self.axes(axes):
            i = AXES.index(a)
            at = at * getattr(self.mesh, a) + self.place[i : i + 1]
        return at

    def group(self, axes: tuple[str, ...]) -> str:
        """The name of the process group of a product of axes."""
        return self.groups[self.axes(axes)]

    def processes(self, axes: tuple[str, ...]) -> dist.ProcessGroup:
        """That group itself."""
        return dist.distributed_c10d._resolve_process_group(self.group(axes))


def connect(mesh: Mesh, device: str | torch.device = "cpu") -> Net:
    """Make the process groups of a mesh; each rank of an initialised torch.distributed calls this."""
    if torch.__version__ < (2, 13):
        raise ValueError(f"a mesh needs torch 2.13, where collectives are differentiable; this is {torch.__version__}")
    world = dist.get_world_size() if dist.is_initialized() else 1
    for a in AXES:
        if (n := getattr(mesh, a)) < 1:
            raise ValueError(f"the mesh has {a} {n}; an axis has at least one rank")
    if mesh.world != world:
        fits = fitting(mesh, world)
        raise ValueError(f"the mesh {mesh} has {mesh.world} ranks, but {world} are running; "
                         + (f"{' or '.join(fits)} would fit" if fits else f"start {mesh.world}"))
    sizes = [getattr(mesh, a) for a in AXES]
    ranks = torch.arange(world).view(sizes)
    groups = {axes: _group(ranks, axes) for axes in products(mesh)}
    rank = dist.get_rank() if dist.is_initialized() else 0
    at = (ranks == rank).nonzero()[0]
    return Net(mesh, groups, tuple(at.tolist()), at.to(device))


def abstract(mesh: Mesh, rank: int = 0) -> Net:
    """A mesh on ranks that do not run: enough to see from shapes what one of them would do."""
    at = torch.stack(torch.unravel_index(torch.tensor(rank), [getattr(mesh, a) for a in AXES]))
    return Net(mesh, {axes: "+".join(axes) for axes in products(mesh)}, tuple(at.tolist()), at)


def products(mesh: Mesh) -> list[tuple[str, ...]]:
    """The products of axes that have more than one rank."""
    wide = [a for a in AXES if getattr(mesh, a) > 1]
    return [axes for n in range(1, len(wide) + 1) for axes in combinations(wide, n)]


def _group(ranks: Tensor, axes: tuple[str, ...]) -> str:
    """This rank's group of a product of axes; all ranks make all groups, in one order."""
    dims = [AXES.index(a) for a in axes]
    rows = ranks.movedim(dims, list(range(-len(dims), 0))).reshape(-1, prod(ranks.shape[d] for d in dims))
    return dist.new_subgroups_by_enumeration(rows.tolist(), FOREVER)[0].group_name
