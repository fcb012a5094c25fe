"""Transforms: jit, value_and_grad, remat, and the one place for torch's compiler flags.

A function over trees is traced by torch.compile without graph breaks. Modes: "whole" is one graph, optimizer included;
"split" compiles the differentiated function by itself (its partitioner saves less for the backward pass) and each
`region`; "block" compiles each kind of Chain block once and runs the loop over layers in Python, so that compile time
does not grow with depth. All give the same numbers.
"""

import os
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.util import find_spec
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor
from torch._dynamo import config as dynamo
from torch._dynamo.utils import counters
from torch._functorch import config as functorch

from mmfunc import lower, tree
from mmfunc.grad import Policy, remat, value_and_grad
from mmfunc.kernels import native, rewrite
from mmfunc.nn import chain
from mmfunc.nn.chain import region, standing_in
from mmfunc.signature import (
    CompileError,
    check_donated,
    described,
    difference,
    distinct,
    explained,
    named,
    overwrite,
    same_shapes,
    signature,
)

__all__ = ["CompileError", "Jitted", "flags", "jit", "region", "remat", "value_and_grad"]

Mode = Literal["whole", "split", "block"]
Backend = Literal["inductor", "eager", "aot_eager", "npu"]
CACHED = ["autograd_cache_allow_custom_autograd_functions"]  # where torch has it
OPTIONS = {  # of the backends
    # Inductor would move products that give gradients to a graph's end: with remat up to five times the memory
    "inductor": {"reorder_for_locality": False,
                 # leaves of an update share a few scalars only; to try each pair of them costs minutes of a compilation
                 "max_fusion_buffer_group_pairwise_attempts": 8,
                 "post_grad_custom_pre_pass": rewrite.Rewrite()},
}


@contextmanager
def flags():
    """Every flag of torch that mmfunc sets, for the time of a call.

    Determinism costs a scatter-add here and there (embedding gradients without atomics); without it three runs of one
    program gave three results on CPU. Filling uninitialised memory with NaN, which torch couples to it, would cost a
    pass over every new tensor. Off by default are autograd inside a graph and the cache for functions with a backward
    of their own. Limits of recompilation are wide: signatures are counted here, by name. On a mesh a block that a remat
    policy runs notes that it runs and takes that back, which torch would refuse."""
    was = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    wanted = {"trace_autograd_ops": True, "recompile_limit": 256, "accumulated_recompile_limit": 4096,
              "skip_fwd_side_effects_in_bwd_under_checkpoint": True}
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses to be deterministic without it
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        with (dynamo.patch({k: v for k, v in wanted.items() if hasattr(dynamo, k)}),
              functorch.patch({k: True for k in CACHED if hasattr(functorch, k)})):
            yield
    finally:
        torch.use_deterministic_algorithms(was[0])
        torch.utils.deterministic.fill_uninitialized_memory = was[1]


@dataclass
class Compiled:
    """One signature of a jitted function, compiled."""

    leaves: dict[str, tuple]  # of the arguments, as signature has them
    call: Callable
    seconds: float | None = None  # of the first call
    cached: bool = False  # all of it was found in the compile cache


@dataclass
class Jitted:
    """A function over trees, compiled once for each declared signature of its arguments.

    What the function reads besides its arguments is constant from its first call on.
    """

    fn: Callable
    mode: Mode
    backend: Backend
    donate: bool
    buckets: int | list
    remat: Policy | None
    entries: dict[tuple, Compiled] = field(default_factory=dict)
    memo: dict[Any, Callable] = field(default_factory=dict)

    def __call__(self, *args: Any) -> Any:
        try:
            key, tensors = signature(args)
            entry = self.entries.get(key)
        except TypeError:
            described(args)  # says which argument it is
            raise
        with flags(), torch.no_grad():
            return self._first(key, args) if entry is None else entry.call(tensors, args)

    def _first(self, key: tuple, args: tuple) -> Any:
        leaves = described(args)
        self._admit(leaves)
        if self.donate:
            check_donated(args)
        start, was = time.perf_counter(), dict(counters["inductor"])
        entry = Compiled(leaves, self._build(args))
        with explained(_name(self.fn)):
            out = entry.call(signature(args)[1], args)
        new = {k: v - was.get(k, 0) for k, v in counters["inductor"].items()}
        entry.cached = new.get("fxgraph_cache_hit", 0) > 0 == new.get("fxgraph_cache_miss", 0)
        entry.seconds = time.perf_counter() - start
        self.entries[key] = entry
        return out

    @cached_property
    def _declared(self) -> list[dict]:
        return [] if isinstance(self.buckets, int) else [described(tuple(b)) for b in self.buckets]

    def _admit(self, leaves: dict[str, tuple]) -> None:
        """Whether one more signature may be compiled."""
        known = [e.leaves for e in self.entries.values()]
        if isinstance(self.buckets, int):
            declare = f"buckets={self.buckets + 1} or the list of their abstract arguments"
            free = len(known) < self.buckets
        else:
            declare, among = "it among the buckets", [b for b in self._declared if same_shapes(b, leaves)]
            known = [k for k in known if same_shapes(k, leaves)] if among else self._declared
            free = among and not known
        if not free:
            raise CompileError(f"{_name(self.fn)} is called with {difference(leaves, known)}. That would compile it "
                               f"again: pad to a declared shape, or declare {declare}. A number that changes should be "
                               "a 0-d tensor.")

    def _wrap(self, fn: Callable) -> Callable:
        return remat(fn, self.remat) if self.remat else fn

    def _part(self, fn: Callable, wrap: bool = False, dynamic: bool = False) -> Callable:
        """fn compiled by itself: once for its code, whatever the closure it is made anew with."""
        key = (_code(fn), wrap)
        if key not in self.memo:
            body = lambda fn, *args: (self._wrap(fn) if wrap else fn)(*args)
            self.memo[key] = self._torch(body, _name(fn), dynamic=dynamic)
        return partial(self.memo[key], fn)

    def _leaf(self, fn: Callable) -> Callable:
        """fn of one leaf compiled by itself, once for all sizes, but on NPU, where graphs have fixed shapes."""
        return self._part(fn, dynamic=self.backend != "npu")

    def _update(self, fn: Callable) -> Callable:
        """fn, an update of a leaf (optim.one), compiled by itself; of a donated state it writes into it at once."""
        if not self.donate:
            return self._leaf(fn)

        def update(fn: Callable, leaf: tuple, ctx: dict) -> None:
            overwrite(leaf[:0:-1], fn(leaf, ctx))

        return lambda leaf, ctx: self._leaf(update)(fn, leaf, ctx) or leaf[:0:-1]

    def _torch(self, fn: Callable, name: str, guards: Callable | None = None, dynamic: bool = False) -> Callable:
        if self.backend == "eager":
            return fn
        # compiled code is found by code object: each call of torch.compile gets one of its own
        fn = FunctionType(fn.__code__.replace(), fn.__globals__, name, None, fn.__closure__)
        options = OPTIONS.get(self.backend, {}) | ({"guard_filter_fn": guards} if guards else {})
        options |= native.vectors() if self.backend == "inductor" else {}
        backend = _npu() if self.backend == "npu" else self.backend
        return torch.compile(fn, fullgraph=True, dynamic=dynamic, backend=backend, options=options)

    def _ambient(self) -> Any:
        parts = {"region": self._part, "leaf": self._leaf, "update": self._update}
        if self.mode == "block":
            return standing_in(parts, chain.whole(partial(self._part, wrap=True), self._part))
        parts = parts | {"loss": self._part} if self.mode == "split" else {}
        return standing_in(parts, chain.whole(self._wrap)) if parts or self.remat else nullcontext()

    def _build(self, args: tuple) -> Callable:
        """(tensors, arguments) -> result."""
        if self.mode != "whole" or self.backend == "eager":
            return self._python
        body, shape = self.flattened(args)
        # the key of this entry says all that guards would check, at a tenth of their cost for 1,000 leaves
        call = self._torch(body, _name(self.fn), torch.compiler.skip_all_guards_unsafe)

        def run(tensors: list[Tensor], args: tuple) -> Any:
            with self._ambient():
                return shape(args, call(distinct(tensors)))

        return run

    def flattened(self, args: tuple, write: Callable = overwrite) -> tuple[Callable, Callable]:
        """fn on the list of tensors among args: (tensors -> tensors, (args, those) -> fn's result)."""
        static = {k: v for k, v in tree.flatten(args).items() if not isinstance(v, Tensor)}
        names = [k for k, v in named(args) if k not in static]
        like = tree.map(lambda _: 0, args)  # the structure only: a tensor of the closure would become a constant
        spec: dict[str, Any] = {}

        def body(tensors: list[Tensor]) -> list[Tensor]:
            given = tree.unflatten(static | dict(zip(names, tensors)), like)
            out = self.fn(*given)
            if self.donate:
                write(given[0], out[0])
                out = out[1:]
            leaves = tree.flatten(out)
            spec["out"] = tree.map(lambda _: 0, out)
            spec["static"] = {k: v for k, v in leaves.items() if not _is(v)}
            spec["names"] = [k for k, v in leaves.items() if _is(v)]
            return [leaves[k] for k in spec["names"]]

        def shape(args: tuple, tensors: list[Tensor]) -> Any:
            out = tree.unflatten(spec["static"] | dict(zip(spec["names"], tensors)), spec["out"])
            return (args[0], *out) if self.donate else out

        return body, shape

    def _python(self, tensors: list[Tensor], args: tuple) -> Any:
        given = args
        if any(t.requires_grad for t in tensors):
            args = tree.map(lambda t: t.detach() if _is(t) else t, args)
        with self._ambient():
            out = self.fn(*args)
        if not self.memo and self.mode != "whole" and self.backend != "eager":
            what = "a value_and_grad or a region" if self.mode == "split" else "a Chain or a region"
            raise CompileError(f"mode {self.mode!r} found nothing to compile in {_name(self.fn)}: it needs {what}; "
                               "use 'whole'")
        if not self.donate:
            return out
        overwrite(args[0], out[0])
        return (given[0], *out[1:])

    def lower(self, *args: Any) -> "lower.Lowered":
        """What the function does, from abstract arguments (on the meta device, or real): nothing is run."""
        with flags(), torch.no_grad(), standing_in({}, chain.whole(self._wrap)):
            return lower.trace(partial(self.flattened, args), args, self.backend, OPTIONS.get(self.backend, {}))

    def stats(self) -> list[dict]:
        """For each compiled signature: its shapes, seconds of its first call, whether the cache had it."""
        return [{"signature": ", ".join(f"{n} {tuple(leaf[0])}" for n, leaf in e.leaves.items()
                                        if leaf[0] is not None and n.startswith("1"))[:400],
                 "seconds": e.seconds, "cached": e.cached} for e in self.entries.values()]


def jit(fn: Callable, mode: Mode = "whole", backend: Backend = "inductor", *, donate: bool = False,
        buckets: int | Iterable[tuple] = 1, remat: Policy | None = None) -> Jitted:
    """Compile a function over trees; a graph break, or a call outside the buckets, is a CompileError.

    donate: the first argument is a state, fn returns (new state, ...), and the state is updated in place. buckets: how
    many different argument signatures may be compiled, or their abstract arguments. remat: what each Chain block keeps.
    """
    for name, value, known in (("mode", mode, Mode), ("backend", backend, Backend), ("remat policy", remat, Policy)):
        if value not in known.__args__ and (name, value) != ("remat policy", None):
            raise ValueError(f"jit has no {name} {value!r}; it has {', '.join(known.__args__)}")
    return Jitted(fn, mode, backend, donate, buckets if isinstance(buckets, int) else list(buckets), remat)


def _npu() -> Callable:
    """The backend for Ascend NPUs."""
    if find_spec("torch_npu") is None:
        raise ValueError("the backend 'npu' needs torch_npu, and CANN on a device; elsewhere programs/lower.py shows "
                         "what it would compile")
    from mmfunc.kernels.ge.backend import backend

    return backend()


def _is(x: Any) -> bool:
    return isinstance(x, Tensor)


def _code(fn: Callable) -> Any:
    """What stays of a function that is made anew in each call."""
    return _code(fn.func) if isinstance(fn, partial) else getattr(fn, "__code__", fn)


def _name(fn: Callable) -> str:
    return getattr(fn, "__name__", None) or (_name(fn.func) if isinstance(fn, partial) else type(fn).__name__)
