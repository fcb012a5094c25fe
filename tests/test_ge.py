"""Lowering for Ascend NPUs by the real torchair, and what its graphs mean: `make test-ascend`, in .venv-ascend."""

import ctypes
import importlib.util
import os
import struct
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from unittest import mock

import pytest

if importlib.util.find_spec("torch_npu") is None:
    pytest.skip("torch_npu is in an environment of its own: make test-ascend", allow_module_level=True)

import meshes
import torch
from torch.distributed._local_tensor import LocalTensor, LocalTensorMode
from torch.nn import functional as F

from mmfunc import doctor, jit, models, nn, relay, shard, tree
from mmfunc.kernels import ascend, ascend_attention, ascend_ops
from mmfunc.kernels import npu as fused
from mmfunc.kernels.ge import backend, converters, cost, interpreter, lowering, operations
from mmfunc.shard import layout

aten, npu = torch.ops.aten, torch.ops.npu
SEEN: Counter = Counter()  # types of GE operations in all graphs of the families


def moved(t, device):
    return tree.map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, t)


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


def step(loss):
    return lambda p, b: jit.value_and_grad(loss)(p, b)


def on_npu(fn, *args, **how):
    """(results on CPU, Record) of a function that torchair lowered and the interpreter computed."""
    torch._dynamo.reset()
    with lowering.simulated() as record:
        out = jit.jit(fn, backend="npu", **how)(*moved(args, "npu"))
    return moved(out, "cpu"), record


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
    _, record = on_npu(step(loss), p, b, mode=mode)
    assert not record.failed and len(record.graphs) > 1


def test_pipelines():
    """Each stage is two graphs; passed on by hand they give the loss and the gradients of the whole."""
    loss, p, b = case("qwen2")
    torch._dynamo.reset()
    pipe = relay.pipeline(loss, moved(p, "npu"), {}, moved(b, "npu"), 2, backend="npu")
    first, last = (pipe.stage(s, moved(b, "npu")) for s in range(2))
    given = {(k, n): t for k, part in ((0, p), (2, b)) for n, t in tree.flatten(moved(part, "npu")).items()}
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


@pytest.mark.parametrize("name, plan", [("qwen2", "fsdp2 tp2"), ("qwen2", "ulysses2"), ("wan", "fsdp2 tp2"),
                                        ("wan", "ulysses2"), ("flux", "tp2+sp")])
def test_meshes(name, plan):
    """One graph, the same on all ranks; computed for all of them at once it gives the loss and gradients of one rank."""
    want, slopes = meshes.reference(name)
    with lowering.rank(meshes.PLANS[plan]) as net:
        loss, grads, record = on_mesh(name, net)
    assert not record.failed and len(record.graphs) == 1
    off = meshes.worst(grads, slopes)
    assert abs(loss - want) <= 1e-6 * abs(want) and off[0] <= 1e-5, off
    SEEN.update(op.type for op in record.graphs[0].op)


def on_mesh(name, net):
    """(loss, whole gradients, Record) of a training step that is lowered once and computed on simulated ranks."""
    one, world, places = meshes.case(name), net.mesh.world, meshes.places(net.mesh)
    declared, everyone = meshes.declared(name), spread([torch.tensor(at) for at in places])
    net.place = everyone
    with LocalTensorMode(world), shard.use(net, declared):
        parts = shard.place(tree.map(lambda t: spread([t] * world), one.params))
        specs = shard.using().layers[""].specs
    given = [moved((tree.map(lambda t, r=r: t._local_tensors[r], parts), one.batch(meshes.samples(net.mesh, r))), "npu")
             for r in range(world)]
    net.place, inputs, results = torch.tensor(places[0]).to("npu"), [], []

    def run(graph, tensors):
        """First the inputs of each rank are noted, then it gets what was computed from all of them."""
        if results:
            rank = places.index(net.place.cpu().tolist())
            return [t._local_tensors[rank].contiguous().to("npu") for t in results]
        inputs.append([t.cpu() for t in tensors])
        found = cost.cost(graph, tensors, record)[1]
        return [torch.zeros(t.shape, dtype=t.dtype).to("npu") for t in found]

    def every():
        for place, args in zip(places, given):
            net.place.copy_(torch.tensor(place))
            yield moved(step(*args), "cpu")

    with shard.use(net, declared), lowering.offline(run) as record:
        step = jit.jit(divided(one), backend="npu")
        list(every())
        with LocalTensorMode(world):
            graph = record.graphs[0]
            results += interpreter.run(graph, [spread(ts) for ts in zip(*inputs)], record.expected[graph.name])
        losses, slopes = zip(*every())
    net.place = everyone
    with LocalTensorMode(world):
        grads = {n: layout.whole(spread([s[n] for s in slopes]), specs[n], specs[n].optimize, net) for n in slopes[0]}
    return losses[0], {n: t._local_tensors[0] for n, t in grads.items()}, record


def divided(one):
    """meshes.gradients, for a compiler."""
    value = lambda p, b: shard.share(one.loss(shard.ready(p), one.c, b))

    def run(p, b):
        loss, grads = jit.value_and_grad(value)(p, shard.counted(b))
        return shard.total(loss), shard.sync(tree.flatten(grads))

    return run


def spread(values):
    """A tensor of one value a rank."""
    return LocalTensor({r: t.clone() for r, t in enumerate(values)})


def test_every_type_of_operation_was_computed():
    assert len(SEEN) > 60 and not set(SEEN) - set(operations.OPERATIONS) - {"Data", "Const", "NetOutput"}


# ---- what is ours

X, I = torch.ones(4, 6), torch.tensor([0, 2])
USES = {  # operation: a function whose graph has it
    aten.native_group_norm_backward.default: (step(lambda p, x: F.group_norm(
        p.bfloat16()[:, None], 1, *x[0, :2].bfloat16().view(2, 1), 0.1).float().square().sum()), X),
    aten.select_backward.default: (step(lambda p, x: (p[:, 1] * x[:, 0]).sum()), X),
    aten.logaddexp.default: (lambda p, x: torch.logaddexp(p, x), X),
    aten.amax.default: (lambda p, x: p.amax(1, keepdim=True), X),
    aten.amin.default: (lambda p, x: p.amin(0), X),
    aten.silu_backward.default: (step(lambda p, x: F.silu(p * x).sum()), X),
    aten.matmul_backward.default: (step(lambda p, x: (x[None] @ p.mT).sum()), X),
    aten.index_copy.default: (lambda p, x: p.index_copy(0, x, p[2:]), I),
    aten.index_put.default: (lambda p, x: p.index_put((x,), p[2:], accumulate=True), I),
    npu.npu_fusion_attention.default: (lambda p, x: heads(p, causal=True), X),
    npu.npu_fusion_attention_grad.default: (step(lambda p, x: heads(p, causal=True).square().sum()), X),
    aten.gelu.default: (lambda p, x: F.gelu(p), X),
    aten.gelu_backward.default: (step(lambda p, x: F.gelu(p).sum()), X),
}


def heads(p, **masks):
    """Attention of 4 tokens with two heads of width 3."""
    q = p.unflatten(-1, (2, 3))[None]
    return nn.attend(q, q * 0.5, q + 1, **masks)


@pytest.mark.parametrize("op", converters.NEEDED, ids=str)
def test_upstream_still_needs_ours(op):
    """When this fails, the wheel has got better: drop our version and its row."""
    fn, x = USES[op]
    p = torch.linspace(-2, 2, 24).view(4, 6)
    good, record = on_npu(fn, p, x)
    assert not record.failed and close(good, fn(p, x), 0.05 if "group_norm" in str(op) else 1e-5)  # of bfloat16
    without = {k: v for k, v in converters.DECOMPOSITIONS.items() if k is not op}
    with mock.patch.object(backend, "DECOMPOSITIONS", without):
        if op in converters.UPSTREAM:
            with mock.patch.object(op, "_ge_converter", converters.UPSTREAM[op]):
                assert caught(fn, p, x)
        else:
            assert caught(fn, p, x)


def close(a, b, rtol=1e-5):
    pairs = zip(tree.leaves(a), tree.leaves(b), strict=True)
    return all(torch.allclose(x, y, rtol=rtol, atol=rtol / 10) for x, y in pairs)


def caught(fn, p, x):
    """Who finds that a graph is wrong: torchair, the interpreter's checks, or its numbers."""
    rtol = {OWNED: 1e-4, SEEING: 0.03}.get(fn, 1e-5)
    try:
        out, record = on_npu(fn, p, x)
    except interpreter.Misread:
        return "interpreter"
    return "torchair" if record.failed else None if close(out, fn(p, x), rtol) else "numbers"


def changed(op, **change):
    """A converter whose call has other arguments."""
    def wrong(*args, **kwargs):
        given = dict(zip((a.name for a in op._schema.arguments), args)) | kwargs
        return converters.CONVERTERS[op](**(given | {k: f(given.get(k)) for k, f in change.items()}))
    wrong.require_meta = False
    return mock.patch.object(op, "_ge_converter", wrong)


def decomposed(op, fn):
    return mock.patch.object(backend, "DECOMPOSITIONS", converters.DECOMPOSITIONS | {op: fn})


ATTENTION, GRADIENT = npu.npu_fusion_attention.default, npu.npu_fusion_attention_grad.default
SEGMENTS = torch.tensor([[1, 1, 2, 2]])
LITTLE = step(lambda p, x: heads(p, causal=True).square().sum())
PACKED = step(lambda p, x: heads(p, segments=SEGMENTS.to(p.device)).square().sum())
TURNED = step(lambda p, x: (nn.rotate(p[None, :, None], x[:, :3]) * p[None, :, None].square()).sum())
@step
def OWNED(p, x):
    """Normed and rotated heads by our kernels."""
    with fused.using("mmfunc"):
        q = nn.layernorm({"weight": p[0], "bias": p[1]}, p)[None, :, None]
        return (nn.rotate(q, x[:, :3]) * p[None, :, None]).sum()


@step
def SEEING(p, x):
    """Our attention, which is in half precision."""
    with fused.using("mmfunc"):
        q = torch.cat([p] * 8, -1)[None].unflatten(-1, (2, 24)).half()
        return nn.attend(q, q, q, causal=True).float().square().sum()


def without(field):
    """ascend._norm, whose tiling has one field at zero."""
    real = ascend._norm
    def wrong(*args):
        blocks, tiling = real(*args)
        return blocks, tiling._replace(**{field: 0})
    return wrong


def neighbours(x, halves):
    return (ascend.WORDS, None) if halves else (ascend.HALVES, None)


BIASED = step(lambda p, x: heads(p, bias=p.new_zeros(1, 2, 4, 4)).square().sum())
BUGS = {  # name: (the bug, a program)
    "scale": (lambda: changed(ATTENTION, scale=lambda s: 1.0), LITTLE),
    "swapped layout": (lambda: changed(ATTENTION, input_layout=lambda s: "BNSD"), LITTLE),
    "dropped mask": (lambda: changed(ATTENTION, atten_mask=lambda m: None, sparse_mode=lambda m: 0), LITTLE),
    "sparse mode": (lambda: changed(ATTENTION, sparse_mode=lambda m: 3), LITTLE),
    "mask of segments dropped in the gradient": (lambda: changed(GRADIENT, atten_mask=lambda m: None), PACKED),
    "number of heads": (lambda: changed(ATTENTION, head_num=lambda n: 3), LITTLE),
    "window": (lambda: changed(ATTENTION, next_tockens=lambda n: 0), PACKED),
    "gradient scaled twice": (lambda: changed(GRADIENT, scale_value=lambda s: s * s), LITTLE),
    "silu's gradient": (lambda: decomposed(aten.silu_backward.default, lambda g, x: g * torch.sigmoid(x)),
                        USES[aten.silu_backward.default][0]),
    "gradient twice": (lambda: decomposed(aten.matmul_backward.default, lambda g, a, b, mask: converters.matmul_backward(
        g + g, a, b, mask)), USES[aten.matmul_backward.default][0]),
    "added instead of written": (lambda: decomposed(aten.index_copy.default, lambda x, dim, index, source: x.index_add(
        dim, index, source)), lambda p, x: p.index_copy(0, (x[0, :2] * 2).long(), p[2:])),
    "tiling without its shift": (lambda: mock.patch.object(ascend, "_norm", without("shift")), OWNED),
    "tiling of a norm without centre": (lambda: mock.patch.object(ascend, "_norm", without("center")), OWNED),
    "partners of neighbours for halves": (lambda: mock.patch.object(ascend, "_partners", neighbours), OWNED),
    "every tile whole": (lambda: mock.patch.object(ascend_attention, "_codes", lambda q, k, *rest: torch.ones(
        1, q.shape[1], k.shape[1], dtype=torch.uint8, device=q.device)), SEEING),
    "rotated the wrong way": (lambda: changed(torch.ops.mmfunc.rotary.default, sin=lambda s: converters.ge.Neg(s)), TURNED),
    "gate and up swapped": (lambda: mock.patch.dict(fused.THEIRS, glu=(fused.trains, lambda g, u, act: (
        npu.npu_swiglu(torch.cat([u, g], -1))))), step(lambda p, x: nn.glu(p, p + 1).sum())),
    "epsilon forgotten": (lambda: mock.patch.dict(fused.THEIRS, rmsnorm=(lambda *args: True, lambda x, w, eps: (
        npu.npu_rms_norm(x, w, 0.0)[0]))), lambda p, x: nn.rmsnorm({"weight": p[0]}, p / 100, 1e-4)),
    "rounded on the way": (lambda: mock.patch.object(torch.ops.mmfunc.keep.default, "_ge_converter", rounded), BIASED),
}


def rounded(x):
    return converters.ge.Cast(x, dst_type=27)


rounded.require_meta = False


@pytest.mark.parametrize("name", BUGS)
def test_seeded_bugs_are_caught(name):
    bug, fn = BUGS[name]
    p = torch.linspace(-2, 2, 24).view(4, 6)
    assert caught(fn, p, X) is None
    with bug():
        by = caught(fn, p, X)
    print(f"\n{name}: caught by {by}", end="")
    assert by


# ---- what cannot be

@pytest.mark.parametrize("fn, x, message", [
    (lambda x: x.double().sum(), X, "float64.*test_ge.py.*NPUs lack"),
    (lambda x: torch.view_as_complex(x.view(4, 3, 2)).real.sum(), X, "complex64.*test_ge.py"),
    (lambda x: torch.special.zeta(x, x + 2), X, "no converter for aten.special_zeta.default .test_ge.py.*converters.py"),
    (lambda x: nn.attend(*[x.expand(1, 4, 600).unflatten(-1, (1, 600))] * 3), X[:, :1], "width up to 512, not 600"),
])
def test_what_an_npu_cannot_do_is_said_before_anything_is_compiled(fn, x, message):
    torch._dynamo.reset()
    with mock.patch.object(lowering.fx2ge_converter, "initialize_graph_engine"):
        with pytest.raises(ValueError, match=f"(?s){message}"):
            jit.jit(fn, backend="npu")(x.to("npu"))


@pytest.mark.parametrize("fn, message", [
    (lambda x: x.index_put((x > 0,), x.sum()), "index_put with a mask.*torch.where"),
    (lambda x: npu.npu_fusion_attention(x[None], x[None], x[None], 1, "BSH", keep_prob=0.5)[0], "keep_prob 0.5.*dropout"),
    (lambda x: npu.npu_fusion_attention(*[x[:, None]] * 3, 1, "TND", actual_seq_qlen=[4], actual_seq_kvlen=[4])[0],
     "layout TND"),
    (lambda x: x[x > 0], "a size that is not known .test_ge.py:[0-9]+ in <lambda>.*pad to declared ones"),
])
def test_what_converters_do_not_take_is_said(fn, message):
    """By name and value."""
    torch._dynamo.reset()
    with mock.patch.object(lowering.fx2ge_converter, "initialize_graph_engine"):
        with pytest.raises(jit.CompileError, match=f"(?s){message}"):
            jit.jit(fn, backend="npu")(X.to("npu"))


def test_sizes_that_are_not_known():
    graph = torch.fx.Graph()
    node = graph.placeholder("x")
    graph.output(node)
    node.meta["val"] = torch.empty(3, device="meta")
    backend.refuse(torch.fx.GraphModule(torch.nn.Module(), graph))
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
    node.meta["val"] = ShapeEnv().create_unbacked_symint()
    with pytest.raises(ValueError, match="x has a size that is not known"):
        backend.refuse(torch.fx.GraphModule(torch.nn.Module(), graph))


def test_unknown_operations_are_failures():
    class Op:
        type, name, attr, input, output_desc = "Frobnicate", "f", {}, [], []
    with pytest.raises(interpreter.Misread, match="knows no Frobnicate"):
        interpreter.compute(Op, [])


def test_the_program(tmp_path):
    """The graphs are written, and can be read again."""
    program = Path(__file__).parent.parent / "programs" / "lower.py"
    done = subprocess.run([sys.executable, program, "qwen2:tiny", "--what", "forward", "--out", tmp_path], text=True,
                          capture_output=True)
    assert done.returncode == 0 and ", 0 failed" in done.stdout, done.stdout + done.stderr
    assert "FlashAttentionScore" in done.stdout and 'type: "MatMul' in (tmp_path / "graph_0.pbtxt").read_text()
    again = lowering.GeGraph(serialized_model_def=(tmp_path / "graph_0.pb").read_bytes())
    assert Counter(op.type for op in again.op)["FlashAttentionScore"] == 2


@pytest.mark.parametrize("flags, graphs, kinds", [
    ("--mode block --kernels mmfunc --mesh.fsdp 2 --mesh.ulysses 2", 6,
     ("HcomAllToAllV", "HcomReduceScatter", "MmfuncAttentionBackward")),
    ("--mesh.ring 2", 1, ("HcomAllToAllV", "Log")),
    ("--mesh.pp 2 --mesh.tp 2 --stage 1", 2, ("HcomAllReduce", "FlashAttentionScoreGrad"))])
def test_the_program_on_a_mesh(flags, graphs, kinds):
    """The first rank's part of a training step; block by block there are as many graphs as kinds of blocks."""
    program = Path(__file__).parent.parent / "programs" / "lower.py"
    done = subprocess.run([sys.executable, program, "qwen2:tiny", *flags.split()], text=True, capture_output=True)
    assert done.returncode == 0 and f"\n{graphs} graphs;" in done.stdout and ", 0 failed" in done.stdout, (
        done.stdout + done.stderr)
    assert all(kind in done.stdout for kind in kinds), done.stdout


def test_the_doctor(tmp_path, capsys):
    """It says what is missing; its trial of a model is a step on the device, here on what stands for one."""
    doctor.main(tmp_path / "report.txt")
    said = capsys.readouterr().out
    assert said == (tmp_path / "report.txt").read_text() and "lacks no NPU" in said and "docs/ascend.md" in said
    with lowering.simulated():
        assert doctor.trial("wan:tiny")[0] == "ok"


def test_without_cann():
    """torch_npu without CANN: one sentence instead of what torch raises; the doctor works, and so does a CPU alone."""
    lacks = "torch_npu is installed but CANN is not found (libhccl.so, libge_runner.so, libascendcl.so): source"
    env = {k: v for k, v in os.environ.items() if k not in ("LD_LIBRARY_PATH", "TORCH_DEVICE_BACKEND_AUTOLOAD")}

    def run(*args, **more):
        return subprocess.run([sys.executable, *args], env=env | more, text=True, capture_output=True)

    failed = run("-c", "import mmfunc.jit")
    assert failed.returncode and failed.stderr.splitlines()[-1].startswith(f"ImportError: {lacks}")
    assert "torch_npu/" not in failed.stderr
    done = run("-m", "mmfunc.doctor")
    assert not done.returncode and "lacks libhccl.so is not found: torch_npu would not load" in done.stdout
    use = "import torch; from mmfunc import jit; f = lambda b: jit.jit(lambda x: x + 1, backend=b)(torch.ones(1)).item()"
    plain = run("-c", f"{use}; print(f('eager')); f('npu')", TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert plain.stdout == "2.0\n" and plain.stderr.splitlines()[-1].startswith(f"ImportError: {lacks}"), plain.stderr


def test_cost():
    """A product counts its multiply-adds, and failures are counted with the line they come from."""
    total = cost.Cost()

    def run(graph, inputs):
        found, results = cost.cost(graph, inputs, record)
        total.add(found)
        return [torch.empty(t.shape, dtype=t.dtype).to("npu") for t in results]

    with lowering.offline(run) as record:
        fn = lambda x: torch.special.zeta(x @ x.mT, x @ x.mT)
        jit.jit(fn, backend="npu")(X.to("npu"))
    assert total.flops["MatMulV2"] + total.flops["MatMul"] in (2 * 4 * 4 * 6, 4 * 4 * 4 * 6)
    assert record.failed["aten.special_zeta.default"][0][0].startswith("test_ge.py:")
