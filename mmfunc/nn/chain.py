"""A network as a value: what a batch becomes, the steps it goes through, and what is read off at the end; and the parts
of a program that jit compiles by themselves."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from itertools import takewhile
from typing import Any

import torch

from mmfunc import shard
from mmfunc.nn.conv import halving
from mmfunc.tree import Tree, at


@dataclass(frozen=True)
class Chain:
    """A network as a value: embed, then each step in turn, then head. Runners cut and wrap it between steps."""

    embed: Callable  # (p, c, batch) -> x, ctx: what flows, and what every layer may read
    stacks: tuple | Callable  # (path of a layer or of a list of layers, block) or a plain function; or (p, c) -> those
    head: Callable  # (p, c, x, ctx) -> output

    def steps(self, p: Tree, c: Any) -> Iterator[tuple[str | None, Callable]]:
        """(path of its layer, block) for each layer; (None, function) for a plain (p, c, x, ctx) -> (x, ctx)."""
        for step in self.stacks(p, c) if callable(self.stacks) else self.stacks:
            path, fn = (None, step) if callable(step) else step
            if path and isinstance(at(p, path), list):
                yield from ((f"{path}.{i}", fn) for i in range(len(at(p, path))))
            else:
                yield path, fn

    def __call__(self, p: Tree, c: Any, batch: Tree, cache: dict[str, Tree] | None = None) -> Any:
        """The output; with a cache (one entry per layer path that keeps something) also the new cache."""
        return _runner[-1](self, p, c, batch, cache)


def whole(wrap: Callable = lambda fn: fn, part: Callable = lambda fn: fn) -> Callable:
    """The runner that runs all steps; wrap stands in for each block, part for embed, head and plain functions.

    With a cache, a block is (p, c, x, ctx, entry) -> (x, entry), without one (p, c, x, ctx) -> x.
    """

    def run(chain: Chain, p: Tree, c: Any, batch: Tree, cache: dict | None) -> Any:
        x, ctx = part(chain.embed)(p, c, batch)
        new, rows = {}, None  # what blocks read and write may be divided; all else sees x whole
        steps = list(chain.steps(p, c))
        for i, (path, fn) in enumerate(steps):
            if path is None:
                x, ctx = part(fn)(p, c, shard.joined(x, rows), ctx)
                rows = None
                continue
            x, rows = shard.split(x, rows, None if cache is not None else partial(_halving, p, steps[i:]))
            fn = wrap(shard.inside(fn, path, rows))
            if cache is not None and path in cache:
                x, new[path] = fn(at(p, path), c, x, ctx, cache[path])
            else:
                x = fn(at(p, path), c, x, ctx)
        out = part(chain.head)(p, c, shard.joined(x, rows), ctx)
        return out if cache is None else (out, new)

    return run


def _halving(p: Tree, steps: list) -> int:
    """By how much the layers up to the next plain function divide the number of frames."""
    return halving(at(p, path) for path, _ in takewhile(lambda step: step[0], steps))


_runner = [whole()]


@contextmanager
def running(runner: Callable):
    """Within, calling a Chain means runner(chain, p, c, batch, cache)."""
    _runner.append(runner)
    try:
        yield
    finally:
        _runner.pop()


def current() -> Callable:
    """What runs a Chain now."""
    return _runner[-1]


# ---- parts that the modes of jit compile by themselves

_parts: list[dict[str, Callable]] = [{}]  # what stands in for a kind of part, while a jitted function runs in Python


def apart(fn: Callable, kind: str) -> Callable:
    """fn, or what stands in for it now."""
    return fn if torch.compiler.is_compiling() else _parts[-1].get(kind, lambda f: f)(fn)


def region(fn: Callable) -> Callable:
    """fn as a part that is compiled by itself where the whole is not."""

    @wraps(fn)
    def run(*args: Any) -> Any:
        return apart(fn, "region")(*args)

    return run


@contextmanager
def standing_in(parts: dict[str, Callable], runner: Callable):
    """Within, parts of these kinds are replaced, and Chains are run by runner."""
    _parts.append(parts)
    try:
        with running(runner):
            yield
    finally:
        _parts.pop()
