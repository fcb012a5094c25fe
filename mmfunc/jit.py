"""Transforms: jit, value_and_grad, remat, and the one place for torch's compiler flags.

A function over trees is traced by torch.compile without graph breaks. Modes: "whole" is one graph, optimizer included;
"split" compiles the differentiated function by itself (its partitioner saves less for the backward pass) and each
`region`; "block" compiles each kind of Chain block once and runs the loop over layers in Python, so that compile time
does not grow with depth. All give the same numbers.
"""

import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial, wraps
from itertools import count
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor
from torch._dynamo import config as dynamo
from torch._dynamo import exc
from torch._dynamo.utils import counters
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mmfunc import lower, tree
from mmfunc.nn import chain
from mmfunc.tree import Tree

Mode = Literal["whole", "split", "block"]
Backend = Literal["inductor", "eager", "aot_eager"]
Policy = Literal["nothing", "dots", "attention", "everything"]


class CompileError(ValueError):
    """A function that cannot be one graph, or a call outside the declared shapes."""


@contextmanager
def flags():
    """Every flag of torch that mmfunc sets, for the time of a call.

    Determinism costs a scatter-add here and there (embedding gradients without atomics); without it three runs of one
    program gave three results on CPU. Autograd inside a graph is off by default in torch 2.13.
    """
    was = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    wanted = {"trace_autograd_ops": True, "recompile_limit": 256, "accumulated_recompile_limit": 4096}
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        with dynamo.patch({k: v for k, v in wanted.items() if hasattr(dynamo, k)}):
            yield
    finally:
        torch.use_deterministic_algorithms(was[0])
        torch.utils.deterministic.fill_uninitialized_memory = was[1]


# ---- differentiation and recomputation

def value_and_grad(fn: Callable, has_aux: bool = False) -> Callable:
    """(params, *args) -> (fn's value, gradients of params), or ((value, aux), gradients); None stays None.

    fn gives a 0-d tensor, with has_aux also a tree. Leaves that the value does not depend on get zeros.
    """

    def run(params: Tree, *args: Any) -> tuple[Any, Tree]:
        flat = tree.flatten(params)
        with torch.enable_grad():
            live = {k: t.detach().requires_grad_() for k, t in flat.items()}
            out = _apart(fn, "loss")(tree.unflatten(live, params), *args)
            value, aux = out if has_aux else (out, None)
            with nullcontext() if torch.compiler.is_compiling() else lower.backward():
                found = torch.autograd.grad(value, list(live.values()), allow_unused=True)
        grads = {k: torch.zeros_like(t) if g is None else g for (k, t), g in zip(live.items(), found)}
        value = value.detach()
        aux = tree.map(lambda t: t.detach() if isinstance(t, Tensor) else t, aux)
        return ((value, aux) if has_aux else value), tree.unflatten(grads, params)

    return run


_SDPA = [getattr(torch.ops.aten, n).default for n in (
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention") if hasattr(torch.ops.aten, n)]
_DOTS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
SAVED = {  # operations whose results a policy keeps; fused attention is always kept: compiled graphs cannot run it twice
    "nothing": _SDPA, "attention": [*_SDPA, torch.ops.mmfunc.keep.default],
    "dots": [*_SDPA, *_DOTS, torch.ops.mmfunc.keep.default],
}


def _choose(saved: tuple, ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in saved else CheckpointPolicy.MUST_RECOMPUTE


_calls = count()


def _contexts(saved: tuple) -> tuple:
    pair = create_selective_checkpoint_contexts(partial(_choose, saved))
    if getattr(pair[0], "ac_graph_id", 0) is None:  # lower() tells recomputed regions apart by this number
        pair[0].ac_graph_id = next(_calls)
    return pair


def remat(fn: Callable, policy: Policy) -> Callable:
    """fn, of whose intermediate results only what the policy names is kept for the backward pass; the rest is run again."""
    if policy == "everything":
        return fn
    if policy not in SAVED:
        raise ValueError(f"the remat policy {policy!r} is unknown; there are {', '.join(SAVED)}, everything")
    contexts = partial(_contexts, tuple(SAVED[policy]))

    def run(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return fn(*args)
        return checkpoint(fn, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    return run


# ---- parts that modes compile by themselves

_parts: list[dict[str, Callable]] = [{}]  # what stands in for a kind of part, while a jitted function runs in Python


def _apart(fn: Callable, kind: str) -> Callable:
    return fn if torch.compiler.is_compiling() else _parts[-1].get(kind, lambda f: f)(fn)


def region(fn: Callable) -> Callable:
    """fn as a part that is compiled by itself where the whole is not."""

    @wraps(fn)
    def run(*args: Any) -> Any:
        return _apart(fn, "region")(*args)

    return run


@contextmanager
def _standing_in(parts: dict[str, Callable], runner: Callable):
    _parts.append(parts)
    try:
        with chain.running(runner):
            yield
    finally:
        _parts.pop()


# ---- jit

@dataclass
class Compiled:
    """One signature of a jitted function, compiled."""

    call: Callable
    seconds: float | None = None  # of the first call
    cached: bool = False  # found in the compile cache


@dataclass
class Jitted:
    """A function over trees, compiled once for each declared signature of its arguments."""

    fn: Callable
    mode: Mode
    backend: Backend
    donate: bool
    buckets: int | list
    remat: Policy | None
    entries: dict[tuple, Compiled] = field(default_factory=dict)
    memo: dict[Any, Callable] = field(default_factory=dict)

    def __call__(self, *args: Any) -> Any:
        flat = tree.flatten(args)
        key = signature(flat)
        with flags(), torch.no_grad():
            if key not in self.entries:
                self._admit(key)
                self.entries[key] = Compiled(self._build(args))
                return self._first(self.entries[key], flat, args)
            return self.entries[key].call(flat, args)

    def _first(self, entry: Compiled, flat: dict, args: tuple) -> Any:
        start, hits = time.perf_counter(), counters["inductor"]["fxgraph_cache_hit"]
        try:
            out = entry.call(flat, args)
        except (exc.Unsupported, exc.UncapturedHigherOrderOpError) as e:
            self.entries.clear()
            raise CompileError(f"{_name(self.fn)} cannot be compiled as one graph: {str(e).strip()}") from e
        entry.seconds = time.perf_counter() - start
        entry.cached = counters["inductor"]["fxgraph_cache_hit"] > hits
        return out

    def _admit(self, key: tuple) -> None:
        if isinstance(self.buckets, int):
            if len(self.entries) < self.buckets:
                return
            known, declare = list(self.entries), f"buckets={self.buckets + 1} or the list of their abstract arguments"
        else:
            known, declare = [signature(tree.flatten(tuple(b))) for b in self.buckets], "it among the buckets"
            if _shapes(key) in map(_shapes, known):
                return
        raise CompileError(f"{_name(self.fn)} is called with {difference(key, known)}. That would compile it again: pad to "
                           f"a declared shape, or declare {declare}. A number that changes should be a 0-d tensor.")

    def _wrap(self, fn: Callable) -> Callable:
        return remat(fn, self.remat) if self.remat else fn

    def _part(self, fn: Callable, wrap: bool = False) -> Callable:
        """fn compiled by itself, the same object for all who ask."""
        if (fn, wrap) not in self.memo:
            self.memo[fn, wrap] = self._torch(self._wrap(fn) if wrap else fn)
        return self.memo[fn, wrap]

    def _torch(self, fn: Callable, **options: Any) -> Callable:
        return fn if self.backend == "eager" else torch.compile(fn, fullgraph=True, dynamic=False, backend=self.backend,
                                                                **options)

    def _ambient(self) -> Any:
        if self.mode == "block":
            return _standing_in({"region": self._part}, chain.whole(partial(self._part, wrap=True), self._part))
        parts = {"loss": self._part, "region": self._part} if self.mode == "split" else {}
        return _standing_in(parts, chain.whole(self._wrap)) if parts or self.remat else nullcontext()

    def _build(self, args: tuple) -> Callable:
        """(flat arguments, arguments) -> result."""
        if self.mode != "whole" or self.backend == "eager":
            return self._python
        flat = tree.flatten(args)
        body, shape = self.flattened(args)
        options = {"options": {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}} if self.backend == "inductor" else {}
        # without guards the code object is the cache's only key: each signature gets one of its own
        body = FunctionType(body.__code__.replace(), body.__globals__, _name(self.fn), None, body.__closure__)
        call = self._torch(body, **options)
        names = [k for k, v in flat.items() if isinstance(v, Tensor)]

        def run(flat: dict, args: tuple) -> Any:
            with self._ambient():
                out = call([flat[n] for n in names])
            return shape(args, out)

        return run

    def flattened(self, args: tuple) -> tuple[Callable, Callable]:
        """fn on the list of tensors among args: (tensors -> tensors, (args, those) -> fn's result)."""
        flat = tree.flatten(args)
        static = {k: v for k, v in flat.items() if not isinstance(v, Tensor)}
        names = [k for k in flat if k not in static]
        like = tree.map(lambda _: 0, args)  # the structure only: a tensor of the closure would become a constant
        spec: dict[str, Any] = {}

        def body(tensors: list[Tensor]) -> list[Tensor]:
            given = tree.unflatten(static | dict(zip(names, tensors)), like)
            out = self.fn(*given)
            if self.donate:
                overwrite(given[0], out[0])
                out = out[1:]
            leaves = tree.flatten(out)
            spec["out"], spec["static"] = tree.map(lambda _: 0, out), {k: v for k, v in leaves.items() if not _is(v)}
            spec["names"] = [k for k, v in leaves.items() if _is(v)]
            return [leaves[k] for k in spec["names"]]

        def shape(args: tuple, tensors: list[Tensor]) -> Any:
            out = tree.unflatten(spec["static"] | dict(zip(spec["names"], tensors)), spec["out"])
            return (args[0], *out) if self.donate else out

        return body, shape

    def _python(self, flat: dict, args: tuple) -> Any:
        with self._ambient():
            out = self.fn(*args)
        if not self.donate:
            return out
        overwrite(args[0], out[0])
        return (args[0], *out[1:])

    def lower(self, *args: Any) -> "lower.Lowered":
        """What the function does, from abstract arguments (tensors on the meta device, or real ones): nothing is run."""
        with flags(), torch.no_grad(), self._ambient() if self.mode == "whole" else chain.running(chain.whole(self._wrap)):
            body, shape = self.flattened(args)
            donated = len([t for t in tree.leaves(args[0]) if isinstance(t, Tensor)]) if self.donate else 0
            return lower.trace(body, args, shape, donated, self.backend)

    def stats(self) -> list[dict]:
        """For each compiled signature: its shapes, seconds of its first call, whether the cache had it."""
        return [{"signature": ", ".join(f"{n} {tuple(s)}" for n, s, *_ in key if s is not None and n.startswith("1"))[:400],
                 "seconds": e.seconds, "cached": e.cached} for key, e in self.entries.items()]


def jit(fn: Callable, mode: Mode = "whole", backend: Backend = "inductor", *, donate: bool = False,
        buckets: int | Iterable[tuple] = 1, remat: Policy | None = None) -> Jitted:
    """Compile a function over trees; a graph break, or a call outside the buckets, is a CompileError.

    donate: the first argument is a state, fn returns (new state, ...), and the state is updated in place. buckets: how
    many different argument signatures may be compiled, or their abstract arguments. remat: what each Chain block keeps.
    """
    for name, value, known in (("mode", mode, Mode), ("backend", backend, Backend)):
        if value not in known.__args__:
            later = "; the npu backend comes with the Ascend lowering" if value == "npu" else ""
            raise ValueError(f"jit has no {name} {value!r}; it has {', '.join(known.__args__)}{later}")
    return Jitted(fn, mode, backend, donate, buckets if isinstance(buckets, int) else list(buckets), remat)


def overwrite(old: Tree, new: Tree) -> None:
    """Write the tensors of a new state into those of the old one; what is the same tensor stays as it is."""
    before, after = tree.flatten(old), tree.flatten(new)
    if before.keys() != after.keys():
        raise ValueError(f"a donated state must keep its structure; these differ: {sorted(before.keys() ^ after.keys())[:4]}")
    for name, t in before.items():
        if after[name] is not t:
            t.copy_(after[name])


def signature(flat: dict[str, Any]) -> tuple:
    """What a compiled function depends on: (name, shape, dtype, device, strides or value) of each leaf."""
    return tuple((k, t.shape, t.dtype, t.device, None if t.is_contiguous() else t.stride()) if isinstance(t, Tensor)
                 else (k, None, None, None, t) for k, t in flat.items())


def _shapes(key: tuple) -> tuple:
    return tuple((n, s, d, v if s is None else None) for n, s, d, _, v in key)


def _is(x: Any) -> bool:
    return isinstance(x, Tensor)


def _name(fn: Callable) -> str:
    return getattr(fn, "__name__", None) or getattr(getattr(fn, "func", None), "__name__", "the function")


def _said(leaf: tuple) -> str:
    name, shape, dtype, _, rest = leaf
    return f"{name} = {rest!r}" if shape is None else f"{name} {str(dtype).removeprefix('torch.')}{list(shape)}"


def difference(key: tuple, known: list[tuple]) -> str:
    """Which leaf a signature has that none of the known ones has, in words."""
    for leaf in key:
        others = {_said(k) for sig in known for k in sig if k[0] == leaf[0]}
        if _said(leaf) not in others:
            return f"argument {_said(leaf)}, compiled are {', '.join(sorted(others)) or 'calls without it'}"
    lacking = sorted({k[0] for sig in known for k in sig} - {k[0] for k in key})
    return f"a new combination of arguments{', without ' + lacking[0] if lacking else ''}"
