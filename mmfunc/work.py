"""What operations of a lowered graph do: FLOPs, bytes moved and sent, bytes held."""

from dataclasses import dataclass, field

import torch
from torch.fx import Node

from mmfunc import lower

DENSE = "mm", "addmm", "convolution", "convolution_backward", "mv", "dot"
JOINED = ("_to_copy", "native_layer_norm", "native_layer_norm_backward", "_softmax", "_softmax_backward_data",
          "logsumexp", "clone", "expand", "constant_pad_nd")
SPREAD = 4  # results that are made of more tensors than this are stored, as by Inductor


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
    tags, name = getattr(n.target, "tags", ()), str(n.target).partition(".")[2].partition(".")[0]
    return torch.Tag.pointwise in tags or torch.Tag.reduction in tags or name in JOINED


@dataclass
class Graph:
    """A lowered graph as a compiler would run it: elementwise results that only such operations read do not exist."""

    low: lower.Lowered

    def __post_init__(self):
        self.nodes = list(self.low.graph.graph.nodes)[:-1]
        self.own = lower.owned(self.low.graph)  # of what does not exist, what it is made of
        self.views = {n for n in self.nodes if n.op == "call_function" and self.own[n]
                      and all(any(s in self.own[m] for m in n.all_input_nodes) for s in self.own[n])}
        self.fused: set[Node] = set()
        for n in lower.calls(self.low.graph):
            reads = self.reads(n)
            gone = any(m in self.fused for m in n.all_input_nodes) if n in self.views else self.joined(n, len(reads))
            if gone:
                self.fused.add(n)
                self.own[n] = reads
        self.timeline = self.low.held(self.own)[0]

    def reads(self, n: Node) -> dict[int, int]:
        """The stored tensors that an operation reads, and their bytes."""
        return {s: b for m in n.all_input_nodes for s, b in self.own[m].items()}

    def readers(self, n: Node) -> list[Node]:
        return [r for u in n.users for r in (self.readers(u) if u in self.views else [u])]

    def joined(self, n: Node, reads: int) -> bool:
        elementwise = _fusable(n) and torch.Tag.reduction not in n.target.tags and reads <= SPREAD
        return elementwise and all(map(_fusable, self.readers(n)))

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
