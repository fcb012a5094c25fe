"""Features kept across the calls of a sampling loop: TeaCache (Liu et al. 2024, arXiv:2411.19108), with the change of
the first block's residual in place of a polynomial fitted to each model.

    made = parts(lambda p, x, time: forward(p, c, {"hidden_states": x, "timestep": time}))
    output, state = step(made, 0.08, state, (p, x, time))  # state: init() at first

A call runs the first block of each Chain. While what it adds has changed little since the last computed call, what all
further blocks added then is added again in their place. It is an approximation (README has its error); a threshold of 0
computes every call, to the bit.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmfunc import tree
from mmfunc.nn.chain import Chain, current, running
from mmfunc.tree import Tree

State = dict[str, Any]  # kept: a Kept for each Chain that a call runs, None before the first; computed, reused: calls
Kept = dict[str, Tree]  # first: what the first block added, rest: what further blocks added, change: [B], float32


@dataclass(frozen=True)
class Parts:
    """A function that calls Chains, in two parts."""

    first: Callable  # (kept, args) -> (its output if further blocks add what is kept, where each Chain stands)
    rest: Callable  # (where each Chain stands, args) -> (its output, what further blocks of each Chain added)


def parts(fn: Callable, wrap: Callable = lambda fn: fn) -> Parts:
    """fn as parts; wrap: such as jit, for each of them. The first has two signatures: without and with kept."""
    return Parts(wrap(partial(_first, fn)), wrap(partial(_rest, fn)))


def init() -> State:
    """The state before the first call."""
    return {"kept": None, "computed": 0, "reused": 0}


def check(threshold: float) -> None:
    """A threshold below 0 is a ValueError."""
    if not threshold >= 0:
        raise ValueError(f"reuse is {threshold}; it must be 0 (off) or more, such as 0.08")


def step(made: Parts, threshold: float, state: State, args: tuple, compute: bool = False) -> tuple[Any, State]:
    """(fn(*args), the new state). The first call is computed, and so is any with `compute`: of a loop the last.

    The change of a sample is the mean of |r - s| over that of |s|, for what the first block adds now (r) and added in
    the last computed call (s); it is summed over the calls since. A call is computed as a whole unless the largest sum
    in the batch, and of all Chains that fn calls, stays below the threshold: so a sample depends on its batch, and
    conditional and unconditional outputs of guidance are of one kind.
    """
    check(threshold)
    out, now = made.first(state["kept"], args)
    if not now:
        raise ValueError("nothing can be reused: the function calls no Chain")
    changes = [x.pop("change") for x in now]
    if not compute and state["kept"] is not None and bool(torch.cat(changes).max() < threshold):
        kept = [k | {"change": change} for k, change in zip(state["kept"], changes)]
        return out, {"kept": kept, "computed": state["computed"], "reused": state["reused"] + 1}
    out, rest = made.rest(now, args)
    kept = [{"first": x["first"], "rest": y, "change": torch.zeros_like(d)} for x, y, d in zip(now, rest, changes)]
    return out, {"kept": kept, "computed": state["computed"] + 1, "reused": state["reused"]}


def _first(fn: Callable, kept: list[Kept] | None, args: tuple) -> tuple[Any, list[dict]]:
    found: list[dict] = []
    with running(partial(_begin, current(), None if kept is None else iter(kept), found)):
        return fn(*args), found


def _rest(fn: Callable, found: list[dict], args: tuple) -> tuple[Any, list[Tree]]:
    added: list[Tree] = []
    with running(partial(_end, current(), iter(found), added)):
        return fn(*args), added


def _begin(runner: Callable, kept: Iterator[Kept] | None, found: list, chain: Chain, p: Tree, c: Any, batch: Tree,
           cache: Any) -> Any:
    """The runner of a first part; runner: what runs the pieces of a Chain."""
    if cache is not None:
        raise ValueError("nothing can be reused: the Chain has a cache, whose entries every block must write")
    before, block, after = _cut(chain, p, c)
    with running(runner):
        x, ctx = Chain(chain.embed, before, _both)(p, c, batch)
        y = Chain(_given, (block,), _both)(p, c, (x, ctx))[0]
        first = tree.map(torch.sub, y, x)
        base, seen = Chain(_given, _plain(after), _both)(p, c, (y, ctx))
        k = next(kept) if kept else None
        change = _change(first, k) if k else torch.zeros(len(tree.leaves(y)[0]), device=tree.leaves(y)[0].device)
        found.append({"x": y, "ctx": ctx, "first": first, "change": change})
        return Chain(_given, (), chain.head)(p, c, (tree.map(torch.add, base, k["rest"]) if k else base, seen))


def _end(runner: Callable, found: Iterator[dict], added: list, chain: Chain, p: Tree, c: Any, batch: Tree, cache: Any
         ) -> Any:
    """The runner of the rest: from where a Chain stands."""
    after, now = _cut(chain, p, c)[2], next(found)
    with running(runner):
        begun = now["x"], now["ctx"]
        base = Chain(_given, _plain(after), _both)(p, c, begun)[0]
        x, ctx = Chain(_given, after, _both)(p, c, begun)
        added.append(tree.map(torch.sub, x, base))
        return Chain(_given, (), chain.head)(p, c, (x, ctx))


def _change(first: Tree, k: Kept) -> Tensor:
    """A sample's relative L1 distance over all that flows, added to what was summed, [B]."""
    size = lambda t: sum(x.float().abs().flatten(1).sum(1) for x in tree.leaves(t))
    return k["change"] + size(tree.map(torch.sub, first, k["first"])) / size(k["first"])


def _cut(chain: Chain, p: Tree, c: Any) -> tuple[tuple, Any, tuple]:
    """Steps before the first block, that block, steps after it."""
    steps = [(path, fn) if path else fn for path, fn in chain.steps(p, c)]
    blocks = [i for i, s in enumerate(steps) if not callable(s)]
    if len(blocks) < 2:
        raise ValueError(f"nothing can be reused: the Chain has {len(blocks)} block(s), it must have 2 or more")
    return tuple(steps[: blocks[0]]), steps[blocks[0]], tuple(steps[blocks[0] + 1 :])


def _plain(steps: tuple) -> tuple:
    """What remains if blocks add nothing: FLUX's join of its two streams."""
    return tuple(s for s in steps if callable(s))


def _given(p: Tree, c: Any, batch: tuple) -> tuple:
    return batch


def _both(p: Tree, c: Any, x: Tree, ctx: Tree) -> tuple:
    return x, ctx
