"""Ring attention (Liu et al. 2023, arXiv:2310.01889): keys and values go around, each rank attends with its own queries
and merges what it gets by the log-sum-exp of the scores. Only a rank's own rows are kept for the backward pass, in
which keys go around once more with the sums of their gradients.

In causal order a rank has the r-th part of the sequence and the r-th from behind: of another rank's keys its second
half sees the first half, and besides either half sees its like. So each step costs every rank half a product.
"""

from typing import Any

import torch
from torch import Tensor

from mmfunc.shard.collectives import shift
from mmfunc.shard.mesh import Net
from mmfunc.shard.use import using

BLOCK = 512  # queries whose scores exist at a time
HIDDEN = -1e30  # the score of what is masked: finite, so that a row that sees nothing stays finite
PICK = 2  # the first halves if the keys are of an earlier rank, else the second ones


def ring(q: Tensor, k: Tensor, v: Tensor, own: Tensor, others: Tensor, *, causal: bool, scale: float,
         net: Net) -> Tensor:
    """Attention of a rank's queries to the keys of all. q [B, m, H, K], k and v [B, m, G, K] -> [B, m, H, K].

    own [B or 1, m]: segments of the queries; others [R, B or 1, m]: of the keys of each rank, 0 is seen by nothing.
    """
    return torch.ops.mmfunc.ring(q, k, v, own, others, net.index(("ring",)), causal, scale)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, own: Tensor, others: Tensor, at: Tensor, causal: bool,
                scale: float, net: Net) -> Tensor:
        found: list[tuple[Tensor, Tensor]] = []
        kv = torch.stack([k, v])
        for j in range(net.mesh.ring):
            seen, early = _source(others, at, j)
            for a, b, triangle in _pairs(j, causal):
                see = _see(_take(own, a, early), _take(seen, b, early), triangle)
                new = _attend(_take(q, a, early), *(_take(t, b, early) for t in kv), see, scale)
                found = _merged(found, new, a, early)
            if j < net.mesh.ring - 1:
                kv = shift(kv, "ring", net)
        o, lse = (torch.cat(t, 1) for t in zip(*found))
        ctx.save_for_backward(q, k, v, own, others, at, o.to(q.dtype), lse)
        ctx.how = causal, scale, net
        return o.to(q.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        (q, k, v, own, others, at, o, lse), (causal, scale, net) = ctx.saved_tensors, ctx.how
        delta = (g.float() * o.float()).sum(-1)
        kv = torch.stack([k, v])
        dq, dkv = torch.zeros_like(q, dtype=torch.float32), torch.zeros_like(kv, dtype=torch.float32)
        for j in range(net.mesh.ring):
            seen, early = _source(others, at, j)
            for a, b, triangle in _pairs(j, causal):
                see = _see(_take(own, a, early), _take(seen, b, early), triangle)
                mine = (_take(t, a, early) for t in (q, lse, g, delta))
                more, *rest = _slopes(*mine, *(_take(t, b, early) for t in kv), see, scale)
                dq = dq + _back(more, a, early)
                dkv = dkv + torch.stack([_back(t, b, early) for t in rest])
            if j == 0:
                home, dkv = dkv, torch.zeros_like(dkv)  # those of this rank's own keys need not go around
            else:
                dkv = shift(dkv, "ring", net)
            if j < net.mesh.ring - 1:
                kv = shift(kv, "ring", net)
        dk, dv = home + dkv
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), *[None] * 6


# an operation made of others: what a graph records of a Function itself, a remat policy does not find in it again
_lib = torch.library.Library("mmfunc", "FRAGMENT")
_lib.define("ring(Tensor q, Tensor k, Tensor v, Tensor own, Tensor others, Tensor at, bool causal, float scale) "
            "-> Tensor")
_lib.impl("ring", lambda *how: _Ring.apply(*how, using().net), "CompositeImplicitAutograd")


def _source(others: Tensor, at: Tensor, j: int) -> tuple[Tensor, Tensor]:
    """Segments of the keys that are here in step j, and whether they are an earlier rank's."""
    source = (at - j) % len(others)
    return others.index_select(0, source)[0], source < at


def _pairs(j: int, causal: bool) -> list[tuple[int | None, int | None, bool]]:
    """Which half of the queries meets which half of the keys in step j, and whether in causal order."""
    if not causal:
        return [(None, None, False)]
    return [(1, 0, False), (PICK, PICK, False)] if j else [(0, 0, True), (1, 0, False), (1, 1, True)]


def _take(x: Tensor, which: int | None, early: Tensor) -> Tensor:
    if which is None:
        return x
    halves = x.chunk(2, 1)
    return torch.where(early, *halves) if which == PICK else halves[which]


def _back(x: Tensor, which: int | None, early: Tensor) -> Tensor:
    """The transpose of _take."""
    if which is None:
        return x
    zero = torch.zeros_like(x)
    if which == PICK:
        return torch.cat([torch.where(early, x, zero), torch.where(early, zero, x)], 1)
    return torch.cat([zero, x] if which else [x, zero], 1)


def _see(own: Tensor, seen: Tensor, triangle: bool) -> Tensor:
    """Which keys queries see, bool [B or 1, m, l]."""
    see = (own[:, :, None] == seen[:, None]) & (seen > 0)[:, None]
    return see.tril() if triangle else see


def _scores(q: Tensor, k: Tensor, see: Tensor, scale: float) -> Tensor:
    """[B, G, H / G, m, l] float32; grouped queries share a key head."""
    scores = torch.einsum("bngrk,blgk->bgrnl", q.unflatten(2, (k.shape[2], -1)), k).float() * scale
    return scores.masked_fill(~see[:, None, None], HIDDEN)


def _attend(q: Tensor, k: Tensor, v: Tensor, see: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(attention [B, m, H, K], log-sum-exp of its scores [B, m, H]), float32."""
    out = []
    for rows, seen in zip(q.split(BLOCK, 1), see.split(BLOCK, 1)):
        scores = _scores(rows, k, seen, scale)
        lse = torch.logsumexp(scores, -1)
        weights = (scores - lse[..., None]).exp().to(v.dtype)
        out.append((torch.einsum("bgrnl,blgk->bngrk", weights, v).float().flatten(2, 3), _heads_last(lse)))
    return tuple(torch.cat(t, 1) for t in zip(*out))


def _heads_last(x: Tensor) -> Tensor:
    """[B, G, H / G, m] -> [B, m, H]."""
    return x.flatten(1, 2).transpose(1, 2)


def _merged(old: list[tuple[Tensor, Tensor]], new: tuple[Tensor, Tensor], which: int | None, early: Tensor) -> list:
    """What halves of the queries (or all of them) have found, with a new find."""
    if which != PICK and len(old) <= (which or 0):
        return [*old, new]
    both = [_joint(o, new) if which in (None, PICK, i) else o for i, o in enumerate(old)]
    if which != PICK:
        return both
    return [tuple(torch.where(early, *((b, a) if i == 0 else (a, b))) for a, b in zip(old[i], both[i])) for i in (0, 1)]


def _joint(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    lse = torch.logaddexp(a[1], b[1])
    return sum(o * (n - lse).exp()[..., None] for o, n in (a, b)), lse


def _slopes(q: Tensor, lse: Tensor, g: Tensor, delta: Tensor, k: Tensor, v: Tensor, see: Tensor,
            scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v by one meeting, float32. lse: of all scores of a query; delta: of g and the result."""
    dq, dk, dv = [], 0.0, 0.0
    grouped = lambda x: x.unflatten(2, (k.shape[2], -1))
    by_row = lambda x: grouped(x).permute(0, 2, 3, 1)[..., None]
    for rows, n, up, d, seen in zip(*(t.split(BLOCK, 1) for t in (q, lse, g, delta, see))):
        weights = (_scores(rows, k, seen, scale) - by_row(n)).exp().masked_fill(~seen[:, None, None], 0.0)
        up = grouped(up)
        slope = weights * (torch.einsum("bngrk,blgk->bgrnl", up, v).float() - by_row(d)) * scale
        slope, weights = slope.to(q.dtype), weights.to(v.dtype)
        dv = dv + torch.einsum("bgrnl,bngrk->blgk", weights, up).float()
        dk = dk + torch.einsum("bgrnl,bngrk->blgk", slope, grouped(rows)).float()
        dq.append(torch.einsum("bgrnl,blgk->bngrk", slope, k).float().flatten(2, 3))
    return torch.cat(dq, 1), dk, dv
