"""Transfers of tensors between the stages of a pipeline, named by the actions of its table."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmfunc.shard import schedule
from mmfunc.shard.schedule import Action


@dataclass
class Here:
    """Transfers within one process."""

    boxes: dict[Action, list[Tensor]] = field(default_factory=dict)

    def send(self, a: Action, tensors: list[Tensor], to: int) -> None:
        self.boxes[schedule.peer(a)] = tensors

    def expect(self, a: Action, like: list[Tensor], source: int) -> None:
        pass

    def take(self, a: Action) -> list[Tensor] | None:
        return self.boxes.pop(a, None)

    def close(self) -> None:
        pass


@dataclass
class Between:
    """Transfers between the ranks of a process group; none of them waits before its tensors are needed."""

    group: Any
    sent: list[tuple] = field(default_factory=list)
    coming: dict[Action, tuple] = field(default_factory=dict)

    def start(self, op: Callable, tensors: list[Tensor], other: int) -> list:
        ops = [dist.P2POp(op, t, group=self.group, group_peer=other) for t in tensors]
        return dist.batch_isend_irecv(ops) if ops else []

    def send(self, a: Action, tensors: list[Tensor], to: int) -> None:
        self.sent = [s for s in self.sent if not all(w.is_completed() for w in s[0])]
        self.sent.append((self.start(dist.isend, tensors, to), tensors))

    def expect(self, a: Action, like: list[Tensor], source: int) -> None:
        tensors = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in like]
        self.coming[a] = self.start(dist.irecv, tensors, source), tensors

    def take(self, a: Action) -> list[Tensor]:
        works, tensors = self.coming.pop(a)
        for w in works:
            w.wait()
        return tensors

    def close(self) -> None:
        for works, _ in self.sent:
            for w in works:
                w.wait()


def exchanged(group: Any, rank: int, shared: dict[str, tuple[Tensor, list[int]]]) -> dict[int, dict[str, Tensor]]:
    """By rank, the others' parts of sums that they have in common; shared: this rank's part, and the ranks."""
    found: dict[int, dict[str, Tensor]] = {}
    ops = []
    for n, (own, ranks) in shared.items():
        for other in [r for r in ranks if r != rank]:
            buffer = found.setdefault(other, {})[n] = torch.empty_like(own)
            pair = [dist.P2POp(dist.isend, own, group=group, group_peer=other),
                    dist.P2POp(dist.irecv, buffer, group=group, group_peer=other)]
            ops += pair if rank < other else pair[::-1]
    for w in dist.batch_isend_irecv(ops) if ops else []:
        w.wait()
    return found
