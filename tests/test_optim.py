"""Optimizers against torch's; skipped, accumulated, master and half-precision updates."""

from functools import partial

import pytest
import torch
from torch.nn.functional import linear

from mmfunc import jit, optim, tree


def params(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return {
        "a": [
            {"w": torch.randn(4, 4, generator=g).to(dtype), "b": torch.randn(4, generator=g).to(dtype)}
            for _ in range(3)
        ],
        "h": torch.randn(2, 4, generator=g).to(dtype),
    }


def loss(p, x):
    for layer in p["a"]:
        x = torch.tanh(linear(x.to(layer["w"].dtype), layer["w"], layer["b"]))
    return linear(x, p["h"]).float().square().mean()


X = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))
RATE = optim.warmup(3, optim.cosine(1e-2, 10))
ADAMW = optim.chain(optim.clip(0.1), optim.adamw(0.9, 0.95), optim.decay(0.1), optim.scale(RATE))


def run(tx, p, n, x=X, mode="whole", backend="eager", **how):
    state = optim.init(tx, p, fp16=how.pop("fp16", False))
    step = jit.jit(partial(optim.step, loss, tx, **how), mode, backend, donate=True)
    for _ in range(n):
        state, report = step(state, x)
    return state, report, step


def test_equals_torch_adamw():
    flat = {k: v.clone().requires_grad_() for k, v in tree.flatten(params()).items()}
    groups = [{"params": [v for v in flat.values() if v.ndim > 1], "weight_decay": 0.1},
              {"params": [v for v in flat.values() if v.ndim < 2], "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for i in range(8):
        for group in theirs.param_groups:
            group["lr"] = float(RATE(torch.tensor(i)))
        theirs.zero_grad()
        loss(tree.unflatten(flat, params()), X).backward()
        torch.nn.utils.clip_grad_norm_(flat.values(), 0.1)
        theirs.step()
    for mode in ("whole", "split", "block"):
        for backend in ("eager", "aot_eager"):
            state, _, _ = run(ADAMW, params(), 8, mode=mode, backend=backend)
            assert all((t - flat[k]).abs().max() < 1e-6 for k, t in tree.flatten(state["params"]).items())


def test_schedules():
    at = lambda f, *steps: [round(float(f(torch.tensor(s))), 6) for s in steps]
    assert at(optim.constant(0.5), 0, 9) == [0.5, 0.5]
    assert at(optim.linear(1.0, 10, 0.5), 0, 5, 10, 99) == [1.0, 0.75, 0.5, 0.5]
    assert at(optim.cosine(1.0, 10, 0.1), 0, 5, 10, 99) == [1.0, 0.55, 0.1, 0.1]
    assert at(optim.warmup(4, optim.linear(1.0, 10)), 0, 3, 4, 9) == [0.25, 1.0, 1.0, 0.5]


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_an_update_that_is_not_finite_changes_no_bit(bad):
    tx = optim.chain(optim.clip(0.1), optim.adamw(), optim.decay(0.1), optim.scale(RATE), optim.ema(0.9))
    state, _, step = run(tx, params(), 2, backend="aot_eager")
    before = tree.map(torch.clone, {k: state[k] for k in ("params", "opt")})
    for i in range(6):
        state, report = step(state, X * bad)
        assert report["in_a_row"] == i + 1 and not report["finite"]
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(before), tree.leaves({k: state[k] for k in before})))
    assert state["skipped"] == 6 and state["step"] == 8
    state, report = step(state, X)
    assert report["in_a_row"] == 0 and report["finite"] and not torch.equal(state["params"]["h"], before["params"]["h"])


def test_micro_batches_of_unequal_masks_give_the_gradient_of_the_whole():
    g = torch.Generator().manual_seed(3)
    x, keep = torch.randn(12, 4, generator=g), torch.rand(12, generator=g) > 0.6
    count = keep.sum()

    def masked(p, part):
        out = part["x"]
        for layer in p["a"]:
            out = torch.tanh(linear(out, layer["w"], layer["b"]))
        return (linear(out, p["h"]).square().sum(-1) * part["keep"]).sum() / part["num_items_in_batch"]

    ends = {}
    for sizes in ((12,), (6, 6), (1, 4, 7), (2,) * 6):
        tx = optim.accumulate(len(sizes), optim.chain(optim.clip(0.5), optim.adamw(), optim.scale(1e-2)))
        state = optim.init(tx, params())
        for a, b in zip(x.split(sizes), keep.split(sizes)):
            state, report = optim.step(masked, tx, state, {"x": a, "keep": b, "num_items_in_batch": count})
        ends[sizes] = tree.flatten(state["params"]), report["grad_norm"]
    first, norm = ends.pop((12,))
    for flat, n in ends.values():
        assert abs(n - norm) < 1e-6 * norm
        assert all(torch.allclose(t, first[k], rtol=1e-5, atol=1e-6) for k, t in flat.items())


def test_accumulation_skips_as_one():
    tx = optim.accumulate(3, optim.chain(optim.clip(1.0), optim.adamw(), optim.scale(1e-2)))
    state, _, step = run(tx, params(), 3, backend="aot_eager")
    before = tree.map(torch.clone, state["params"])
    for x in (X, X * float("nan"), X):
        state, report = step(state, x)
    assert state["skipped"] == 1 and all(map(torch.equal, tree.leaves(before), tree.leaves(state["params"])))
    assert all(not t.any() for k, t in tree.flatten(state["opt"]).items() if k.endswith(".sum"))
    for x in (X, X, X):
        state, report = step(state, x)
    assert report["finite"] and not torch.equal(state["params"]["h"], before["h"])


def test_masters_follow_float32():
    tx = optim.chain(optim.clip(1.0), optim.adamw(), optim.scale(1e-3))
    start = tree.map(lambda t: t.bfloat16().float(), params())
    full, _, _ = run(tx, tree.map(torch.clone, start), 20)
    half, _, _ = run(optim.masters(tx), tree.map(lambda t: t.bfloat16(), start), 20)
    for k, t in tree.flatten(half["params"]).items():
        kept = tree.at(half["opt"], k)["master"]
        assert t.dtype == torch.bfloat16 and torch.equal(t, kept.bfloat16())
        assert (kept - tree.at(full["params"], k)).abs().max() < 5e-3


def test_float16_scales_its_loss():
    tx = optim.chain(optim.adamw(), optim.scale(1e-3))
    state, report, step = run(tx, params(), 1, fp16=True, compute=torch.float16)
    while not report["finite"]:
        state, report = step(state, X)
    value = state["scale"]["value"].item()
    assert value <= 2**16 and state["in_a_row"] == 0
    state, report = step(state, X * 1e8)
    assert not report["finite"] and state["scale"]["value"] == value / 2 and state["in_a_row"] == 0
    state["scale"]["good"].fill_(1999)
    state, _ = step(state, X)
    assert state["scale"]["value"] == value and state["scale"]["good"] == 0
    assert state["params"]["h"].dtype == torch.float32


def test_compute_dtype_and_gradients_stay_float32():
    state, report, _ = run(ADAMW, params(), 3, compute=torch.bfloat16)
    full, exact, _ = run(ADAMW, params(), 3)
    assert state["params"]["h"].dtype == torch.float32 and abs(report["loss"] - exact["loss"]) < 0.02


def test_masked_ema_and_rules():
    tx = optim.chain(optim.masked(optim.adamw(), r"^a\."), optim.scale(1e-2), optim.ema(0.5))
    state, _, _ = run(tx, params(), 3)
    assert torch.equal(state["params"]["h"], params()["h"]) and not torch.equal(
        state["params"]["a"][0]["w"], params()["a"][0]["w"]
    )
    mean = optim.averaged(state)
    assert torch.equal(mean["h"], params()["h"]) and not torch.equal(mean["a"][0]["w"], state["params"]["a"][0]["w"])
    for bad in (optim.masked(optim.adamw(), "nowhere"), optim.decay(0.1, "nowhere")):
        with pytest.raises(ValueError, match="'nowhere' matches none of the 7"):
            optim.init(optim.chain(bad), params())
    with pytest.raises(ValueError, match="running mean"):
        optim.averaged(optim.init(ADAMW, params()))


def held(call):
    """Most bytes that a call holds at once beside what was there before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof:
        call()
    found = sorted((e.start_ns(), e.nbytes()) for e in prof.profiler.kineto_results.events() if e.name() == "[memory]")
    now = most = 0
    for _, size in found:
        now += size
        most = max(most, now)
    return most


def test_a_donated_state_is_updated_leaf_by_leaf():
    """In split mode too no second state lies beside the first: of 8 equal leaves the gradients, and a few more."""
    p = {f"layer{i}": {"w": torch.ones(256, 256)} for i in range(8)}
    value = lambda p, x: sum((layer["w"] * x).square().mean() for layer in p.values())
    most = {}
    for donate in (True, False):
        state, tx = optim.init(ADAMW, p), ADAMW
        step = jit.jit(partial(optim.step, value, tx), "split", "aot_eager", donate=donate)
        step(state, torch.ones(()))
        most[donate] = held(lambda step=step, state=state: step(state, torch.ones(()))) / (256 * 256 * 4)
    assert most[True] < 20 and most[False] > 30, most
