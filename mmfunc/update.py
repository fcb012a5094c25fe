"""An update of a training run, all its micro-batches: on ranks that hold all layers, or in stages along a pipeline."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from mmfunc import jit, optim, relay, shard, stages, tree
from mmfunc.relay import Plan
from mmfunc.tree import Tree


@dataclass
class Whole:
    """A training step on ranks that hold all layers; see step()."""

    call: jit.Jitted

    def __call__(self, state: Tree, batches: list[Tree]) -> tuple[Tree, Tree]:
        """(state, micro-batches of an update) -> (new state, report); the state is updated in place."""
        losses = []  # each micro-batch's part of the update's
        for batch in batches:
            state, told = self.call(state, tree.put(batch, state["step"].device))
            losses.append(told["loss"])
        return state, told | {"loss": sum(losses)}

    def stats(self) -> list[dict]:
        """Of all that was compiled."""
        return self.call.stats()


@dataclass
class Staged:
    """A training step in stages; see step()."""

    pipe: relay.Pipeline
    tx: optim.Transform
    compute: torch.dtype | None

    @cached_property
    def update(self) -> jit.Jitted:
        """What follows the pipeline."""
        return jit.jit(partial(_update, self.tx), "whole", self.pipe.backend, donate=True)

    def __call__(self, state: Tree, batches: list[Tree]) -> tuple[Tree, Tree]:
        """(state, micro-batches of an update) -> (new state, report); the state is updated in place."""
        given = [optim.ready(state[k], self.compute) for k in ("params", "frozen")]
        batches = tree.put(batches, state["step"].device)
        value, grads = self.pipe(*given, batches, state["scale"]["value"] if "scale" in state else 1.0)
        return self.update(state, grads, value.sum())

    def stats(self) -> list[dict]:
        """Of all that was compiled, as of a jitted function."""
        pieces = [p.call for s in self.pipe.made.values() for p in s.pieces.values()]
        return [entry for call in (*pieces, self.update) for entry in call.stats()]


def _update(tx: optim.Transform, state: Tree, grads: Tree, value: Tensor) -> tuple[Tree, Tree]:
    grads = shard.unready(grads)
    if "scale" in state:
        grads = tree.map(lambda g: g / state["scale"]["value"], grads)
    state = state | {"step": state["step"] + (tx.every - 1)}  # all calls of an update in one
    return optim.apply(tx, grads, state, shard.total(value))


def step(loss: stages.Loss, tx: optim.Transform, trained: Tree, frozen: Tree, batch: Callable[[], Tree],
         ranks: int = 1, plan: Plan | None = None, *, compute: torch.dtype | None = None, mode: jit.Mode = "whole",
         backend: jit.Backend = "inductor", buckets: int = 1, remat: jit.Policy | None = None) -> Whole | Staged:
    """optim.step for all micro-batches of an update. With several ranks along pp it is in stages, of which these ranks
    have the parameters from now on.

    trained, frozen: all parameters, as the mesh stores them, of which shapes are read. batch: gives a micro-batch to
    find the stages with. The state is the one that optim.init gives after this.
    """
    if ranks == 1:
        one = partial(optim.step, loss, tx, compute=compute)
        return Whole(jit.jit(one, mode, backend, donate=True, buckets=buckets, remat=remat))
    share = lambda p, b: shard.share(loss(p, shard.counted(b)))
    given = [optim.ready(relay.abstract(p), compute) for p in (trained, frozen)]
    with shard.use(None):  # encoders may run there
        example = batch()
    return Staged(relay.pipeline(share, *given, example, ranks, plan or Plan(), backend=backend, remat=remat), tx,
                  compute)
