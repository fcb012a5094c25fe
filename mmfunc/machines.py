"""Machines as numbers, and the time that work takes on them.

The rule. Dense maps and attention run at the share of the peak that good kernels reach; the rest at a share of the
memory's bandwidth. Transfers within a node go over its links, others over the network, each at a share of its
bandwidth, with a latency that grows with log2 of the ranks. What moves parameters of layers and gradients hides behind
90 % of the computation and what moves keys around a ring behind 90 % of attention, but a tenth never hides; of tensor
parallelism half hides; of other exchanges, and of updated parameters, nothing. The slowest of n ranks with a jitter of
1 % sets the pace.
"""

from dataclasses import dataclass
from math import log, log2, prod, sqrt

from mmfunc.shard.mesh import AXES, Mesh
from mmfunc.work import Work

LINK, NET = 0.7, 0.8  # shares of bandwidths that collectives reach
HIDDEN, NEVER = 0.9, 0.1
JITTER = 0.01


@dataclass(frozen=True)
class Machine:
    """One device and how it is connected; bytes, seconds, FLOP/s."""

    peak: float  # dense bf16
    memory: float
    bandwidth: float  # of the memory
    link: float  # within a node, one way
    net: float  # between nodes, of one device
    node: int = 8  # devices
    dense: float = 0.85  # shares of the peak: matrix products
    forth: float = 0.60  # attention, forward
    back: float = 0.50  # and backward
    stream: float = 0.60  # share of the memory's bandwidth
    latency: float = 10e-6  # of a collective


_MESH = {"bandwidth": 1.6 * 2**40, "link": 196e9, "net": 25e9}  # HCCS full mesh of 8, RoCE 200 GbE
MACHINES = {
    # Ascend/msmodeling tensor_cast/device.py: peaks, memory, links, 0.6 of the memory's bandwidth. Products at 315 of
    # 353.9 TFLOP/s are measured (torch-performance-test-data 109); shares of attention are assumed
    "910b-313t": Machine(294.9e12, 64 * 2**30, **_MESH),
    "910b-376t": Machine(353.9e12, 64 * 2**30, **_MESH),
    "910c": Machine(353.9e12, 64 * 2**30, **_MESH, node=16),  # one die; two are a card
    # NVIDIA's data sheets, dense; shares: FlashAttention 2 and 3, cuBLAS, copy kernels as published
    "a100": Machine(312e12, 80e9, 2.039e12, 300e9, 25e9, forth=0.63, back=0.56, stream=0.85),
    "h100": Machine(989e12, 80e9, 3.35e12, 450e9, 50e9, dense=0.78, forth=0.70, back=0.58, stream=0.85),
    "h200": Machine(989e12, 141e9, 4.8e12, 450e9, 50e9, dense=0.80, forth=0.70, back=0.58, stream=0.83),
    # MLPerf 5.1 trains with MXFP8 at twice this peak: 72 devices share NVLink
    "gb300": Machine(2500e12, 288e9, 8e12, 900e9, 100e9, node=72, dense=0.75, forth=0.55, back=0.45, stream=0.85),
    # two cores of an AMD EPYC with AVX512-BF16, measured; ranks there share the memory
    "cpu": Machine(0.44e12, 8e9, 28e9, 5e9, 1e9, node=2, dense=0.92, forth=0.33, back=0.33, stream=0.9),
}


def get(name: str) -> Machine:
    """A machine by its name."""
    if name not in MACHINES:
        raise ValueError(f"the machine {name!r} is unknown; there are {', '.join(MACHINES)}")
    return MACHINES[name]


def compute(w: Work, m: Machine, back: bool = False) -> float:
    """Seconds of a pass, without transfers."""
    return w.dense / (m.peak * m.dense) + attention(w, m, back) + w.moved / (m.bandwidth * m.stream)


def attention(w: Work, m: Machine, back: bool = False) -> float:
    """Seconds of the attention of a pass."""
    return w.attention / (m.peak * (m.back if back else m.forth))


def bandwidth(axes: tuple[str, ...], mesh: Mesh, m: Machine) -> float:
    """Bytes a second that a rank sends along a product of axes."""
    inside = AXES[min(AXES.index(a) for a in axes) :]
    return m.link * LINK if prod(getattr(mesh, a) for a in inside) <= m.node else m.net * NET


def transfers(w: Work, mesh: Mesh, m: Machine) -> dict[tuple[str, str], float]:
    """Seconds of each kind of collective by axes, nothing hidden."""
    found = {}
    for name, kinds in w.sent.items():
        axes = tuple(name.split("+"))
        wait = m.latency * log2(prod(getattr(mesh, a) for a in axes))
        found |= {(name, k): v["bytes"] / bandwidth(axes, mesh, m) + v["calls"] * wait for k, v in kinds.items()}
    return found


def exposed(w: Work, mesh: Mesh, m: Machine, seconds: float, heads: float) -> float:
    """What of the transfers of a pass does not hide behind its computation (`seconds`, of attention `heads`)."""
    weights = ring = rest = 0.0
    for (axes, kind), t in transfers(w, mesh, m).items():
        if kind in ("all_gather", "reduce_scatter") and axes == "fsdp" or kind == "all_reduce" and "data" in axes:
            weights += t
        elif axes == "ring" and kind == "all_to_all":
            ring += t
        else:
            rest += t / 2 if axes == "tp" else t
    shown = lambda t, behind: max(t - HIDDEN * behind, 0.0) + NEVER * min(t, behind)
    return shown(weights, seconds) + shown(ring, heads) + rest


def straggling(ranks: int) -> float:
    """How much longer the slowest of some ranks takes, as a share."""
    return JITTER * sqrt(2 * log(ranks)) if ranks > 1 else 0.0
