"""Pipeline schedules as data: for each rank a list of actions, made on one simulated clock and checked on another.

One rule makes all of them: a rank that is free does the first action that is ready, in its order of preference, and
starts a forward only while it holds fewer activations than its limit. "gpipe" has no limit (Huang et al. 2018), "1f1b"
holds as many as the ranks behind it need (Narayanan et al. 2019; with several stages on a rank, interleaved, 2021).
"zero-bubble" splits the backward and fills gaps with the gradients of parameters (Qi et al. 2023): ZB-H1 with one stage
on a rank; with two, which lie on the ranks in a V, ZB-V.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

NAMES = "gpipe", "1f1b", "zero-bubble"
COST = {"forward": 1.0, "backward": 2.0, "input": 1.0, "weight": 1.0}
HALVES = {"backward": ("input", "weight")}
PEERS = {"send": ("receive", 1), "receive": ("send", -1), "send_back": ("receive_back", -1),
         "receive_back": ("send_back", 1)}  # transfers: the other side, and how many stages away it is


class Action(NamedTuple):
    """One thing that a rank does for a stage and a micro-batch.

    "backward" is "input" (the gradient of what flows in, for which the stage before waits) and "weight" (those of
    parameters) in one. "send" gives what flows out to the next stage, "receive_back" its gradient comes back.
    """

    stage: int
    kind: str
    micro: int


Table = list[list[Action]]  # for each rank
Cost = Callable[[Action], float]


@dataclass(frozen=True)
class Report:
    """What a table does on the simulated clock; lists are by rank."""

    time: float
    busy: list[float]
    peak: list[int]  # stages and micro-batches whose activations are held at once

    @property
    def bubble(self) -> list[float]:
        """The share of the time in which a rank waits."""
        return [1 - b / self.time for b in self.busy]


def unit(a: Action) -> float:
    """Equal stages: a forward takes 1, each half of a backward 1, transfers nothing."""
    return COST.get(a.kind, 0.0)


def places(name: str, ranks: int, virtual: int = 1) -> list[int]:
    """The rank of each stage: in turn, for zero-bubble to and fro."""
    turns = [range(ranks)[:: -1 if name == "zero-bubble" and v % 2 else 1] for v in range(virtual)]
    return [r for turn in turns for r in turn]


def build(name: str, ranks: int, micro: int, virtual: int = 1, cost: Cost = unit) -> Table:
    """The table of a schedule for any number of ranks, micro-batches and stages on a rank, checked."""
    if name not in NAMES:
        raise ValueError(f"the schedule {name!r} is unknown; there are {', '.join(NAMES)}")
    if min(ranks, micro, virtual) < 1:
        raise ValueError(f"ranks {ranks}, micro-batches {micro} and stages on a rank {virtual} must be at least 1")
    place = places(name, ranks, virtual)
    table = connect(_Maker(name, place, micro, ranks, virtual, cost).run(), place, cost)
    simulate(table, place, cost)
    return table


@dataclass
class _Maker:
    """The clock that makes a table of computations."""

    name: str
    place: list[int]
    micro: int
    ranks: int
    virtual: int
    cost: Cost

    def run(self) -> Table:
        self.back, self.last = ("input", "weight") if self.name == "zero-bubble" else ("backward", "backward")
        self.next = {k: [0] * len(self.place) for k in ("forward", self.back, self.last)}  # micro-batch of each stage
        self.ends: dict[Action, float] = {}
        table: Table = [[] for _ in range(self.ranks)]
        free, now = [0.0] * self.ranks, 0.0
        while min(self.next[self.last]) < self.micro:
            for r in range(self.ranks):
                a = self.choose(r, now) if free[r] <= now else None
                if a:
                    table[r].append(a)
                    self.next[a.kind][a.stage] += 1
                    self.ends[a] = free[r] = now + self.cost(a)
            now = min(t for t in free if t > now)
        return table

    def choose(self, r: int, now: float) -> Action | None:
        """The action that a rank starts now."""
        own = [s for s, home in enumerate(self.place) if home == r]
        done = {k: sum(n[s] for s in own) for k, n in self.next.items()}
        first, most = self.limits(r)
        kinds = [self.back, "forward", "weight"]
        if done["forward"] - done[self.back] < first:
            kinds = ["forward", self.back, "weight"]
        for kind in [k for k in kinds if k in self.next]:
            left = [Action(s, kind, self.next[kind][s]) for s in own if self.next[kind][s] < self.micro]
            left.sort(key=self.order)
            for a in left if self.name == "zero-bubble" else left[:1]:  # the others keep to their order
                room = kind != "forward" or done[kind] - done[self.last] + 1 + self.reserve(own, a) <= most
                if room and all(self.ended(b) <= now for b in needs(a, self.place, False)):
                    return a
        return None

    def limits(self, r: int) -> tuple[int, int]:
        """While fewer forwards than this wait for their backward, they go first; how many may be held."""
        if self.name == "zero-bubble":
            return self.ranks - r if self.virtual == 1 else 1, self.ranks * self.virtual
        behind = self.ranks - r - 1
        few = behind + 1 if self.virtual == 1 else 2 * behind + (self.virtual - 1) * self.ranks + 1
        most = self.micro * self.virtual if self.name == "gpipe" else few
        return most, most

    def order(self, a: Action) -> tuple:
        """As many micro-batches as there are ranks go through the stages of a rank together; or the deepest first."""
        turn = a.stage if a.kind == "forward" else -a.stage
        return (-turn, a.micro) if self.name == "zero-bubble" else (a.micro // self.ranks, turn, a.micro)

    def reserve(self, own: list[int], a: Action) -> int:
        """Room that must stay for the oldest micro-batch to go through all stages, or all ranks may get stuck."""
        given = [self.next["forward"][s] for s in own]
        return given.count(min(given)) if a.micro > min(given) else 0

    def ended(self, a: Action) -> float:
        return self.ends.get(a._replace(kind=self.back) if a.kind == "input" else a, float("inf"))


def connect(table: Table, place: list[int], cost: Cost = unit) -> Table:
    """A table of computations with its transfers, each where its data are ready, on both sides.

    All ranks take them from one order in time. So they cannot get stuck, even if each waits until its peer is there.
    """
    times = clock(table, place, cost)
    events = []
    for rank, a in [(r, a) for r, actions in enumerate(table) for a in actions]:
        start, end = times[a]
        events.append((start, 1, a, rank, a))
        to = a.stage + (1 if a.kind == "forward" else -1)
        if a.kind != "weight" and 0 <= to < len(place) and place[to] != rank:
            send = Action(a.stage, "send" if a.kind == "forward" else "send_back", a.micro)
            events += [(end, 0, send, rank, send), (end, 0, send, place[to], peer(send))]
    out: Table = [[] for _ in table]
    for _, _, _, rank, a in sorted(events):
        out[rank].append(a)
    return out


def peer(a: Action) -> Action:
    """The other side of a transfer."""
    kind, step = PEERS[a.kind]
    return Action(a.stage + step, kind, a.micro)


def needs(a: Action, place: list[int], linked: bool) -> list[Action]:
    """What must be done before an action; linked: what comes from another rank must have been received."""
    s, kind, m = a
    if kind not in ("forward", "input", "backward"):
        return [Action(s, "forward" if kind == "send" else "input", m)]
    step, done, come = (-1, "forward", "receive") if kind == "forward" else (1, "input", "receive_back")
    own = [] if kind == "forward" else [Action(s, "forward", m)]
    if not 0 <= s + step < len(place):
        return own
    return [*own, Action(s, come, m) if linked and place[s + step] != place[s] else Action(s + step, done, m)]


def clock(table: Table, place: list[int], cost: Cost = unit) -> dict[Action, tuple[float, float]]:
    """When each action starts and ends, if ranks keep to their lists and a transfer waits until both sides are there.

    Only computations keep a rank busy. If the ranks get stuck, a ValueError says where.
    """
    linked = any(a.kind in PEERS for actions in table for a in actions)
    times: dict[Action, tuple[float, float]] = {}
    at, free = [0] * len(table), [0.0] * len(table)
    head = lambda r: table[r][at[r]] if at[r] < len(table[r]) else None

    def go(r: int) -> bool:
        """Whether a rank could do its next action; of a transfer, the sender does both sides."""
        a, before = head(r), needs(head(r), place, linked)
        if a.kind.startswith("receive") or not all(b in times for b in before):
            return False
        if a.kind in PEERS:
            other = peer(a)
            if head(place[other.stage]) != other:
                return False
            at[place[other.stage]] += 1
            start = times[before[0]][1]
            times[a] = times[other] = start, start + cost(a)
        else:
            start = max([free[r], *(times[b][1] for b in before)])
            free[r] = start + cost(a)
            times.update({a._replace(kind=k): (start, free[r]) for k in {a.kind, *HALVES.get(a.kind, ())}})
        at[r] += 1
        return True

    while any([go(r) for r in range(len(table)) if head(r)]):
        pass
    stuck = [f"rank {r} at {a.kind} of stage {a.stage}, micro-batch {a.micro}"
             for r in range(len(table)) if (a := head(r))]
    if stuck:
        raise ValueError(f"this schedule gets stuck: {'; '.join(stuck)}")
    return times


def simulate(table: Table, place: list[int], cost: Cost = unit) -> Report:
    """Run a table on the simulated clock; a ValueError where it is incomplete, doubled, misplaced or gets stuck."""
    work = [(a, r) for r, actions in enumerate(table) for a in actions if a.kind not in PEERS]
    micro = 1 + max(a.micro for a, _ in work)
    kinds = ("forward", "input", "weight") if any(a.kind == "input" for a, _ in work) else ("forward", "backward")
    wanted = [(Action(s, k, m), r) for s, r in enumerate(place) for k in kinds for m in range(micro)]
    if sorted(work) != sorted(wanted):
        a, r = min({*work} ^ {*wanted} or {w for w in work if work.count(w) > 1})
        times = f"{a.kind} of stage {a.stage}, micro-batch {a.micro}, {work.count((a, r))} times"
        raise ValueError(f"each stage must do {', '.join(kinds)} of each of {micro} micro-batches once, on its rank; "
                         f"rank {r} does {times}")
    end = max(t for _, t in clock(table, place, cost).values())
    peak = [max(accumulate((a.kind == "forward") - (a.kind == kinds[-1]) for a in actions)) for actions in table]
    return Report(end, [sum(cost(a) for a, r in work if r == rank) for rank in range(len(table))], peak)
