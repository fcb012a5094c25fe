"""jit's modes and policies on a decoder of a few lines: agreement, memory, donation, errors."""

from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from mmfunc import jit, nn, optim, tree


class Sizes(NamedTuple):
    layers: int = 3
    width: int = 16
    heads: int = 2
    vocab: int = 32
    fused: bool = False  # PyTorch's attention


def small(c, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *s: torch.randn(*s, generator=g) / s[-1] ** 0.5
    d = c.width
    layer = lambda: {"qkv": draw(3 * d, d), "out": draw(d, d), "up": draw(4 * d, d), "down": draw(d, 4 * d)}
    return {"embed": draw(c.vocab, d), "blocks": [layer() for _ in range(c.layers)]}


def embed(p, c, b):
    return p["embed"][b["input_ids"]], {}


def block(p, c, x, ctx):
    q, k, v = linear(rms_norm(x, x.shape[-1:]), p["qkv"]).unflatten(-1, (3, c.heads, -1)).unbind(2)
    if c.fused:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    else:
        y = nn.attend(q, k, v, causal=True)
    x = x + linear(y.flatten(2), p["out"])
    return x + linear(silu(linear(rms_norm(x, x.shape[-1:]), p["up"])), p["down"])


decoder = nn.Chain(embed, (("blocks", block),), lambda p, c, x, ctx: x)


def small_step(c):
    """(params, batch) -> (loss, gradients)."""
    def value(p, b):
        return nn.cross_entropy(decoder(p, c, b), p["embed"], b["labels"])
    return lambda p, b: jit.value_and_grad(value)(p, b)


def words(c, rows=2, size=12):
    ids = torch.randint(0, c.vocab, (rows, size), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("mode", ["whole", "split", "block"])
def test_policies_agree_whatever_the_attention(mode, fused):
    c = Sizes(fused=fused)
    p, b = small(c), words(c)
    want, grads = small_step(c)(p, b)
    for policy in ("nothing", "attention", "dots", "everything"):
        loss, found = jit.jit(small_step(c), mode, "aot_eager", remat=policy)(p, b)
        assert abs(loss - want) <= 1e-6 * want
        for x, y in zip(tree.leaves(found), tree.leaves(grads)):
            assert (x - y).abs().max() <= 1e-5 * y.abs().max()


def test_policies_save_memory():
    """Of the lowered graph: the more is run again, the less is held and the more is computed."""
    c = Sizes(layers=8)
    args = tree.abstract(tree.map(lambda t: tree.Param(tuple(t.shape), "_ " * t.ndim), small(c))), words(c, 8, 64)
    low = {r: jit.jit(small_step(c), remat=r).lower(*args) for r in (None, "dots", "attention", "nothing")}
    held = [v.memory()["temporary"] for v in low.values()]
    done = [v.cost()["flops"] for v in low.values()]
    assert held[1] < 0.75 * held[0] and held[2] < 0.5 * held[0] and held[3] <= held[2]
    assert done == sorted(done) and done[3] < 1.35 * done[0]


def test_remat_holds_with_operations_in_place():
    """lower() gives a functional graph: what a recomputed block does in place is done again."""
    def layer(p, c, x, ctx):
        y = x @ p["w"]
        y.add_(1)
        return x + y * y

    chain = nn.Chain(lambda p, c, b: (b, {}), (("blocks", layer),), lambda p, c, x, ctx: x)
    step = lambda p, b: jit.value_and_grad(lambda p, b: chain(p, None, b).square().mean())(p, b)
    p, b = {"blocks": [{"w": torch.randn(4, 4)} for _ in range(3)]}, torch.randn(2, 4)
    want, grads = step(p, b)
    low = jit.jit(step, backend="eager", remat="nothing").lower(p, b)
    value, found = low.compile()(p, b)
    assert "_(" not in "".join(str(n.target).split(".")[-2] + "(" for n in low.graph.graph.nodes if n.op == "call_function")
    assert torch.allclose(value, want) and all(map(torch.allclose, tree.leaves(found), tree.leaves(grads)))


def test_inductor_agrees_in_whole_mode_with_remat():
    c = Sizes(layers=2)
    p, b = small(c), words(c)
    want, grads = small_step(c)(p, b)
    torch._dynamo.utils.counters.clear()
    loss, found = jit.jit(small_step(c), remat="nothing")(p, b)
    kept = torch._dynamo.utils.counters["aot_autograd"]
    assert kept["total"] == 1 and not kept["autograd_cache_bypass"]  # a second process finds all of it
    assert abs(loss - want) <= 1e-6 * want
    for x, y in zip(tree.leaves(found), tree.leaves(grads)):
        assert (x - y).abs().max() <= 1e-5 * y.abs().max()


@pytest.mark.parametrize("mode", ["whole", "split", "block"])
def test_the_second_call_compiles_nothing(mode):
    """Neither a closure made anew in each call nor its tensors make it compile, or keep, anything again."""
    c = Sizes(layers=2)
    f = jit.jit(lambda p, b: jit.value_and_grad(lambda p: nn.cross_entropy(decoder(p, c, b), p["embed"], b["labels"]))(p),
                mode, "aot_eager")
    p, b = small(c), tree.map(torch.clone, words(c))
    f(p, b)
    torch._dynamo.utils.counters.clear()
    kept = len(f.memo)
    for _ in range(3):
        other = tree.map(torch.clone, b)
        other["labels"][0, 0] += 1
        assert torch.equal(f(small(c, 1), other)[0], small_step(c)(small(c, 1), other)[0])
    assert not torch._dynamo.utils.counters["stats"] and len(f.memo) == kept


def test_what_is_one_tensor_in_the_first_call_may_be_two_in_the_next():
    f = jit.jit(lambda b: b["x"] - 2 * b["y"], backend="aot_eager")
    x = torch.ones(3)
    assert torch.equal(f({"x": x, "y": x}), -x) and torch.equal(f({"x": x, "y": 5 * x}), -9 * x)
    assert torch.equal(f({"y": 2 * x, "x": x}), -3 * x)  # nor does the order of names matter


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_donated_states(backend):
    swap = jit.jit(lambda s: ({"a": s["b"], "b": s["a"] + 1},), backend=backend, donate=True)
    state = {"a": torch.zeros(2), "b": torch.full((2,), 5.0, requires_grad=True)}
    (new,) = swap(state)
    assert new is state and torch.equal(state["a"], torch.full((2,), 5.0)) and torch.equal(state["b"].detach(), torch.ones(2))
    one = torch.zeros(2)
    for args, message in (((({"a": one, "b": one}),), "0.a is donated, and 0.b is the same memory"),):
        with pytest.raises(ValueError, match=message):
            jit.jit(lambda s: ({"a": s["a"] + 1, "b": s["b"]},), backend=backend, donate=True)(*args)
    for fn, message in ((lambda s: ({"a": s["a"].double()},), r"0\.|a float32\[2\] became a float64\[2\]"),
                        (lambda s: ({"a": s["a"][:1]},), r"a float32\[2\] became a float32\[1\]"),
                        (lambda s: ({"b": s["a"]},), "keep its structure")):
        with pytest.raises(ValueError, match=message):
            jit.jit(fn, backend=backend, donate=True)({"a": torch.zeros(2)})


def test_errors_say_what_happened():
    def unready(b):
        if b.ndim == 1:
            raise ValueError("the batch needs prepare()")
        return b

    with pytest.raises(jit.CompileError, match=r"(?s)unready.*it raised ValueError\('the batch needs prepare\(\)'\).*test_modes.py"):
        jit.jit(unready, backend="aot_eager")(torch.ones(3))
    for mode in ("split", "block"):
        with pytest.raises(jit.CompileError, match="found nothing to compile in <lambda>"):
            jit.jit(lambda x: x + 1, mode, "aot_eager")(torch.ones(3))
    with pytest.raises(ValueError, match="argument 0.x is a set"):
        jit.jit(lambda b: b["y"], backend="eager")({"x": {1}, "y": torch.ones(1)})
    f = jit.jit(lambda x: x + 1, backend="aot_eager")
    f(torch.ones(2, 3))
    with pytest.raises(jit.CompileError, match=r"0 float32\[2, 3\] with strides \(1, 2\), compiled are 0 float32\[2, 3\]"):
        f(torch.ones(3, 2).T)


def test_a_failed_signature_leaves_the_others():
    f = jit.jit(lambda x: x + 1 if x.shape[0] < 3 or x.sum() > 0 else x, backend="aot_eager", buckets=2)
    assert f(torch.ones(2)).sum() == 4
    with pytest.raises(jit.CompileError, match="(?i)data-dependent"):
        f(torch.ones(3))
    assert len(f.entries) == 1 and f(torch.ones(1)) == 2 and [s["cached"] for s in f.stats()] == [False, False]
    with pytest.raises(jit.CompileError, match="(?i)buckets=3"):
        f(torch.ones(3))


def test_fused_attention_is_counted():
    c = Sizes(layers=1, fused=True)
    ops = jit.jit(small_step(c)).lower(small(c), words(c, 2, 32)).cost()["flops_by_op"]
    one = 2 * c.heads * 32 * 32 * (c.width // c.heads) * 2  # rows, heads, scores, width, multiply and add
    fused = "_scaled_dot_product_flash_attention_for_cpu"
    assert ops[f"{fused}.default"] == 2 * one and ops[f"{fused}_backward.default"] == 5 * one


def test_a_donated_state_is_no_temporary():
    """Its update is written leaf by leaf, not held as a second state."""
    tx = optim.chain(optim.adamw(), optim.scale(1e-2))
    state = optim.init(tx, {"w": [torch.zeros(1000) for _ in range(20)]})
    loss = lambda p, b: sum((w * b).sum() for w in p["w"])
    low = jit.jit(partial(optim.step, loss, tx), donate=True).lower(state, torch.ones(1000))
    assert low.memory()["temporary"] < 1.7 * 20 * 4000  # gradients, and what one leaf needs
