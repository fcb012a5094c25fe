"""Samples dealt to ranks in rows of one length, so that all ranks have about the same to compute.

The dearest first, each to the rank that has least to do and a row with room (Graham 1969); then samples are exchanged
between ranks that have most and least, as long as that brings them closer. Every rank computes the same from the same
lengths.
"""

import heapq
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

CLOSE = 5e-4  # spread of what ranks compute at which nothing more is exchanged
FEW = 8  # partners that a rank is tried with


class Known(NamedTuple):
    """What is known of all records before they are read, [n] each."""

    tokens: np.ndarray  # 0: it cannot be used
    patches: np.ndarray
    costs: np.ndarray  # FLOPs


class Dealt(NamedTuple):
    """The samples of each rank's rows, and how far ranks are apart: the largest cost less the smallest, over the
    mean."""

    rows: list[list[list[int]]]
    spread: float


@dataclass
class Table:
    """Samples, and where each of them lies."""

    sizes: np.ndarray  # [n, 2] tokens and patches
    costs: np.ndarray  # [n]
    room: np.ndarray  # [ranks, rows] tokens
    buffer: np.ndarray  # [ranks] patches for which there is room
    rank: np.ndarray  # [n]
    row: np.ndarray  # [n]
    load: np.ndarray  # [ranks]

    def put(self, i: int, rank: int, row: int, sign: int = 1) -> None:
        """Sample i into a row; sign -1: out of it."""
        self.rank[i], self.row[i] = rank, row
        self.load[rank] += sign * self.costs[i]
        self.room[rank, row] -= sign * self.sizes[i, 0]
        self.buffer[rank] -= sign * self.sizes[i, 1]

    def fitting(self, i: int, rank: int) -> int | None:
        """The fullest row of a rank with room for sample i."""
        rows = np.flatnonzero(self.room[rank] >= self.sizes[i, 0])
        fits = len(rows) and self.buffer[rank] >= self.sizes[i, 1]
        return int(rows[self.room[rank][rows].argmin()]) if fits else None

    def deal(self) -> bool:
        """Give each sample its first place; whether there was one for all."""
        heap = [(0.0, r) for r in range(len(self.load))]
        for i in np.argsort(-self.costs, kind="stable"):
            tried: list[int] = []
            row = None
            while row is None and heap:
                tried.append(heapq.heappop(heap)[1])
                row = self.fitting(i, tried[-1])
            if row is None:
                return False
            self.put(i, tried[-1], row)
            for r in tried:
                heapq.heappush(heap, (self.load[r], r))
        return True

    def closer(self, most: int, least: int) -> bool:
        """Bring two ranks closer by moving a sample, or by exchanging two."""
        a, b, gap = (*(np.flatnonzero(self.rank == r) for r in (most, least)), self.load[most] - self.load[least])
        if not gap > 0:
            return False
        change = self.costs[a][:, None] - self.costs[b]
        more, seen = (self.sizes[a][:, None] - self.sizes[b]).transpose(2, 0, 1)
        fits = (self.room[most][self.row[a]][:, None] + more >= 0) & (self.room[least][self.row[b]] - more >= 0) & (
            (self.buffer[most] + seen >= 0) & (self.buffer[least] - seen >= 0))
        far = np.where(fits & (change > 0) & (change < gap), abs(change - gap / 2), np.inf)
        alone = (self.sizes[a, 0] <= self.room[least].max()) & (self.sizes[a, 1] <= self.buffer[least])
        moved = np.where(alone & (self.costs[a] < gap), abs(self.costs[a] - gap / 2), np.inf)
        best = min(far.min(initial=np.inf), moved.min(initial=np.inf))
        if best == np.inf:
            return False
        if moved.min(initial=np.inf) == best:
            i = int(a[moved.argmin()])
            self.put(i, most, self.row[i], -1)
            self.put(i, least, self.fitting(i, least))
            return True
        i, j = (int(x[n]) for x, n in zip((a, b), np.unravel_index(far.argmin(), far.shape)))
        there, here = self.row[i], self.row[j]
        self.put(i, most, there, -1)
        self.put(j, least, here, -1)
        self.put(i, least, here)
        self.put(j, most, there)
        return True

    def even(self) -> None:
        """Exchange samples until ranks are close; one that has nothing to exchange with the farthest is left alone."""
        left = np.ones(len(self.load), bool)
        while left.sum() > 1:
            order = np.flatnonzero(left)[np.argsort(self.load[left], kind="stable")]
            most, least = order[-1], order[0]
            if self.load[most] - self.load[least] <= CLOSE * self.load.mean():
                return
            if any(self.closer(most, r) for r in order[:-1][:FEW]):
                continue
            if any(self.closer(r, least) for r in order[1:][::-1][:FEW]):
                continue
            left[most if self.load[most] - self.load.mean() > self.load.mean() - self.load[least] else least] = False


def deal(tokens: np.ndarray, costs: np.ndarray, ranks: int, rows: int, size: int, patches: np.ndarray | None = None,
         buffer: int | None = None) -> Dealt | None:
    """Samples of so many tokens, FLOPs and patches for ranks that have rows of a size each, and a buffer of patches;
    None where they do not fit."""
    n = len(tokens)
    sizes = np.stack([tokens, np.zeros(n, np.int64) if buffer is None else patches], 1).astype(np.int64)
    t = Table(sizes, costs.astype(float), np.full((ranks, rows), size), np.full(ranks, buffer or 0),
              np.zeros(n, int), np.zeros(n, int), np.zeros(ranks))
    if not t.deal():
        return None
    t.even()
    found = [[np.flatnonzero((t.rank == r) & (t.row == k)).tolist() for k in range(rows)] for r in range(ranks)]
    return Dealt(found, float((t.load.max() - t.load.min()) / t.load.mean()))
