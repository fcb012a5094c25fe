"""jit: breaks, buckets, donation, regions, lowering, determinism, and compile time that is flat in depth."""

from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmfunc import jit, models, optim, random, tree
from mmfunc.models import qwen2

C = qwen2.PRESETS["tiny"]
IDS = torch.randint(0, C.vocab, (2, 40), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS, "labels": IDS}


def params():
    return tree.init(qwen2.params(C), random.key(0))


def loss(p, b):
    return qwen2.loss(p, C, b)


def test_a_graph_break_is_an_error_with_its_place():
    with pytest.raises(jit.CompileError, match=r"(?s)[Dd]ata-dependent.*test_jit.py"):
        jit.jit(lambda x: x if x.sum() > 0 else -x, backend="aot_eager")(torch.ones(3))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_arguments_are_read_at_each_call(backend):
    """The state is written in place and returned; the batch of one call is no constant of the next."""
    f = jit.jit(
        lambda s, b: ({"n": s["n"] + b["x"].sum(), "kept": s["kept"]}, b["x"] * 2), backend=backend, donate=True
    )
    state = {"n": torch.zeros(()), "kept": torch.ones(2)}
    where = state["n"].data_ptr(), state["kept"]
    for i in range(3):
        new, y = f(state, {"x": torch.full((3,), float(i))})
        assert new is state and torch.equal(y, torch.full((3,), 2.0 * i))
    assert state["n"] == 9 and (state["n"].data_ptr(), state["kept"]) == where


def test_another_shape_is_an_error_that_names_it():
    f = jit.jit(lambda x, k: x["a"] * k, backend="aot_eager", buckets=1)
    f({"a": torch.ones(3)}, 2)
    with pytest.raises(jit.CompileError, match=r"0\.a float32\[4\], compiled are 0\.a float32\[3\].*buckets=2"):
        f({"a": torch.ones(4)}, 2)
    with pytest.raises(jit.CompileError, match=r"1 = 3, compiled are 1 = 2.*0-d tensor"):
        f({"a": torch.ones(3)}, 3)
    g = jit.jit(
        lambda x: x + 1,
        backend="aot_eager",
        buckets=[(torch.empty(3, device="meta"),), (torch.empty(5, device="meta"),)],
    )
    assert g(torch.ones(5)).sum() == 10 and len(g.entries) == 1
    with pytest.raises(jit.CompileError, match="among the buckets"):
        g(torch.ones(4))


def test_unknown_names():
    for bad in ({"mode": "fast"}, {"backend": "tpu"}):
        with pytest.raises(ValueError, match="it has"):
            jit.jit(loss, **bad)
    with pytest.raises(ValueError, match="attention, dots, everything"):
        jit.remat(loss, "some")


def test_a_region_is_compiled_apart_where_the_whole_is_not():
    seen = []

    @jit.region
    def part(x):
        seen.append(torch.compiler.is_compiling())
        return x + 1

    for mode, inside in (("whole", True), ("split", True), ("block", True)):
        jit.jit(lambda x: part(x) * 2, mode, "aot_eager")(torch.ones(2))
        assert seen.pop() is inside
    jit.jit(lambda x: part(x) * 2, backend="eager")(torch.ones(2))
    assert seen.pop() is False


def test_value_and_grad_keeps_structure():
    p = {"a": torch.tensor(2.0), "b": None, "c": [torch.tensor(3.0), torch.tensor(1.0)]}
    (value, aux), grads = jit.value_and_grad(lambda p, k: (p["a"] * p["c"][0] * k, {"x": p["a"]}), has_aux=True)(p, 5)
    assert value == 30 and aux["x"] == 2 and grads["b"] is None
    assert (grads["a"], grads["c"][0], grads["c"][1]) == (15, 10, 0)


def test_lower_runs_and_allocates_nothing():
    big = models.get("qwen2:2.5-72b")[1]
    shape = {k: torch.empty(1, 64, dtype=torch.int64, device="meta") for k in ("input_ids", "labels")}
    small = qwen2.Config(**{**vars(big), "layers": 2})
    f = jit.jit(lambda p, b: jit.value_and_grad(lambda p, b: qwen2.loss(p, small, b))(p, b))
    low = f.lower(tree.abstract(qwen2.params(small), torch.bfloat16), shape)
    d, h, kv = small.width, small.hidden, small.kv_heads * small.k
    dense = small.layers * (2 * d * d + 2 * d * kv + 3 * d * h) + d * small.vocab
    attention = small.layers * 2 * 64 * 64 * d  # one block of 128 queries sees all keys
    assert abs(low.cost()["flops"] / (6 * 64 * (dense + attention / 64)) - 1) < 0.01
    memory = low.memory()
    assert memory["arguments"] > 2 * tree.size(qwen2.params(small)) and memory["outputs"] >= 2 * tree.size(
        qwen2.params(small)
    )
    assert "mm" in low.text()


def test_cost_is_torchs_and_memory_falls_with_remat():
    step = lambda p, b: jit.value_and_grad(loss)(p, b)
    with FlopCounterMode(display=False) as count:
        step(params(), BATCH)
    plain = jit.jit(step).lower(params(), BATCH)
    assert abs(plain.cost()["flops"] / count.get_total_flops() - 1) < 0.01
    again = {p: jit.jit(step, remat=p).lower(params(), BATCH).cost()["flops"] for p in ("nothing", "attention", "dots")}
    assert plain.cost()["flops"] <= again["dots"] < again["attention"] < again["nothing"] < 4 / 3 * plain.cost()["flops"]


def test_lowered_compiles_ahead():
    f = jit.jit(lambda p, b: {"loss": loss(p, b)}, backend="eager")
    call = f.lower(tree.abstract(qwen2.params(C)), tree.map(lambda t: t.to("meta"), BATCH)).compile()
    assert torch.allclose(call(params(), BATCH)["loss"], loss(params(), BATCH))


def test_three_runs_give_the_same_bits():
    tx = optim.chain(optim.clip(1.0), optim.adamw(), optim.scale(1e-2))
    ends = []
    for _ in range(3):
        state = optim.init(tx, params())
        step = jit.jit(partial(optim.step, loss, tx), donate=True)
        for _ in range(3):
            state, _ = step(state, BATCH)
        ends.append(tree.leaves(state))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*ends))
    assert not torch.are_deterministic_algorithms_enabled()  # the flags are set for the time of a call only


@pytest.mark.parametrize("layers", [4, 12])
def test_block_mode_compiles_each_structure_once(layers, monkeypatch):
    made = []
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda fn, **k: made.append(fn) or real(fn, **k))
    c = qwen2.Config(**{**vars(C), "layers": layers})
    tx = optim.chain(optim.clip(1.0), optim.adamw(), optim.scale(1e-2))
    state = optim.init(tx, tree.init(qwen2.params(c), random.key(0)))
    torch._dynamo.utils.counters.clear()
    step = jit.jit(partial(optim.step, lambda p, b: qwen2.loss(p, c, b), tx), "block", "aot_eager", donate=True)
    step(state, BATCH)
    assert len(made) == 6  # embed, block, features, loss, square of a gradient, update
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 10
