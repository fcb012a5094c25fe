"""Products of 16-bit numbers in float32: exactly float32's, rounded once. As if this CPU had no instructions for them."""

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from mmfunc import jit, random, tree
from mmfunc.kernels import wide
from mmfunc.nn import Conv, conv

HALF = torch.bfloat16


SLOW = wide.slow.__wrapped__


@pytest.fixture(autouse=True)
def slow(monkeypatch):
    monkeypatch.setattr(wide, "slow", lambda: (HALF,))


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(HALF)


def once(fn, *args: Tensor):
    """fn in float32, results rounded."""
    return torch.utils._pytree.tree_map(lambda t: t.to(HALF), fn(*[a.float() for a in args]))


def graph(fn, *args: Tensor) -> torch.fx.GraphModule:
    found = make_fx(fn, tracing_mode="fake")(*args)
    wide.widen(found.graph)
    found.graph.lint()
    found.recompile()
    return found


def targets(found: torch.fx.GraphModule) -> list[str]:
    return [str(n.target).partition(".default")[0] for n in found.graph.nodes if n.op == "call_function"]


CASES = {
    "mm": (lambda a, b: a @ b, draw(40, 24), draw(24, 17, seed=1)),
    "transposed": (lambda a, b: a.T @ b.T, draw(24, 40), draw(17, 24, seed=1)),
    "addmm": (F.linear, draw(2, 20, 24), draw(17, 24, seed=1), draw(17, seed=2)),
    "bmm": (torch.bmm, draw(2, 40, 24), draw(2, 24, 17, seed=1)),
    "conv": (lambda x, w: F.conv2d(x, w, padding=1), draw(2, 3, 9, 7), draw(5, 3, 3, 3, seed=1)),
}


@pytest.mark.parametrize("name", CASES)
def test_each_product_is_float32s_rounded_once(name):
    fn, *args = CASES[name]
    found = graph(fn, *args)
    assert torch.equal(found(*args), once(fn, *args))
    assert any("wide" in t for t in targets(found)), targets(found)


def test_backward_of_a_convolution():
    x, w, g = draw(2, 3, 9, 7), draw(5, 3, 3, 3, seed=1), draw(2, 5, 9, 7, seed=2)
    back = lambda g, x, w: torch.ops.aten.convolution_backward(
        g, x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False])[:2]
    found = graph(back, g, x, w)
    for a, b in zip(found(g, x, w), once(back, g, x, w)):
        assert torch.equal(a, b)
    assert "mmfunc.wide_convolution_backward" in targets(found)


def test_few_rows_and_float32_stay():
    x, w = draw(40, 24), draw(24, 24, seed=1)
    assert targets(graph(lambda a, b: (a @ b, a[:4] @ b), x, w)).count("mmfunc.wide_mm") == 1
    assert "mmfunc.wide_mm" not in targets(graph(lambda a, b: a @ b, x.float(), w.float()))


def test_compiled_and_op_by_op():
    p, x = tree.init(Conv(3, 5, (3, 3)), random.key(0), HALF), draw(2, 3, 9, 7)
    wanted = once(lambda x, w, b: F.conv2d(x, w, b, padding=1), x, p["weight"], p["bias"])
    with torch.no_grad():
        assert torch.equal(conv(p, x, padding=1), wanted)
    w, b = draw(17, 24, seed=1), draw(17, seed=2)
    loss = lambda p, x: F.linear(x, p["w"], p["b"]).float().square().sum()
    value, grads = jit.jit(jit.value_and_grad(loss))({"w": w, "b": b}, rows := draw(40, 24))
    y = once(F.linear, rows, w, b).float()
    assert value.item() == pytest.approx(y.square().sum().item(), rel=1e-6)
    assert torch.equal(grads["w"], once(lambda g, x: g.T @ x, (2 * y).to(HALF), rows))


@pytest.mark.parametrize(("known", "wanted"), [
    ({}, (torch.bfloat16, torch.float16)), ({"avx512_bf16": True}, (torch.float16,)),
    ({"amx_bf16": True}, (torch.float16,)), ({"avx512_bf16": True, "avx512_fp16": True}, ())])
def test_what_a_cpu_has_is_left_to_it(known, wanted, monkeypatch):
    names = "avx512_bf16", "amx_bf16", "avx10_2", "avx512_fp16", "amx_fp16"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(names, False) | known, raising=False)
    monkeypatch.setattr(wide.platform, "machine", lambda: "x86_64")
    assert SLOW() == wanted
    monkeypatch.setattr(wide.platform, "machine", lambda: "aarch64")
    assert SLOW() == ()
