"""What operations of a lowered graph do: FLOPs, bytes moved and sent, bytes held."""

from dataclasses import dataclass, field

import torch
from torch.fx import Node

from mmfunc import lower

DENSE = "mm", "addmm", "convolution", "convolution_backward", "mv", "dot"
JOINED = ("_to_copy", "native_layer_norm", "native_layer_norm_backward", "_softmax", "_softmax_backward_data",
          "logsumexp", "clone", "expand", "constant_pad_nd")
SPREAD = 4  # results that are made of more tensors than this are stored, as by Inductor
# so is an exponential that is read twice; what these are made of is one, for the backward pass too
EXPONENTIAL = "exp", "sigmoid", "tanh"
HEAVY = {"silu": "silu_backward", "gelu": "gelu_backward"}


@dataclass(frozen=True)
class Work:
    """What one pass through a part does on a rank."""

    dense: int = 0  # FLOPs of dense maps
    attention: int = 0
    again: int = 0  # of both, run only because a remat policy did not keep the result
    moved: int = 0  # bytes between memory and all other operations, fused
    sent: dict[str, dict] = field(default_factory=dict)  # as Lowered.collectives
    high: int = 0  # bytes held at once, beyond those before
    change: int = 0  # bytes held after it, beyond those before


def early(n: Node) -> bool:
    """Whether an operation was recorded before the backward pass."""
    return n.meta.get("custom", {}).get("phase") != "backward" and not n.name.endswith("_recomputed")


def _fusable(n: Node) -> bool:
    """Whether a compiler joins an operation with those that make what it reads."""
    tags = getattr(n.target, "tags", ())
    return torch.Tag.pointwise in tags or torch.Tag.reduction in tags or _name(n) in JOINED


def _name(n: Node) -> str:
    return str(n.target).partition(".")[2].partition(".")[0]


@dataclass
class Graph:
    """A lowered graph as a compiler would run it: elementwise results that only such operations read do not exist, nor
    do those apart that are joined to one. Or eager: each operation has its result."""

    low: lower.Lowered
    eager: bool = False

    def __post_init__(self):
        self.nodes = list(self.low.graph.graph.nodes)[:-1]
        self.own = lower.owned(self.low.graph)  # of what does not exist, what it is made of
        self.views = {n for n in self.nodes if n.op == "call_function" and self.own[n]
                      and all(any(s in self.own[m] for m in n.all_input_nodes) for s in self.own[n])}
        self.fused: set[Node] = set()
        self.more: dict[Node, dict[int, int]] = {}  # what operations share that is in no graph
        if not self.eager:
            self.fuse()
        self.timeline = self.low.held(self.own, self.more, set() if self.eager else {*filter(_fusable, self.nodes)})[0]

    def fuse(self) -> None:
        """Find what does not exist, and what does besides."""
        calls = lower.calls(self.low.graph)
        for n in [n for n in calls if _name(n) in HEAVY]:
            back = [m for m in calls if _name(m) == HEAVY[_name(n)] and self.own[m.args[1]] == self.own[n.args[0]]]
            shared = {-1 - len(self.more): sum(self.own[n].values())}
            self.more |= dict.fromkeys(back, shared) if back else {}
            self.own[n] |= shared if back else {}
        for n in calls:
            reads = self.reads(n)
            gone = any(m in self.fused for m in n.all_input_nodes) if n in self.views else self.joined(n, len(reads))
            if gone:
                self.fused.add(n)
                self.own[n] = reads | {s: b for s, b in self.own[n].items() if s < 0}
        for n in [n for n in calls if _name(n) == "cat"]:
            for m in [m for m in n.all_input_nodes if m.op == "call_function" and len(m.users) == 1]:
                if m not in self.fused and m not in self.views:
                    self.own[m] = self.own[n]

    def reads(self, n: Node) -> dict[int, int]:
        """The stored tensors that an operation reads, and their bytes."""
        return {s: b for m in n.all_input_nodes for s, b in self.own[m].items()} | self.more.get(n, {})

    def readers(self, n: Node) -> list[Node]:
        return [r for u in n.users for r in (self.readers(u) if u in self.views else [u])]

    def joined(self, n: Node, reads: int) -> bool:
        elementwise = _fusable(n) and torch.Tag.reduction not in n.target.tags and reads <= SPREAD
        readers = self.readers(n)
        return elementwise and all(map(_fusable, readers)) and (len(readers) < 2 or _name(n) not in EXPONENTIAL)

    def work(self, at: range | list[int], before: int, change: int) -> Work:
        """What some operations, numbers in order, do where so many bytes are held before them."""
        dense = attention = again = moved = 0
        nodes = [self.nodes[i] for i in at]
        for n in [n for n in nodes if n.op == "call_function"]:
            if flops := lower.flops_of(n):
                plain = n.target._overloadpacket.__name__ in DENSE
                dense, attention = (dense + flops, attention) if plain else (dense, attention + flops)
                again += flops if plain and n.name.endswith("_recomputed") else 0
            elif n not in self.fused and n not in self.views and "c10d" not in str(n.target):
                moved += sum((self.own[n] | self.reads(n)).values())
        high = max((self.timeline[i][0] for i in at), default=before) - before
        return Work(dense, attention, again, moved, self.low.collectives(nodes), high, change) if nodes else Work()
