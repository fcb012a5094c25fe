"""What is ours in the lowering for Ascend NPUs, bugs seeded into it, what cannot be lowered, and the programs: `make
test-ascend`, in .venv-ascend."""
# ruff: noqa: E402  the path of the programs comes first

import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest

if importlib.util.find_spec("torch_npu") is None:
    pytest.skip("torch_npu is in an environment of its own: make test-ascend", allow_module_level=True)

PROGRAM = Path(__file__).parent.parent / "programs" / "lower.py"
sys.path.insert(0, str(PROGRAM.parent))

import lower
import torch
from lowered import X, heads, on_npu, shapes_of, step
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from mmfunc import doctor, jit, nn, shard, tree
from mmfunc.kernels import ascend, ascend_attention
from mmfunc.kernels import npu as fused
from mmfunc.kernels.ge import backend, converters, cost, interpreter, lowering

aten, npu = torch.ops.aten, torch.ops.npu


# ---- what is ours

I = torch.tensor([0, 2])
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


ROW, HEADS, WEIGHT = (1, 4096, 5120), (4096, 40, 128), (5120,)  # of Wan-14B; the weights are in float32
FUSED = {  # what: (ours in Ascend C, torch_npu's operations, shapes)
    "RMSNorm": (lambda x, w: ascend.norm(x, w)[0], lambda x, w: fused.rmsnorm(x, w.to(x.dtype), 1e-6), [ROW, WEIGHT]),
    "add + RMSNorm": (lambda x, r, w: ascend.norm(x, w, None, r),
                      lambda x, r, w: (fused.rmsnorm(s := x + r, w.to(x.dtype), 1e-6), s), [ROW, ROW, WEIGHT]),
    "adaLN": (fused.own_adaln, lambda x, a, b: nn.modulate(F.layer_norm(x.float(), x.shape[-1:]), a, b),
              [ROW, (1, 1, 5120), (1, 1, 5120)]),
    "q/k norm + rope": (lambda x, w: ascend.rope(x, x[:, 0, :64].float(), w, halves=True),
                        lambda x, w: fused.rotate(fused.rmsnorm(x, w.to(x.dtype), 1e-6), x[:, 0, :64].float()),
                        [HEADS, (128,)]),
    "SwiGLU": (lambda g, u: ascend.gate(g, u), lambda g, u: fused.glu(g, u, "silu"), [ROW, ROW]),
    "GELU gate": (lambda g, u: ascend.gate(g, u, "gelu_tanh"), lambda g, u: F.gelu(g, approximate="tanh") * u, [ROW, ROW]),
}


def moved_bytes(fn, shapes):
    """Bytes that operations of a function and its gradients read and write, by shapes."""
    def both(*tensors):
        with torch.enable_grad():
            live = [t.detach().requires_grad_() for t in tensors[1:]]
            out = fn(*live)
            out = out if isinstance(out, tuple) else (out,)
            return [t.detach() for t in out], torch.autograd.grad(out, live, [tensors[0]] * len(out))

    total = cost.Cost()

    def run(graph, inputs):
        found, results = cost.cost(graph, inputs, record)
        total.add(found)
        return [torch.empty(t.shape, dtype=t.dtype, device="npu:0") for t in results]

    torch._dynamo.reset()
    with lowering.offline(run) as record, FakeTensorMode(allow_non_fake_inputs=True):
        dtype = lambda shape: torch.float32 if shape[0] == shape[-1] or shape[:2] == (1, 1) else torch.bfloat16
        jit.jit(both, backend="npu")(*(torch.zeros(s, dtype=dtype(s), device="npu:0") for s in (shapes[0], *shapes)))
    assert not record.failed, record.failed
    return sum(total.bytes.values())


def test_ours_move_no_more_than_separate_operations():
    """Forward and gradients, in multiples of the tensor, next to what the operations of torch_npu would move."""
    found = {name: [moved_bytes(fn, shapes) / (2 * 4096 * 5120) for fn in (ours, theirs)]
             for name, (ours, theirs, shapes) in FUSED.items()}
    print("\n" + "\n".join(f"{name:20} ours {a:5.1f}, torch_npu {b:5.1f} tensors moved" for name, (a, b) in found.items()))
    assert all(a <= 1.05 * b for a, b in found.values()), found


# ---- what cannot be

@pytest.mark.parametrize("fn, x, message", [
    (lambda x: x.double().sum(), X, "float64.*test_ge_ours.py.*NPUs lack"),
    (lambda x: torch.view_as_complex(x.view(4, 3, 2)).real.sum(), X, "complex64.*test_ge_ours.py"),
    (lambda x: torch.special.zeta(x, x + 2), X, "no converter for aten.special_zeta.default .test_ge_ours.py.*converters.py"),
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
    (lambda x: x[x > 0], "a size that is not known .test_ge_ours.py:[0-9]+ in <lambda>.*pad to declared ones"),
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
    done = subprocess.run([sys.executable, PROGRAM, "qwen2:tiny", "--what", "forward", "--out", tmp_path], text=True,
                          capture_output=True)
    assert done.returncode == 0 and ", 0 failed" in done.stdout, done.stdout + done.stderr
    assert "FlashAttentionScore" in done.stdout and 'type: "MatMul' in (tmp_path / "graph_0.pbtxt").read_text()
    again = lowering.GeGraph(serialized_model_def=(tmp_path / "graph_0.pb").read_bytes())
    assert Counter(op.type for op in again.op)["FlashAttentionScore"] == 2


@pytest.mark.parametrize("flags, graphs, kinds", [
    ("--mode block --kernels mmfunc --mesh.fsdp 2 --mesh.ulysses 2", 7,
     ("HcomAllToAllV", "HcomReduceScatter", "MmfuncAttentionBackward")),
    ("--mesh.ring 2", 1, ("HcomAllToAllV", "Log")),
    ("--mesh.pp 2 --mesh.tp 2 --stage 1", 2, ("HcomAllReduce", "FlashAttentionScoreGrad"))])
def test_the_program_on_a_mesh(flags, graphs, kinds):
    """The first rank's part of a training step; block by block there are two graphs for each kind of block, one
    for the loss, and those of what runs between them."""
    done = subprocess.run([sys.executable, PROGRAM, "qwen2:tiny", *flags.split()], text=True, capture_output=True)
    assert done.returncode == 0 and ", 0 failed" in done.stdout, done.stdout + done.stderr
    said = re.search(r"\n(\d+) graphs(?:, (\d+) of them one operation outside of what is compiled)?;", done.stdout)
    assert int(said[1]) - int(said[2] or 0) == graphs and bool(said[2]) == ("block" in flags), said[0]
    assert all(kind in done.stdout for kind in kinds), done.stdout


@pytest.mark.parametrize("model, mesh", [("wan:tiny", {}), ("flux:tiny", {}), ("qwen2vl:tiny", {"tp": 2})])
def test_a_model_in_blocks_has_the_operations_of_its_one_graph(model, mesh):
    torch._dynamo.reset()
    kinds = [lower.lower(lower.Args(model, mesh=shard.Mesh(**mesh), mode=mode)) for mode in ("whole", "block")]
    (whole, one), (block, other) = ((record, set(total.count)) for record, total in kinds)
    assert one == other and not whole.failed and not block.failed and whole.single == 0 < block.single


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
    fn = lambda x: torch.special.zeta(x @ x.mT, x @ x.mT)
    total, record = shapes_of(fn, X)
    assert total.flops["MatMulV2"] + total.flops["MatMul"] in (2 * 4 * 4 * 6, 4 * 4 * 4 * 6)
    assert record.failed["aten.special_zeta.default"][0][0].startswith("test_ge_ours.py:")
