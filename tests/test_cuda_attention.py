"""What runs on CUDA, on CPU: flex_attention's meaning against the definition, and what the table chooses."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from mmfunc import jit, nn, tree
from mmfunc.kernels import attention, flex
from mmfunc.nn import linear

FLEX, BACK = torch.ops.higher_order.flex_attention, torch.ops.higher_order.flex_attention_backward


@pytest.fixture(autouse=True)
def as_on_cuda(monkeypatch):
    """The CPU goes where CUDA does; PyTorch refuses gradients of flex_attention on CPU, though its operations have
    them."""
    monkeypatch.setitem(attention.BACKENDS, "cpu", attention.tabled)
    monkeypatch.setattr(attention.cpu, "supports", lambda *args: False)
    monkeypatch.setattr(sys.modules["torch.nn.attention.flex_attention"], "_validate_device", lambda *args: None)


@pytest.fixture
def graphs(monkeypatch):
    """Graphs that jit(backend="npu") compiles, which then run as with aot_eager."""
    found = []

    def keep(graph, inputs):
        found.append(graph)
        return make_boxed_func(graph)

    backend = aot_autograd(fw_compiler=keep)  # the compiler of backward passes too
    monkeypatch.setattr(jit, "_npu", lambda: lambda graph, inputs, **options: backend(graph, inputs))
    return found


def targets(graphs):
    return [n.target for g in graphs for n in g.graph.nodes if n.op == "call_function"]


def draw(size, keys=None, batch=2, heads=4, groups=2, width=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    rand = lambda n, h: torch.randn(batch, n, h, width, generator=g)
    return [rand(size, heads), rand(keys or size, groups), rand(keys or size, groups)]


def ids(size, batch=2, order=False, seed=0):
    t = torch.randint(0, 4, (batch, size), generator=torch.Generator().manual_seed(seed))
    return t.sort(-1).values if order else t


def whole(fn):
    """(q, k, v), masks -> output, gradients where g is the output's; one graph."""
    def run(p, g, segments, start, bias):
        def loss(p):
            y = fn(*p, segments=segments, start=start, bias=bias)
            return (y * g).sum(), y

        (_, y), grads = jit.value_and_grad(loss, has_aux=True)(p)
        return [y, *grads]

    return run


def masks(size):
    """By name: keys, causal, segments, start, bias."""
    more = size + 37
    pair = ids(size), ids(more, seed=1)
    return {
        "full": (None, False, None, None, None),
        "cross": (more, False, None, None, None),
        "causal": (None, True, None, None, None),
        "sorted": (None, False, ids(size, order=True), None, None),
        "unsorted, causal": (None, True, ids(size), None, None),
        "one row for all": (None, True, ids(size, batch=1), None, None),
        "pair": (more, False, pair, None, None),
        "padding": (None, False, (torch.arange(size) < size // 2 + 1).expand(2, -1), None, None),
        "all is padding": (None, False, torch.zeros(2, size, dtype=torch.long), None, None),
        "cache": (more, True, None, torch.tensor(20), None),
        "cache, pair": (more, True, pair, torch.tensor(30), None),
        "bias": (None, True, ids(size), None, torch.randn(1, 4, size, size)),
    }


@pytest.mark.parametrize("name, size", [(name, 130) for name in masks(1)] + [
    (name, size) for size in (1, 100, 300) for name in ("causal", "unsorted, causal", "cache, pair")])
def test_flex_is_attention(name, size):
    """Values and gradients to 1e-5 where rows see something; zeros where they see nothing."""
    keys, causal, segments, start, bias = masks(size)[name]
    p = draw(size, keys)
    seen = attention.visible(slice(0, size), p[1].shape[1], causal, segments, start, p[0].device)
    seen = torch.ones(2, size, dtype=torch.bool) if seen is None else seen.any(-1)[:, 0, 0].expand(2, -1)
    g = torch.randn(p[0].shape, generator=torch.Generator().manual_seed(3))
    run = lambda fn: whole(lambda q, k, v, *, segments, start, bias: fn(q, k, v, causal, segments, start, 0.25, bias))
    found = jit.jit(run(flex.attention), backend="aot_eager")(p, g, segments, start, bias)
    want = run(attention.reference)(p, g * seen[..., None, None], segments, start, bias)
    assert (found[0][~seen] == 0).all() and (found[1][~seen] == 0).all()
    assert torch.allclose(found[0][seen], want[0][seen], rtol=1e-5, atol=1e-5)
    assert all(torch.allclose(x, y, rtol=1e-5, atol=1e-5) for x, y in zip(found[1:], want[1:]))


@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("causal, start", [(False, None), (True, None), (True, 200)])
def test_blocks_that_are_skipped_hold_nothing(order, causal, start):
    """And those taken whole hold no mask; in order they are just these, but for a block in which the row ends."""
    rows, columns = (torch.randint(0, 5, (2, n)) * (torch.arange(n) >= 90) for n in (500, 640))
    rows, columns = ((t.sort(-1).values if order else t) for t in (rows, columns))
    start = None if start is None else torch.tensor(start)
    some, full = flex.blocks(500, 640, causal, rows, columns, 0 if start is None else start, rows.device)
    seen = attention.visible(slice(0, 500), 640, causal, (rows, columns), start, rows.device)[:, 0, 0]
    seen = torch.nn.functional.pad(seen, (0, 0, 0, 12)).unflatten(1, (4, 128)).unflatten(3, (5, 128))
    held, all_of = seen.any(4).any(2), seen.all(4).all(2)
    assert (some | ~held).all() and torch.equal(full, all_of)
    if order and not causal:
        assert torch.equal(some, held)


@pytest.mark.parametrize("name, kind, own", [
    ("full", "full", False), ("cross", "full", False), ("causal", "causal", False), ("sorted", "segments", True),
    ("unsorted, causal", "segments", True), ("pair", "segments", True), ("cache", "cache", True),
    ("cache, pair", "cache", True), ("bias", "bias", False)])
def test_the_table_is_what_a_graph_holds(name, kind, own, graphs):
    keys, causal, segments, start, bias = masks(130)[name]
    assert attention.kind(causal, segments, start, bias) == kind
    assert (attention.CUDA[kind] is flex.attention) == own
    step = whole(lambda *p, **masks: attention.attend(*p, causal=causal, **masks))
    p, g = draw(130, keys), torch.ones(2, 130, 4, 16)
    found = jit.jit(step, backend="npu")(p, g, segments, start, bias)
    names = list(map(str, targets(graphs)))
    assert sum("flex_attention" == n for n in names) == own
    if name in ("full", "causal", "cross"):
        assert sum("scaled_dot_product" in n and "backward" not in n for n in names) == 1
    seen = attention.visible(slice(0, 130), p[1].shape[1], causal, segments, start, p[0].device)
    seen = slice(None) if seen is None else seen.any(-1)[:, 0, 0].expand(2, -1)
    want = attention.reference(*p, causal, segments, start, 0.25, bias)
    assert torch.allclose(found[0][seen], want[seen], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size, width, dtype, own", [
    (128, 16, torch.float32, True), (127, 16, torch.float32, False), (1, 16, torch.float32, False),
    (128, 8, torch.float32, False), (128, 264, torch.float32, False), (128, 16, torch.float64, False),
    (128, 16, torch.bfloat16, True)])
def test_what_flex_does_not_take_is_fused(size, width, dtype, own, graphs):
    p, segments = [t.to(dtype) for t in draw(size, width=width)], ids(size)
    fn = lambda p, segments: attention.attend(*p, segments=segments)
    jit.jit(fn, backend="npu")(p, segments)
    assert (FLEX in targets(graphs)) == own


def test_operation_by_operation_it_is_fused(monkeypatch):
    """flex_attention would hold all scores there."""
    monkeypatch.setattr(flex, "flex_attention", None)
    p, segments = draw(130), ids(130)
    found = attention.attend(*p, segments=segments)
    assert torch.equal(found, attention.fused(*p, False, segments, None, 0.25))


def layer(p, c, x, ctx):
    q, k, v = linear(p["qkv"], x).unflatten(-1, (3, 2, 16)).unbind(2)
    y = nn.attend(q, k, v, causal=True, segments=ctx)
    return x + linear(p["out"], y.flatten(2))


@pytest.mark.parametrize("policy", ["nothing", "attention", "dots", "everything"])
def test_policies_keep_it(policy, graphs):
    """No policy runs it twice; the numbers are those of no policy."""
    chain = nn.Chain(lambda p, c, b: (b["x"], b["segments"]), (("blocks", layer),), lambda p, c, x, ctx: x)
    step = lambda p, b: jit.value_and_grad(lambda p: chain(p, None, b).square().mean())(p)
    g = torch.Generator().manual_seed(0)
    rand = lambda *s: torch.randn(s, generator=g) / 4
    p = {"blocks": [{"qkv": {"weight": rand(96, 32)}, "out": {"weight": rand(32, 32)}} for _ in range(2)]}
    b = {"x": rand(2, 130, 32), "segments": ids(130) + 1}
    value, want = step(p, b)
    for mode in ("whole", "split", "block"):
        graphs.clear()
        loss, found = jit.jit(step, mode, "npu", remat=policy)(p, b)
        assert torch.allclose(loss, value, rtol=1e-6)
        assert all(torch.allclose(x, y, rtol=1e-4, atol=1e-6) for x, y in zip(tree.leaves(found), tree.leaves(want)))
        # the two blocks, which are two graphs where each is compiled: only the second's input has a gradient
        assert targets(graphs).count(FLEX) == targets(graphs).count(BACK) == 2


def test_the_benchmark_says_where_the_table_is_not_the_fastest(monkeypatch, capsys):
    """Its part for a GPU, at tiny shapes here."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    module = importlib.import_module("attention")
    times = {"fused": 2.0, "flex": 1.0}
    timed = module.timed
    monkeypatch.setattr(module, "timed", lambda *args: times if timed(*args).keys() == times.keys() else {})
    cases = [(4, 2, 130, 130, 16, "segments", 3), (2, 2, 130, 150, 16, "full", 0), (4, 2, 1, 150, 16, "cache", 0)]
    found = module.table("cpu", 1, cases, "aot_eager")
    assert [(f["table"], f["fastest"]) for f in found] == [("flex", "flex")] * 2 + [("fused", "flex")] * 3
    seen = sum(a * (a + 1) // 2 for a in (44, 43, 43))
    assert found[0]["flex"] == float(f"{4 * 4 * 16 * seen / 1e12:.3g}") and found[0]["fused"] * 2 == found[0]["flex"]
    said = capsys.readouterr().out
    assert said.count("MISMATCH") == 3 and said.endswith("the table takes the fastest in 2 of 5\n")
