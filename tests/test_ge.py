"""Lowering for Ascend NPUs by the real torchair, and what its graphs mean: `make test-ascend`, in .venv-ascend."""

import ctypes
import importlib.util
import struct
from collections import Counter
from functools import cache
from unittest import mock

import pytest

if importlib.util.find_spec("torch_npu") is None:
    pytest.skip("torch_npu is in an environment of its own: make test-ascend", allow_module_level=True)

import meshes
import torch
from lowered import X, moved, on_npu, shapes_of, step

from mmfunc import jit, models, nn, relay, stages, tree
from mmfunc.kernels import ascend, ascend_ops
from mmfunc.kernels import npu as fused
from mmfunc.kernels.ge import lowering, operations

SEEN: Counter = Counter()  # types of GE operations in all graphs of the families


def autoencoder(name, *shape):
    module, c = models.get(name)
    batch = {"pixel_values": meshes.draw(1, *shape)}
    return meshes.Case(module, c, meshes.redrawn(module.params(c)), module.loss, lambda which: batch)


MORE = {"sd_vae": lambda: autoencoder("sd_vae:tiny", 2, 3, 16, 16),
        "sd_vae quant": lambda: autoencoder("sd_vae:tiny-quant", 1, 3, 16, 24),
        "wan_vae": lambda: autoencoder("wan_vae:tiny", 1, 3, 5, 16, 16)}
MORE["t5 relu"] = lambda: meshes.encoder("t5:tiny-relu")
NAMES = ("qwen2", "qwen2 dense", "qwen2 odd", "qwen2vl", "flux", "wan", "wan dense", "wan i2v", "t5", "t5 dense", "umt5",
         "clip", "clip dense", "clip vision", *MORE)
MASKS = "attention_mask", "position_ids", "encoder_attention_mask"  # which dense batches lack


@cache
def case(name):
    """(loss of parameters and a batch, parameters, batch) of a family."""
    base = name.removesuffix(" dense")
    one = MORE[base]() if base in MORE else meshes.CASES[base]()
    batch = one.batch([0, 1])
    if base != name:
        batch = {k: v for k, v in batch.items() if k not in MASKS}
        if base == "clip" or base == "t5":  # their losses read what the packed batch has
            found = lambda p, b: sum(t.square().mean() for t in tree.leaves(one.module.forward(p, one.c, b)))
            return found, one.params, {"input_ids": batch["input_ids"]}
    return (lambda p, b: one.loss(p, one.c, b)), one.params, batch


def check(name, tolerance=1e-5, dtype=torch.float32, **how):
    loss, p, b = case(name)
    p = tree.map(lambda t: t.to(dtype), p)
    (value, grads), record = on_npu(step(loss), p, b, **how)
    want, slopes = step(loss)(p, b)
    assert not record.failed
    assert abs(value - want) <= tolerance * abs(want)
    found, slopes = tree.flatten(grads), tree.flatten(slopes)
    assert meshes.worst(found, slopes)[0] <= tolerance
    assert {k for k, v in found.items() if not v.any()} == {k for k, v in slopes.items() if not v.any()}
    SEEN.update(op.type for g in record.graphs for op in g.op)
    return record


@pytest.mark.parametrize("name", NAMES)
def test_training_steps_mean_what_eager_does(name):
    """The whole step as one graph, float32: the loss and every gradient to 1e-5, no operation failed."""
    check(name, 2e-5 if name == "wan_vae" else 1e-5)  # its eager float32 is no nearer to itself with other kernels


@pytest.mark.parametrize("name", NAMES)
def test_forward(name):
    loss, p, b = case(name)
    value, record = on_npu(loss, p, b)
    assert not record.failed and abs(value - loss(p, b)) < 1e-6 * abs(value)


@pytest.mark.parametrize("mode", ["split", "block"])
def test_modes(mode):
    """Forward and backward by the partitioner, and one graph for each kind of block; what runs between graphs has no
    kernels here, so only their lowering is shown."""
    loss, p, b = case("qwen2")
    _, record = shapes_of(step(loss), p, b, mode=mode)
    assert not record.failed and len(record.graphs) > 1


def test_pipelines():
    """Each stage is two graphs; passed on by hand they give the loss and the gradients of the whole."""
    loss, p, b = case("qwen2")
    torch._dynamo.reset()
    pipe = relay.pipeline(loss, moved(p, "npu"), {}, moved(b, "npu"), 2, backend="npu")
    first, last = (pipe.stage(s, moved(b, "npu")) for s in range(2))
    given = stages.given(moved(p, "npu"), moved(b, "npu"))
    with lowering.simulated() as record:
        early, late = {}, {}
        out = first.run("forward", early, given)
        late |= {(1, n): out["out", n] for n in last.come.live}
        value = last.run("forward", late, given)["out", "loss"]
        back = last.run("backward", late | {(3, "loss"): torch.ones(()).to("npu")}, given)
        front = first.run("backward", early | {(3, n): back["in", n] for n in first.go.back}, given)
    assert not record.failed and len(record.graphs) == 4
    want, slopes = step(loss)(p, b)
    assert abs(value.cpu() - want) <= 1e-6 * want
    both = [{n: g.cpu() for (k, n), g in found.items() if k == "params"} for found in (front, back)]
    grads = {n: sum(part[n] for part in both if n in part) for n in tree.flatten(slopes)}  # two may hold an embedding
    assert meshes.worst(grads, tree.flatten(slopes))[0] <= 1e-5


PRODUCTS = "MatMul", "MatMulV2", "BatchMatMul"


@pytest.mark.parametrize("policy", ["nothing", "attention", "dots"])
def test_remat(policy):
    """What a policy keeps is not computed again: attention never, the products of blocks only by the first two."""
    plain, again = check("qwen2"), check("qwen2", remat=policy)
    (few, _), (many, _) = counts(plain), counts(again)
    assert few["FlashAttentionScore"] == many["FlashAttentionScore"] == 2 and many["RmsNorm"] == few["RmsNorm"] + 4
    more = sum(many[k] - few[k] for k in PRODUCTS)
    assert more == 0 if policy == "dots" else more >= 2 * 6  # the last product of a block is never read again


def test_remat_in_the_backward_graph():
    """By the partitioner: the backward graph reads what "dots" keeps, and computes norms and gates again."""
    loss, p, b = case("qwen2")
    _, record = on_npu(step(loss), p, b, mode="split", remat="dots")
    backward = Counter(op.type for op in record.graphs[-1].op)
    assert not record.failed and backward["RmsNorm"] == 4 and backward["SwiGlu"] == 2
    assert backward["FlashAttentionScoreGrad"] == 2 and not backward["FlashAttentionScore"]
    both = Counter(op.type for g in record.graphs for op in g.op)
    assert all(both[k] == counts(check("qwen2"))[0][k] for k in PRODUCTS)


def rounded_as_eager(name):
    """As far from float32 as eager bfloat16 is, twice at most."""
    loss, p, b = case(name)
    (value, grads), record = on_npu(step(loss), tree.map(lambda t: t.bfloat16(), p), b)
    own, low = step(loss)(tree.map(lambda t: t.bfloat16(), p), b)
    want, truth = step(loss)(p, b)
    assert not record.failed and abs(value - want) <= 2 * abs(own - want) + 4e-3 * abs(want)
    off = lambda g: torch.stack([(g[k].float() - v).norm() for k, v in tree.flatten(truth).items()]).norm()
    assert off(tree.flatten(grads)) <= 2 * off(tree.flatten(low))
    return record


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16(name):
    rounded_as_eager(name)


OWN = {"qwen2": {"NormForward": 5, "RopeForward": 4, "GateForward": 2}, "wan": {"NormForward": 15, "RopeForward": 4},
       "qwen2vl": {"NormForward": 12, "RopeForward": 10, "GateForward": 5}}


@pytest.mark.parametrize("name", OWN)
def test_our_kernels_in_graphs(name):
    """By their registered names, with their tilings: the loss and every gradient to 1e-5 by what the kernels mean, in
    bfloat16 attention too."""
    with fused.using("mmfunc"):
        full, low = counts(check(name))[0], counts(rounded_as_eager(name))[0]
    for found in (full, low):
        assert not found["RmsNorm"] and found["MmfuncNormBackward"] == found["MmfuncNormForward"]
        assert OWN[name].items() <= {k.removeprefix("Mmfunc"): n for k, n in found.items()}.items()
    assert low["MmfuncAttentionForward"] == low["MmfuncAttentionBackward"] == full["FlashAttentionScore"] > 0


def test_direct_launches():
    """What the library for the device is called with: pointers in order, no workspace, the tiling on the device."""
    class Library:
        def __getitem__(self, name):
            def launch(pointers, blocks, stream):
                *args, table = pointers
                calls.append((name, args, blocks, struct.unpack("4i2f", ctypes.string_at(table, 24))))
            return launch

    calls, g = [], torch.randn(3, 500).to("npu")
    with mock.patch.object(ascend_ops, "compiled", lambda dtype: Library()):
        y = ascend.gate(g, g + 1)
    (name, (a, b, c, workspace), blocks, tiling), = calls
    assert (name, a, c, workspace) == ("launch_gate_forward", g.data_ptr(), y.data_ptr(), None) and b not in (a, c)
    assert blocks == 24 and tiling == (64, 24, 28, 1, 1.0, 0.0)


def test_a_function_keeps_the_kernels_of_its_first_call():
    """As with all that a jitted function reads besides its arguments."""
    def gated(g, u):
        return nn.glu(g, u)

    torch._dynamo.reset()
    first, second = jit.jit(gated, backend="npu"), jit.jit(gated, backend="npu")
    x = X.to("npu")
    with lowering.simulated() as record:
        first(x, x)
        with fused.using("mmfunc"):
            first(x, x)
            second(x, x)
        second(x, x)
    plain, ours = (Counter(op.type for op in g.op) for g in record.graphs)
    assert ours["MmfuncGateForward"] == 1 and not plain["MmfuncGateForward"]


def test_our_attention_is_kept_by_remat_policies():
    with fused.using("mmfunc"):
        loss, p, b = case("qwen2")
        _, record = on_npu(step(loss), tree.map(lambda t: t.bfloat16(), p), b, remat="dots")
    found = counts(record)[0]
    assert not record.failed and found["MmfuncAttentionForward"] == 2 and found["MmfuncNormForward"] == 5 + 4


def counts(record):
    """Types of operations in a graph, and without those that move nothing."""
    kinds = Counter(op.type for op in record.graphs[0].op)
    return kinds, {k: n for k, n in kinds.items() if k not in operations.VIEWS | {"Const", "Data"}}


def test_fused_operations_of_torch_npu():
    """A norm, a rotation and a gate are one operation each, of which few are left out by their limits."""
    loss, p, b = case("qwen2")
    (_, record), never = on_npu(step(loss), p, b), dict.fromkeys(fused.THEIRS, (lambda *args: False, None))
    with mock.patch.dict(fused.THEIRS, never):
        _, plain = on_npu(step(loss), p, b)
    (few, less), (many, more) = counts(record), counts(plain)
    assert {k: few[k] for k in ("RmsNorm", "RmsNormGrad", "RotaryMul", "SwiGlu", "SwiGluGrad")} == {
        "RmsNorm": 5, "RmsNormGrad": 5, "RotaryMul": 8, "SwiGlu": 2, "SwiGluGrad": 2}
    assert not many["RmsNorm"] + many["RotaryMul"] + many["SwiGlu"] and sum(less.values()) < 0.7 * sum(more.values())
    x, angles = torch.zeros(1, 4, 2, 900, device="meta"), torch.zeros(4, 450, device="meta")
    assert not fused.turns(x, angles) and not fused.turns(x[0, 0, :, :80], angles) and fused.turns(x[..., :80], angles[..., :40])


def test_every_type_of_operation_was_computed():
    assert len(SEEN) > 60 and not set(SEEN) - set(operations.OPERATIONS) - {"Data", "Const", "NetOutput"}
