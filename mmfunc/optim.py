"""Gradient transformations as pairs of functions, chained (after optax), and the training step around them.

A transformation acts on one leaf at a time: init(name, parameter) says what it keeps for that leaf, and
update(gradient, kept, parameter, ctx) gives the next gradient and what it keeps now. What needs all leaves at once, the
global norm, is in ctx. So a whole chain is one fused pass over each leaf, and where the whole step is no graph one
compiled update serves all leaves. None for what is kept means that the transformation leaves this leaf alone.
"""

import math
import re
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfunc import shard, tree
from mmfunc.grad import value_and_grad
from mmfunc.nn.chain import apart
from mmfunc.tree import Tree

Schedule = Callable[[Tensor], Tensor | float]
Rule = str | Callable[[str, Tensor], bool]


class Transform(NamedTuple):
    """A pair of functions on one leaf."""

    init: Callable[[str, Tensor], Tree]  # (name, parameter) -> what is kept; None: not for this leaf
    update: Callable[[Tensor, Tree, Tensor, dict], tuple[Tensor, Tree]]  # (gradient, kept, parameter, ctx)
    every: int = 1  # calls that make one update
    norm: bool = False  # ctx["norm"] is the norm of the gradients as this transformation gets them
    rules: tuple[Rule, ...] = ()  # over names; each must match something


def _matches(where: Rule, name: str, p: Tensor) -> bool:
    return bool(where(name, p)) if callable(where) else re.search(where, name) is not None


def matrices(name: str, p: Tensor) -> bool:
    """The rule for what usually decays: weights with two or more dimensions that are no embedding of LoRA scales."""
    return p.ndim > 1


# ---- transformations

def chain(*parts: Transform) -> Transform:
    """Transformations from left to right; the global norm is that of the gradients where the first norm=True stands."""

    def update(g: Tensor, kept: list, p: Tensor, ctx: dict) -> tuple[Tensor, list]:
        new = []
        for part, k in zip(parts, kept):
            g, k = part.update(g, k, p, ctx)
            new.append(k)
        return g, new

    return Transform(lambda name, p: [t.init(name, p) for t in parts], update, math.prod(t.every for t in parts),
                     any(t.norm for t in parts), sum((t.rules for t in parts), ()))


def clip(limit: float) -> Transform:
    """Scale gradients so that their global norm is at most limit (as torch.nn.utils.clip_grad_norm_); 0: leave them."""
    scaled = lambda g, ctx: g * (limit / (ctx["norm"] + 1e-6)).clamp(max=1.0)
    return Transform(lambda name, p: None, lambda g, k, p, ctx: (scaled(g, ctx) if limit else g, k), norm=True)


def adamw(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Transform:
    """Rescale by running moments in float32 (Kingma & Ba 2014); with decay and scale behind it, AdamW."""

    def update(g: Tensor, kept: Tree, p: Tensor, ctx: dict) -> tuple[Tensor, Tree]:
        g = g.float()
        m, v = torch.lerp(kept["m"], g, 1 - b1), b2 * kept["v"] + (1 - b2) * g * g
        t = ctx["step"].float() + 1
        m_hat, v_hat = m / (1 - torch.exp(t * math.log(b1))), v / (1 - torch.exp(t * math.log(b2)))
        return m_hat / (v_hat.sqrt() + eps), {"m": m, "v": v}

    zero = lambda p: torch.zeros_like(p, dtype=torch.float32)
    return Transform(lambda name, p: {"m": zero(p), "v": zero(p)}, update)


def decay(rate: float, where: Rule = matrices) -> Transform:
    """Add rate times the parameter where the rule matches (decoupled weight decay, Loshchilov & Hutter 2019)."""
    return Transform(lambda name, p: {} if _matches(where, name, p) else None,
                     lambda g, k, p, ctx: (g if k is None else g + rate * p, k), rules=(where,) if rate else ())


def scale(rate: Schedule | float) -> Transform:
    """Multiply by minus the learning rate of the update."""
    return Transform(lambda name, p: None, lambda g, k, p, ctx: (-_rate(rate, ctx["step"]) * g, k))


def _rate(rate: Schedule | float, step: Tensor) -> Tensor | float:
    return rate(step) if callable(rate) else rate


def ema(rate: float = 0.9999) -> Transform:
    """Keep a float32 running mean of the parameters; the last of a chain. averaged(state) reads it. Update t = 1, 2 ...
    keeps min(rate, t / (t + 9)) of what it was, so that the mean soon forgets the beginning."""
    def update(g: Tensor, kept: Tree, p: Tensor, ctx: dict) -> tuple[Tensor, Tree]:
        t = ctx["step"].float() + 1
        return g, {"ema": torch.lerp(p.float() + g, kept["ema"], (t / (t + 9)).clamp(max=rate))}

    return Transform(lambda name, p: {"ema": p.float().clone()}, update)


def accumulate(n: int, tx: Transform) -> Transform:
    """Sum the gradients of n calls in float32, then one update of tx; the outermost transformation."""

    def update(g: Tensor, kept: Tree, p: Tensor, ctx: dict) -> tuple[Tensor, Tree]:
        u, new = tx.update(g, kept["tx"], p, ctx)  # g is the sum already: apply() adds it up to know its norm
        return u, {"sum": g, "tx": new}

    return Transform(lambda name, p: {"sum": torch.zeros_like(p, dtype=torch.float32), "tx": tx.init(name, p)}, update,
                     n * tx.every, tx.norm, tx.rules) if n > 1 else tx


def masked(tx: Transform, where: Rule) -> Transform:
    """tx where the rule matches; elsewhere there is no update and nothing is kept."""
    return Transform(lambda name, p: tx.init(name, p) if _matches(where, name, p) else None,
                     lambda g, k, p, ctx: (torch.zeros_like(g), k) if k is None else tx.update(g, k, p, ctx),
                     tx.every, tx.norm, (where, *tx.rules))


def masters(tx: Transform) -> Transform:
    """Keep float32 parameters for those stored in less, and update these."""

    def update(g: Tensor, kept: Tree, p: Tensor, ctx: dict) -> tuple[Tensor, Tree]:
        u, k = tx.update(g.float(), kept["tx"], kept["master"], ctx)
        new = kept["master"] + u
        return new.to(p.dtype).float() - p.float(), {"master": new, "tx": k}

    return Transform(lambda name, p: {"master": p.float().clone(), "tx": tx.init(name, p.float())}, update, tx.every,
                     tx.norm, tx.rules)


# ---- schedules: of the number of updates done, a 0-d tensor

def constant(rate: float) -> Schedule:
    """Always rate."""
    return lambda t: rate + 0.0 * t


def linear(peak: float, steps: int, end: float = 0.0) -> Schedule:
    """From peak to end over steps."""
    return lambda t: peak + (end - peak) * (t / steps).clamp(max=1.0)


def cosine(peak: float, steps: int, end: float = 0.0) -> Schedule:
    """From peak to end over steps along half a cosine."""
    return lambda t: end + (peak - end) * 0.5 * (1 + torch.cos(math.pi * (t / steps).clamp(max=1.0)))


def warmup(steps: int, then: Schedule) -> Schedule:
    """Linearly from 0 to where `then` starts in steps, then `then` from its beginning."""
    start = lambda t: torch.as_tensor(then(torch.zeros_like(t)))
    return lambda t: torch.where(t < steps, start(t) * (t + 1) / max(steps, 1), then((t - steps).clamp(min=0)))


# ---- the state and the step

def init(tx: Transform, params: Tree, frozen: Tree = None, *, fp16: bool = False) -> Tree:
    """The training state: params, frozen (never differentiated), opt, and counters. A rule without a match is an error.

    step counts calls, skipped those whose update was left out because it was not finite, in_a_row the latest of these.
    """
    flat = tree.flatten(params)
    for rule in tx.rules:
        if not any(_matches(rule, n, p) for n, p in flat.items()):
            raise ValueError(f"the rule {rule!r} matches none of the {len(flat)} trained parameters, such as "
                             f"{', '.join([*flat][:3])}")
    params, frozen = shard.held(params), shard.held(frozen)
    device = [*tree.leaves(params), *tree.leaves(frozen)][0].device
    flat = shard.mine(tree.flatten(params))
    count = lambda: torch.zeros((), dtype=torch.int64, device=device)
    state = {
        "params": params,
        "frozen": frozen,
        "opt": tree.unflatten({n: tx.init(n, p) for n, p in flat.items()}, params),
        "step": count(),
        "skipped": count(),
        "in_a_row": count(),
    }
    grown = {"value": torch.tensor(2.0**16, device=device), "good": count()}
    return state | {"scale": grown} if fp16 else state


def full(state: Tree) -> Tree:
    """All parameters of a state."""
    return tree.merge(state["params"], state["frozen"])


def averaged(state: Tree) -> Tree:
    """The running means that ema keeps, in place of the parameters."""
    flat = {}
    for name in tree.flatten(state["params"]):
        found = [v for k, v in tree.flatten(tree.at(state["opt"], name)).items() if k.split(".")[-1] == "ema"]
        if not found:
            raise ValueError(f"the optimizer keeps no running mean of {name}; put optim.ema(rate) at the end of the "
                             "chain")
        flat[name] = found[0]
    return tree.unflatten(shard.stored(flat), state["params"])


def ready(params: Tree, compute: torch.dtype | None) -> Tree:
    """Parameters as the loss reads them: cast, and gathered where ranks have parts."""
    return shard.ready(tree.map(lambda t: t.to(compute) if compute and t.is_floating_point() else t, params))


def step(
    loss: Callable, tx: Transform, state: Tree, batch: Any, *, compute: torch.dtype | None = None
) -> tuple[Tree, Tree]:
    """One call of training: (state, batch) -> (new state, report of 0-d tensors: loss, grad_norm, finite, ...).

    loss(params, batch) gives a 0-d tensor; parameters are cast to `compute` before it, their gradients come back in
    their own dtype. With float16 in the state (fp16=True) the loss is scaled; an overflow halves the scale.
    """
    factor = state["scale"]["value"] if "scale" in state else None

    def value(params: Tree, batch: Any) -> tuple[Tensor, Tensor]:
        out = shard.share(loss(ready(tree.merge(params, state["frozen"]), compute), batch))
        return (out if factor is None else out * factor), out

    (_, out), grads = value_and_grad(value, has_aux=True)(state["params"], shard.counted(batch))
    if factor is not None:
        grads = tree.map(lambda g: g.float() / factor, grads)
    return apply(tx, grads, state, shard.total(out))


def apply(tx: Transform, grads: Tree, state: Tree, value: Tensor) -> tuple[Tree, Tree]:
    """The second half of step: update the state by gradients, unless their norm or the value is not finite."""
    last = (state["step"] + 1) % tx.every == 0
    flat = shard.sync(tree.flatten(grads))
    kept = {n: tree.at(state["opt"], n) for n in flat}
    if tx.every > 1:
        flat = {n: kept[n]["sum"] + g for n, g in flat.items()}
    norm = shard.once({n: apart(_square, "leaf")(g) for n, g in flat.items()}).sqrt()
    finite = torch.isfinite(norm) & (torch.isfinite(value) | torch.tensor(tx.every > 1, device=value.device))
    ctx = {"step": state["step"] // tx.every - state["skipped"], "norm": norm, "apply": last & finite, "last": last}
    params, opt = {}, {}
    old = shard.mine(tree.flatten(state["params"]))
    run = apart((_updates if torch.compiler.is_compiling() else _known)(tx), "update")
    for n, g in flat.items():
        params[n], opt[n] = run((g, kept[n], old[n]), ctx)
    bad = last & ~finite
    like = state["params"]
    new = state | {"params": tree.unflatten(shard.stored(params), like), "opt": tree.unflatten(opt, like),
                   "step": state["step"] + 1, "skipped": state["skipped"] + bad}
    if "scale" in state:
        new["scale"], harmless = rescaled(state["scale"], last, finite)
        bad = bad & ~harmless
    new["in_a_row"] = torch.where(last, torch.where(bad, state["in_a_row"] + 1, 0), state["in_a_row"])
    return new, {
        "loss": value,
        "grad_norm": norm,
        "finite": finite,
        "skipped": new["skipped"],
        "in_a_row": new["in_a_row"],
    }


def _square(t: Tensor) -> Tensor:
    """The sum of squares, in float32."""
    return t.float().square().sum()


def _updates(tx: Transform) -> Callable:
    """The update of a leaf by tx."""
    return lambda leaf, ctx: one(tx, *leaf, ctx)


_known = cache(_updates)  # one function for a transformation, so that a mode which compiles it by itself does so once


def one(tx: Transform, g: Tensor, kept: Tree, p: Tensor, ctx: dict) -> tuple[Tensor, Tree]:
    """A leaf's new parameter and what is kept of it; the old bits where ctx["apply"] is false."""
    u, new = tx.update(g, kept, p, ctx)
    new = tree.map(lambda a, b: torch.where(ctx["apply"], a, b), new, kept)
    if tx.every > 1:
        new["sum"] = torch.where(ctx["last"], 0.0, g)
    return torch.where(ctx["apply"], (p.float() + u).to(p.dtype), p), new


def rescaled(old: Tree, last: Tensor, finite: Tensor) -> tuple[Tree, Tensor]:
    """The next loss scale (halved on overflow, doubled after 2,000 good updates), and whether halving may still
    help."""
    value, good = old["value"], torch.where(last, torch.where(finite, old["good"] + 1, 0), old["good"])
    grown = torch.where(good >= 2000, value * 2, value)
    value = torch.where(last & ~finite, (value / 2).clamp(min=1.0), grown)
    return {"value": value, "good": torch.where(good >= 2000, 0, good)}, old["value"] > 1.0
