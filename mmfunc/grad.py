"""Differentiation and recomputation."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import count
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mmfunc import lower, tree
from mmfunc.kernels import attention  # noqa: F401  registers mmfunc::keep and cpu_attention
from mmfunc.nn.chain import apart
from mmfunc.tree import Tree

Policy = Literal["nothing", "attention", "dots", "everything"]


OLD = torch.__version__ < (2, 13)  # compiled, requires_grad_() is not allowed, and backward passes carry no mark
_LIVE = torch.ones((), requires_grad=True)


class _Live(torch.autograd.Function):
    """A view of the first argument that requires grad because the second does."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, live: Tensor) -> Tensor:
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        return None, None


def _live(t: Tensor) -> Tensor:
    if OLD and torch.compiler.is_compiling():
        return _Live.apply(t.detach(), _LIVE)
    return t.detach().requires_grad_()


def value_and_grad(fn: Callable, has_aux: bool = False) -> Callable:
    """(params, *args) -> (fn's value, gradients of params), or ((value, aux), gradients); None stays None.

    fn gives a 0-d tensor, with has_aux also a tree. Leaves that the value does not depend on get zeros. This is
    autograd.grad, not torch.func.grad, which ignores custom backward functions when compiled.
    """

    def run(params: Tree, *args: Any) -> tuple[Any, Tree]:
        flat = tree.flatten(params)
        with torch.enable_grad():
            live = {k: _live(t) for k, t in flat.items()}
            out = apart(fn, "loss")(tree.unflatten(live, params), *args)
            value, aux = out if has_aux else (out, None)
            with nullcontext() if torch.compiler.is_compiling() and not OLD else lower.backward():
                found = torch.autograd.grad(value, list(live.values()), allow_unused=True)
        grads = {k: torch.zeros_like(t) if g is None else g for (k, t), g in zip(live.items(), found)}
        value = value.detach()
        aux = tree.map(lambda t: t.detach() if isinstance(t, Tensor) else t, aux)
        return ((value, aux) if has_aux else value), tree.unflatten(grads, params)

    return run


# ---- recomputation

_SDPA = [getattr(torch.ops.aten, n).default for n in (
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention") if hasattr(torch.ops.aten, n)]
_SDPA += [torch.ops.higher_order.flex_attention]
_SDPA += ["npu.npu_fusion_attention.default", "mmfunc.attention_forward.default"]  # by name: they may be absent
_DOTS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]  # bmm, the scores of attention, is none of them
_OURS = [torch.ops.mmfunc.keep.default, torch.ops.mmfunc.cpu_attention.default]
SAVED = {  # operations whose results a policy keeps; fused attention is always kept: one graph cannot run it twice
    "nothing": _SDPA, "attention": [*_SDPA, *_OURS], "dots": [*_SDPA, *_DOTS, *_OURS],
}


def _choose(saved: tuple, ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if op is torch.ops.aten.matmul.default and args[1].ndim == 2:  # on NPU it is not taken apart
        op = torch.ops.aten.mm.default
    return CheckpointPolicy.MUST_SAVE if op in saved or str(op) in saved else CheckpointPolicy.MUST_RECOMPUTE


_calls = count()


def _contexts(saved: tuple) -> tuple:
    # in a trace, where each result has its own name, operations in place do no harm
    pair = create_selective_checkpoint_contexts(partial(_choose, saved), allow_cache_entry_mutation=lower.tracing())
    if getattr(pair[0], "ac_graph_id", 0) is None:  # lower() tells recomputed regions apart by this number
        pair[0].ac_graph_id = next(_calls)
    return pair


# AOT Autograd's cache of compiled code wants them by name, with a hash of what they do
def _keep_nothing() -> tuple:
    return _contexts(tuple(SAVED["nothing"]))


def _keep_attention() -> tuple:
    return _contexts(tuple(SAVED["attention"]))


def _keep_dots() -> tuple:
    return _contexts(tuple(SAVED["dots"]))


_POLICIES = {"nothing": _keep_nothing, "attention": _keep_attention, "dots": _keep_dots}
for _name, _function in _POLICIES.items():
    _function.cache_hash = f"mmfunc.grad 1: {', '.join(map(str, SAVED[_name]))}"  # count up when _choose changes


def remat(fn: Callable, policy: Policy) -> Callable:
    """fn, of whose intermediate results only what the policy names is kept for the backward pass; the rest is rerun."""
    if policy == "everything":
        return fn
    if policy not in SAVED:
        raise ValueError(f"the remat policy {policy!r} is unknown; there are {', '.join(SAVED)}, everything")
    contexts = _POLICIES[policy]

    def run(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return fn(*args)
        out = checkpoint(fn, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
        if not torch.compiler.is_compiling():
            lower.unmark()
        return out

    return run
