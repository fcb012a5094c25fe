"""Ascend C kernels in the emulator: equal to their references, bugs caught, bandwidth and cube peak estimated."""

import math
import random
import re
import shutil
import struct
import subprocess
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmfunc import doctor, nn
from mmfunc.kernels import ascend, ascend_attention, ascend_build, ascend_meaning, ascend_ops, attention, emulator

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DEEP = pytest.mark.deep
QUICK, MANY = 12, 200


def error(got: torch.Tensor, truth: torch.Tensor) -> float:
    return ((got.double() - truth).norm() / truth.norm().clamp_min(1e-20)).item()


def agree(got, reference, inputs, out_grad, dtype, slack=2.0):
    """Outputs and gradients are as near to float64 as the reference in its own dtype, times slack."""
    def run(tensors):
        leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
        y = reference(*leaves)
        live = [t for t in leaves if t is not None]
        return [y.detach(), *torch.autograd.grad(y, live, out_grad.to(y.dtype))]

    truth = run([None if t is None else t.double() for t in inputs])
    own = run(inputs)
    for i, (g, o, t) in enumerate(zip([g for g in got if g is not None], own, truth, strict=True)):
        own_error = max(error(o, t), torch.finfo(dtype).eps / 2)
        scale = t.norm() / math.sqrt(t.numel())
        assert torch.isfinite(g).all()
        if scale > 1e-4:  # what is zero but for rounding has no relative error
            assert error(g, t) <= slack * own_error, (i, error(g, t), own_error)


def norm_case(r: random.Random, dtype: torch.dtype):
    groups, rows = r.choice([1, 1, 2, 3]), r.choice([1, 2, 5, 17, 60])
    width = r.choice([8, 33, 64, 72, 128, 500, 1024, 2056, 3584, 5120, 7000, 9001, 17000])
    rows = rows if width < 3000 else min(rows, 3)
    kind, center, residual = r.choice(["none", "row", "group"]), r.random() < 0.5, r.random() < 0.3
    x = torch.randn(groups, rows, width, dtype=torch.float32).mul(r.choice([0.1, 1, 10])).add(r.choice([0, 1])).to(dtype)
    shape = {"row": (width,), "group": (groups, width)}.get(kind)
    factor = None if shape is None else torch.randn(shape)
    shift = torch.randn(shape) if shape is not None and center else None
    dy, plus = torch.randn(x.shape).to(dtype), 1.0 if kind == "group" else 0.0
    extra = torch.randn(x.shape).to(dtype) if residual else None
    options = {"center": center, "plus": plus}
    y, total = ascend.norm(x, factor, shift, extra, **options)
    base = x if total is None else total
    if residual:
        assert torch.equal(total, x + extra)
    got = ascend.norm_backward(base, dy, factor, shift is not None, **options)
    agree([y, *got], lambda a, f, s: ascend.norm_reference(a, f, s, **options), (base, factor, shift), dy, dtype)
    if residual:
        with_sum = ascend.norm_backward(base, dy, factor, shift is not None, dsum=extra, **options)[0]
        assert error(with_sum, (got[0].double() + extra.double())) < 2 * torch.finfo(dtype).eps


def gate_case(r: random.Random, dtype: torch.dtype):
    size = r.choice([1, 2, 31, 1000, 4096, 4097, 30000, 200001])
    act, up = r.choice(list(ascend.ACTS)), r.random() < 0.7
    g, dy = (torch.randn(size).mul(3).to(dtype) for _ in range(2))
    u = torch.randn(size).to(dtype) if up else None
    got = [ascend.gate(g, u, act), *ascend.gate_backward(g, u, dy, act)]
    agree(got, lambda a, b: ascend.gate_reference(a, b, act), (g, u), dy, dtype)


def rope_case(r: random.Random, dtype: torch.dtype):
    tokens, heads, width = r.choice([1, 3, 50, 333]), r.choice([1, 2, 5, 28]), r.choice([36, 64, 72, 80, 90, 128, 256])
    options = {"halves": r.random() < 0.5}
    x, dy = (torch.randn(tokens, heads, width).to(dtype) for _ in range(2))
    weight = torch.rand(width) + 0.5 if r.random() < 0.5 else None
    angles = torch.randn(tokens, width // 2) * 5
    got = [ascend.rope(x, angles, weight, **options), *ascend.rope_backward(x, dy, angles, weight, **options)]
    agree(got, lambda a, w: ascend.rope_reference(a, angles, w, **options), (x, weight), dy, dtype)


def attention_case(r: random.Random, dtype: torch.dtype):
    if dtype == torch.float32:
        with pytest.raises(ValueError, match="take bfloat16 and float16"):
            ascend_attention.attention(*(torch.zeros(1, 1, 1, 64),) * 3)
        return
    batch, groups, width = r.choice([1, 2]), r.choice([1, 2]), r.choice([64, 72, 80, 96, 128, 160, 256])
    heads, queries = groups * r.choice([1, 2, 3]), r.choice([1, 7, 64, 100, 128, 129, 200, 300])
    keys, masks = r.choice([queries, 1, 50, 257, 400]), {}
    if r.random() < 0.3:
        masks["window"] = (r.choice([None, 0, 40]), r.choice([None, 0, 130]))
    if r.random() < 0.3:
        keys, masks["causal"] = queries, True
    if r.random() < 0.2:
        masks |= {"causal": True, "start": 40}
        keys = queries + 40
    if r.random() < 0.4:
        q_ids, k_ids = (torch.randint(0, 4, (batch, n)).sort(-1, descending=r.random() < 0.7).values for n in (queries, keys))
        masks["segments"] = (q_ids, k_ids) if r.random() < 0.5 or keys != queries else q_ids
    q, do = (torch.randn(batch, queries, heads, width).to(dtype) for _ in range(2))
    k, v = (torch.randn(batch, keys, groups, width).to(dtype) for _ in range(2))
    o, lse = ascend_attention.attention(q, k, v, **masks)
    got = [o, *ascend_attention.attention_backward(q, k, v, o, lse, do, **masks)]
    agree(got, lambda *t: ascend_attention.attention_reference(*t, **masks), (q, k, v), do, dtype)


CASES = {"norm": norm_case, "gate": gate_case, "rope": rope_case, "attention": attention_case}


def sweep(name: str, number: int):
    for i in range(number):
        r = random.Random(i)
        torch.manual_seed(i)
        CASES[name](r, DTYPES[i % len(DTYPES)])


@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_references(name):
    sweep(name, QUICK)


@DEEP
@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_references_on_many_shapes(name):
    sweep(name, MANY)


def test_references_are_the_functions_of_nn():
    x, w, b = torch.randn(2, 5, 64), torch.randn(64), torch.randn(64)
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(ascend.norm_reference(x, w), nn.rmsnorm({"weight": w}, x), **close)
    layernorm = nn.layernorm({"weight": w, "bias": b}, x)
    torch.testing.assert_close(ascend.norm_reference(x, w, b, center=True), layernorm, **close)
    shift, scale = torch.randn(2, 64), torch.randn(2, 64)
    adaln = nn.adaln(x, shift[:, None], scale[:, None])
    torch.testing.assert_close(ascend.norm_reference(x, scale, shift, center=True, plus=1.0), adaln, **close)
    silu, gelu = torch.nn.functional.silu(x) * b, nn.gelu_tanh(x) * b
    torch.testing.assert_close(ascend.gate_reference(x, b.expand_as(x)), silu, **close)
    torch.testing.assert_close(ascend.gate_reference(x, b.expand_as(x), "gelu_tanh"), gelu, **close)
    torch.testing.assert_close(ascend.gate_reference(x, None, "quick_gelu"), nn.quick_gelu(x), **close)
    heads, angles = torch.randn(7, 3, 64), torch.randn(7, 32)
    turned = nn.rotate(heads, angles)
    torch.testing.assert_close(ascend.rope_reference(heads, angles, halves=True), turned, **close)
    paired = lambda x: x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)  # from halves to neighbours
    torch.testing.assert_close(ascend.rope_reference(paired(heads), angles, halves=False), paired(turned), **close)
    q, k, v = (torch.randn(2, 9, n, 16) for n in (4, 2, 2))
    ids = torch.tensor([[1, 1, 1, 2, 2, 2, 3, 3, 3]] * 2)
    for masks in ({}, {"causal": True}, {"segments": ids}, {"segments": ids, "causal": True}):
        torch.testing.assert_close(ascend_attention.attention_reference(q, k, v, **masks),
                                   attention.attend(q, k, v, **masks), **close)


REAL = {ascend_ops.NormTiling: 2, ascend_ops.GateTiling: 2, ascend_ops.RopeTiling: 1, ascend_ops.AttentionTiling: 1}


@pytest.mark.parametrize("name", CASES)
def test_meanings_are_what_kernels_write(name, monkeypatch):
    """From the same tensors and tilings; what is summed over slots is compared as a sum."""
    real, seen = emulator.launch, set()

    def launch(library, kernel, blocks, tiling, *args):
        real(library, kernel, blocks, tiling, *args)
        k = ascend_ops.KERNELS[kernel]
        n, words = len(tiling) // 4, REAL[k.tiling]
        table = k.tiling(*struct.unpack(f"{n - words}i{words}f", tiling))
        count = len(k.names()[0])
        found = ascend_meaning.MEANINGS[kernel](table, blocks, *args[:count])
        kept = [o for o in args[count:-1] if o is None or o.how != "scratch"]
        for got, want, label in zip(kept, found, k.names()[1], strict=False):
            assert (got is None) == (want is None), (kernel, label)
            if got is not None:
                sums = label in ("dfactor", "dshift", "dweight")
                a, b = (t.double().sum(0) if sums else t.double() for t in (got.tensor, want))
                if label == "lse":  # of rows that see something
                    a, b = a[a.abs() < 1e4], b[a.abs() < 1e4]
                if b.norm() > 1e-3 * b.numel() ** 0.5:
                    assert error(a, b) < 2e-2, (kernel, label)
        seen.add(kernel)

    monkeypatch.setattr(emulator, "launch", launch)
    sweep(name, QUICK)
    assert {f"{name}_forward", f"{name}_backward"} <= seen


@pytest.mark.parametrize("name, dtype", [("norm", "float32"), ("norm", "bfloat16"), ("gate", "float16"),
                                         ("rope", "float32"), ("rope", "bfloat16"), ("attention", "bfloat16")])
def test_the_doctor_compares_kernels_and_their_gradients(name, dtype):
    """As on a device, here in the emulator: the gradients are those of the operations of torch."""
    assert doctor.kernel(name, dtype, "cpu")[0] == "ok"


def test_operations_of_torch():
    """Their fakes have the shapes of what they give, and their schemas are kept."""
    q, k, v = (torch.randn(2, 130, n, 64).bfloat16().requires_grad_() for n in (4, 2, 2))
    for op, args in recorded(lambda: ascend_attention.attention(q, k, v, causal=True)[0].sum().backward()):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def recorded(fn):
    """Operations of ours that a function calls, with their arguments."""
    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if str(op).startswith("mmfunc."):
                found.append((op, tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)))
            return op(*args, **(kwargs or {}))

    found = []
    with Record():
        fn()
    assert len(found) == 3
    return found


HEADER = """  // what host.cpp takes of CANN's headers, as its documentation has them
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <initializer_list>
namespace ge {
enum graphStatus { GRAPH_SUCCESS };
enum DataType { DT_FLOAT = 0, DT_FLOAT16 = 1, DT_INT32 = 3, DT_UINT8 = 4, DT_BF16 = 27 };
enum Format { FORMAT_ND };
}
namespace gert {
template <class T> struct Vector { size_t GetSize() const; const T* GetData() const; };
struct RuntimeAttrs {
  const Vector<int64_t>* GetListInt(size_t) const; const Vector<float>* GetListFloat(size_t) const;
  const int64_t* GetInt(size_t) const;
};
struct TilingData { template <class T> ge::graphStatus Append(const T&); };
struct TilingContext {
  const RuntimeAttrs* GetAttrs() const; TilingData* GetRawTilingData(); void SetBlockDim(uint32_t);
  void SetNeedAtomic(bool); size_t* GetWorkspaceSizes(size_t);
};
struct Shape { void SetDimNum(size_t); size_t GetDimNum() const; void SetDim(size_t, int64_t); };
struct InferShapeContext { const RuntimeAttrs* GetAttrs() const; size_t GetComputeNodeOutputNum(); Shape* GetOutputShape(size_t); };
struct InferDataTypeContext { const RuntimeAttrs* GetAttrs() const; ge::graphStatus SetOutputDataType(size_t, ge::DataType); };
}
enum Option { REQUIRED, OPTIONAL };
struct OpParamDef {
  OpParamDef& ParamType(Option); OpParamDef& DataType(std::initializer_list<ge::DataType>);
  OpParamDef& Format(std::initializer_list<ge::Format>); OpParamDef& InitValue(uint64_t);
};
struct OpAttrDef { OpAttrDef& AttrType(Option); OpAttrDef& Int(); OpAttrDef& ListInt(); OpAttrDef& ListFloat(); };
struct OpAICoreDef { OpAICoreDef& SetTiling(ge::graphStatus (*)(gert::TilingContext*)); OpAICoreDef& AddConfig(const char*); };
struct OpDef {
  OpDef(const char*); OpParamDef& Input(const char*); OpParamDef& Output(const char*); OpAttrDef& Attr(const char*);
  OpDef& SetInferShape(ge::graphStatus (*)(gert::InferShapeContext*));
  OpDef& SetInferDataType(ge::graphStatus (*)(gert::InferDataTypeContext*)); OpAICoreDef& AICore();
};
#define OP_ADD(x) static x made_##x(#x)
"""


def test_what_cann_is_to_build(tmp_path, monkeypatch):
    """Every kernel has a launch with all of its arguments, and an operation whose C++ is sound; no CANN is an error."""
    ascend_build.write(tmp_path)
    for source, names in emulator.KERNELS.items():
        text, launch = (emulator.SOURCES / f"{source}.cpp").read_text(), (tmp_path / f"libraries/launch_{source}.asc").read_text()
        for name in names:
            count = re.search(rf"void {name}\(([^)]*)\)", text)[1].count("GM_ADDR")
            assert re.search(rf"{name}<<<.*a\[{count - 1}\]\);", launch)
            assert f'#define {name} mmfunc_{name}\n#include "{source}.cpp"' in (tmp_path / f"package/mmfunc_{name}.cpp").read_text()
    (tmp_path / "register").mkdir()
    (tmp_path / "register" / "op_def_registry.h").write_text(HEADER)
    host = tmp_path / "package" / "host.cpp"
    subprocess.run(["g++", "-std=c++17", "-fsyntax-only", "-Wall", "-Werror", f"-I{tmp_path}", host], check=True)
    assert host.read_text().count("OP_ADD(Mmfunc") == len(ascend_ops.KERNELS) == 9
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    with pytest.raises(ValueError, match="set_env.sh"):
        ascend_build.build(tmp_path, "libraries")
    monkeypatch.setenv("MMFUNC_ASCEND", str(tmp_path))
    with pytest.raises(ValueError, match="libmmfunc_half.so: python -m mmfunc.kernels.ascend_build"):
        ascend_ops.compiled(torch.float16)


def test_a_tile_says_whether_it_is_hidden_whole_or_masked():
    r = random.Random(0)
    for i in range(100):
        torch.manual_seed(i)
        queries, keys, start = r.randint(1, 400), r.randint(1, 400), r.choice([0, 0, 30])
        window, causal = (r.choice([None, 0, 90]), r.choice([None, 0, 200])), r.random() < 0.3
        ids = [torch.randint(r.choice([0, 1]), r.choice([2, 4]), (1, n)).sort().values for n in (queries, keys)]
        q, k = torch.zeros(1, queries, 1, 64, dtype=torch.bfloat16), torch.zeros(1, keys, 1, 64, dtype=torch.bfloat16)
        masks = {"causal": causal, "window": window, "segments": tuple(ids), "start": start}
        codes = ascend_attention.attention_tables(q, k, **masks).codes[0]
        ones = torch.eye(keys)[None, :, None]  # values that show who is seen
        seen = ascend_attention.attention_reference(q.float(), k.float(), ones, **masks)[0, :, 0] > 0
        for a in range(codes.shape[0]):
            for b in range(codes.shape[1]):
                tile = seen[a * 128:(a + 1) * 128, b * 128:(b + 1) * 128]
                assert codes[a, b] != 0 or not tile.any()
                assert codes[a, b] != 1 or (tile.all() and tile.shape[1] == 128)
                assert codes[a, b] != 2 or window != (None, None) or tile.any() or not tile.all()


def test_rows_are_cut_to_fit():
    for width in (1, 100, 5120, 50000):
        for rows, groups, item in ((1, 1, 2), (1000, 3, 4), (32760, 1, 2)):
            r = ascend.tiling(width, rows, groups, item, 12 + 8 * item, 8)
            assert r.tiles == groups * -(-rows // r.tile) and r.blocks <= 48 and r.blocks <= r.tiles
            assert r.chunk * r.chunks >= width and r.chunk * (r.chunks - 1) < width
            assert r.tile * r.pitch * (12 + 8 * item) + r.pitch * 8 + 216 * r.tile <= ascend.UB
            assert r.pitch * item % 32 == 0


def test_errors_name_what_is_wrong():
    x = torch.randn(4, 64)
    with pytest.raises(ValueError, match="float64"):
        ascend.norm(x.double())
    with pytest.raises(ValueError, match="silu, quick_gelu, gelu_tanh, not 'relu'"):
        ascend.gate(x, None, "relu")
    with pytest.raises(ValueError, match="contiguous"):
        ascend.gate(torch.randn(8, 8).T, None)
    with pytest.raises(ValueError, match="width 300"):
        q = torch.zeros(1, 4, 2, 300, dtype=torch.bfloat16)
        ascend_attention.attention(q, q, q)


# ---- twenty-five seeded bugs: file, what stands there, what is put, which kernel shows it, who catches it ----
BUGS = {
    "wrong stride of rows": ("rows.h", "copy.srcStride = (stride - width) * sizeof(T);", "copy.srcStride = (stride - width + 8) * sizeof(T);", "norm", "global memory"),
    "missing FreeTensor": ("norm.cpp", "    Load(to, x, rows * Up(width, GRAIN));\n    queue.FreeTensor(x);", "    Load(to, x, rows * Up(width, GRAIN));", "norm", "FreeTensor missing|not freed"),
    "missing WaitFlag before compute": ("rows.h", "  SetFlag<HardEvent::MTE2_V>(after);\n  WaitFlag<HardEvent::MTE2_V>(after);\n", "", "norm", "missing wait: pipe V"),
    "WaitFlag without SetFlag": ("rows.h", "  SetFlag<HardEvent::MTE2_V>(after);\n  Wait", "  Wait", "norm", "deadlock"),
    "buffer of half the size": ("norm.cpp", "pipe.InitBuffer(aBuf, n * sizeof(float));", "pipe.InitBuffer(aBuf, n * sizeof(float) / 2);", "norm", "elements .* of a tensor of"),
    "unified buffer overflow": ("norm.cpp", "pipe.InitBuffer(aBuf, n * sizeof(float));", "pipe.InitBuffer(aBuf, 200000);", "norm", "UB overflow"),
    "more repeats than 255": ("rows.h", "ORDER_ONLY_VALUE);\n  else WholeReduceSum(to, x, mask, rows,", "ORDER_ONLY_VALUE);\n  else WholeReduceSum(to, x, mask, rows + 255,", "norm", "repeat .* is not 1 to 255"),
    "missing EnQue": ("rows.h", "  DataCopyPad(t, from, copy, pad);\n  queue.EnQue(t);", "  DataCopyPad(t, from, copy, pad);", "norm", "DeQue of an empty queue"),
    "missing DeQue": ("attention.h", "    x = left.DeQue<T>();\n", "", "attention", "used between EnQue and DeQue"),
    "use after FreeTensor": ("gate.cpp", "    Load(to, x, n);\n    queue.FreeTensor(x);", "    queue.FreeTensor(x);\n    Load(to, x, n);", "gate", "used after FreeTensor"),
    "race between cores": ("norm.cpp", "from = t.tiles * core / cores", "from = 0", "norm", "race in global memory"),
    "rows past the end": ("norm.cpp", "rows = Least(t.tile, (group + 1) * t.group_rows - row);", "rows = t.tile;", "norm", "global memory overflow|race in global memory"),
    "a tile left out": ("norm.cpp", "to = t.tiles * (core + 1) / cores;", "to = t.tiles * (core + 1) / cores - (core == 0);", "norm", "never written"),
    "uninitialised padding": ("rows.h", "pad.isPad = true; pad.rightPadding = Up(width, GRAIN) - width;", "", "norm", "uninitialised read of UB"),
    "misaligned copy": ("attention.cpp", "rows - r) * t.pitch);\n    zIn", "rows - r) * t.pitch - 1);\n    zIn", "attention", "not a multiple of 32"),
    "narrowing without rounding": ("rows.h", "Cast(to, from, RoundMode::CAST_RINT, n);", "Cast(to, from, RoundMode::CAST_NONE, n);", "norm", "only CAST_RINT"),
    "swapped fractal order": ("attention.h", "p.startIndex = A ? i * a.high + k0 : k0 * a.high + i;", "p.startIndex = A ? i * a.high + k0 : i * a.high + k0;", "attention", "test|tensor of|outside"),
    "transposition forgotten": ("attention.h", "p.ifTranspose = !B;", "p.ifTranspose = false;", "attention", "test"),
    "dropped mask": ("attention.cpp", "    if (masked) for (", "    if (false) for (", "attention", "test"),
    "rescaling forgotten": ("attention.cpp", "FusedMulAdd(part[c], wide8[r * 8], z[c], Least(LANES, t.pitch - c), high, {1, 0, 1, row, 1, row});", "Add(part[c], part[c], z[c], Least(LANES, t.pitch - c), high, {1, 1, 1, row, row, row});", "attention", "test"),
    "cube core does not wait": ("attention.cpp", "      CrossCoreWaitFlag(WEIGHTS);\n", "", "attention", "uninitialised read of global|race"),
    "cross-core flag never set": ("attention.cpp", "      CrossCoreSetFlag<2, PIPE_MTE3>(WEIGHTS);\n", "", "attention", "deadlock"),
    "flag set on the wrong pipe": ("attention.cpp", "CrossCoreSetFlag<2, PIPE_MTE3>(WEIGHTS)", "CrossCoreSetFlag<2, PIPE_V>(WEIGHTS)", "attention", "race in global memory"),
    "workspace not double buffered": ("attention.cpp", "cube.Product<false, true>(ss[n % DEPTH * QUERIES * t.step]", "cube.Product<false, true>(ss[0]", "attention", "race in global memory|uninitialised"),
    "tail of a tile not cleared": ("attention.h", "  if (rows % 16) {  //", "  if (false) {  //", "attention", "uninitialised read of L1"),
    "wrong Fixpipe stride": ("attention.h", "p.srcStride = Up(m, 16);", "p.srcStride = m;", "attention", "source stride"),
    "atomic mode left on": ("attention_grad.cpp", "    SetAtomicNone();\n", "", "attention_grad", "SetAtomicNone missing|atomic add"),
    "atomic add forgotten": ("attention_grad.cpp", "    SetAtomicAdd<float>();\n", "", "attention_grad", "race in global memory|test"),
}


def show(kernel: str):
    """The kernel on small inputs that reach every branch, against its reference."""
    torch.manual_seed(0)
    bf16 = torch.bfloat16
    if kernel == "norm":
        x, f, s = torch.randn(2, 101, 100).to(bf16), torch.randn(2, 100), torch.randn(2, 100)
        options = {"center": True, "plus": 1.0}
        got, want = ascend.norm(x, f, s, **options)[0], ascend.norm_reference(x.double(), f, s, **options)
    elif kernel == "gate":
        g, u = torch.randn(30001).to(bf16), torch.randn(30001).to(bf16)
        got, want = ascend.gate(g, u), ascend.gate_reference(g.double(), u.double())
    else:
        q, k, v = (torch.randn(1, 650, n, 72).to(bf16) for n in (2, 1, 1))
        ids = torch.tensor([1] * 280 + [2] * 370)[None]
        masks = {"causal": True, "segments": ids}
        got, lse = ascend_attention.attention(q, k, v, **masks)
        leaves = [t.double().requires_grad_() for t in (q, k, v)]
        want = ascend_attention.attention_reference(*leaves, **masks)
        if kernel == "attention_grad":
            grads = torch.autograd.grad(want, leaves, torch.ones_like(want))
            ones = torch.ones_like(q)
            for a, b in zip(ascend_attention.attention_backward(q, k, v, got, lse, ones, **masks), grads):
                assert error(a, b) < 0.01
    assert error(got, want) < 0.01


@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_are_caught(bug, tmp_path, monkeypatch):
    file, old, new, kernel, rule = BUGS[bug]
    folder = shutil.copytree(emulator.SOURCES, tmp_path / "src")
    text = (folder / file).read_text()
    assert text.count(old) >= 1, f"{file} no longer holds {old!r}"
    (folder / file).write_text(text.replace(old, new))
    build = emulator.build
    monkeypatch.setattr(emulator, "build", lambda source, dtype: build(source, dtype, folder))
    with pytest.raises((ValueError, AssertionError)) as caught:
        show(kernel)
    says = "test" if caught.type is AssertionError else str(caught.value)
    print(f"{bug}: caught by {'the test' if says == 'test' else 'the emulator: ' + says}")
    assert re.search(rule, says), says


def test_the_kernels_without_a_bug_pass():
    for kernel in ("norm", "gate", "attention", "attention_grad"):
        show(kernel)


def marginal(library_of, run) -> tuple[float, emulator.Counts]:
    """Share of the bandwidth bound of what twice as much work adds: what large inputs reach."""
    measured = []
    for times in (1, 2):
        run(times)
        measured.append(emulator.counts(library_of()))
    more = measured[1] - measured[0]
    cycles, hbm = emulator.bounds(library_of(), more)
    return hbm / cycles, more


def libraries(source: str):
    return lambda: emulator.build(source, torch.bfloat16)


def tensors(*shape: int) -> list[torch.Tensor]:
    return [torch.randn(shape).to(torch.bfloat16) for _ in range(3)]


def of_a_model(width: int, heads: int, halves: bool):
    """Name, library and run of each kernel over rows of one model: n times 192 rows."""
    w, norm, rope, adaln = torch.randn(width), libraries("norm"), libraries("rope"), {"center": True, "plus": 1.0}

    def x(n):
        return tensors(1, 192 * n, width)

    def back(n, *args, **options):
        ascend.norm_backward(*x(n)[:2], *args, **options)

    def turn(n, weight):
        ascend.rope(tensors(192 * n, heads, 128)[0], torch.randn(192 * n, 64), weight, halves=halves)

    def turn_back(n, weight):
        ascend.rope_backward(*tensors(192 * n, heads, 128)[:2], torch.randn(192 * n, 64), weight, halves=halves)

    yield "RMSNorm", norm, lambda n: ascend.norm(x(n)[0], w)
    yield "RMSNorm backward", norm, lambda n: back(n, w)
    yield "add + RMSNorm", norm, lambda n: ascend.norm(x(n)[0], w, None, x(n)[0])
    yield "add + RMSNorm backward", norm, lambda n: back(n, w, False, x(n)[0])
    yield "adaLN", norm, lambda n: ascend.norm(x(n)[0], w[None], w[None], **adaln)
    yield "adaLN backward", norm, lambda n: back(n, w[None], True, **adaln)
    yield "rope", rope, lambda n: turn(n, None)
    yield "rope backward", rope, lambda n: turn_back(n, None)
    yield "q/k norm + rope", rope, lambda n: turn(n, torch.ones(128))
    yield "q/k norm + rope backward", rope, lambda n: turn_back(n, torch.ones(128))


def bandwidth():
    """Name, library and run of each kernel at the widths of Wan-14B and Qwen2.5-VL-7B, bfloat16."""
    for model, *sizes in (("Wan-14B", 5120, 40, False), ("Qwen2.5-VL-7B", 3584, 28, True)):
        yield from ((f"{model} {name}", library, run) for name, library, run in of_a_model(*sizes))
    gate, size = libraries("gate"), 48 * 4096 * 2
    yield "SwiGLU", gate, lambda n: ascend.gate(*tensors(size * n)[:2])
    yield "SwiGLU backward", gate, lambda n: ascend.gate_backward(*tensors(size * n))
    yield "GELU gate", gate, lambda n: ascend.gate(*tensors(size * n)[:2], "gelu_tanh")
    yield "GELU gate backward", gate, lambda n: ascend.gate_backward(*tensors(size * n), "gelu_tanh")


def test_estimated_bandwidth():
    shares = {name: marginal(library, run)[0] for name, library, run in bandwidth()}
    print("\n" + "\n".join(f"{name:40} {share:.0%} of HBM" for name, share in shares.items()))
    assert min(shares.values()) >= 0.8, {n: s for n, s in shares.items() if s < 0.8}


def cube_share(width: int, backward: bool) -> float:
    """Share of the cube peak of long attention: what a thousand more keys (queries, backward) cost, 24 tiles at once."""
    bf16, source, more = torch.bfloat16, "attention_grad" if backward else "attention", 1024

    def run(n):
        long, short = torch.randn(1, 24 * 128, 1, width).to(bf16), torch.randn(1, more * n, 1, width).to(bf16)
        if backward:
            ascend_attention.attention_backward(short, long, long, short, torch.zeros(1, 1, more * n), short)
        else:
            ascend_attention.attention(long, short, short)

    counts = marginal(lambda: emulator.build(source, bf16), run)[1]
    flops = (10 if backward else 4) * 24 * 128 * more * width
    return flops / 24 / 8192 / emulator.bounds(emulator.build(source, bf16), counts)[0]


def test_estimated_share_of_the_cube_peak():
    forward, backward = cube_share(128, False), cube_share(128, True)
    print(f"\nattention, width 128: forward {forward:.0%}, backward {backward:.0%} of the cube peak")
    assert forward >= 0.6 and backward >= 0.5


@DEEP
def test_attention_of_4096_tokens_takes_under_a_minute():
    q, k, v = (torch.randn(1, 4096, 1, 128).to(torch.bfloat16) for _ in range(3))
    emulator.build("attention", q.dtype)
    began = time.perf_counter()
    o, _ = ascend_attention.attention(q, k, v)
    took = time.perf_counter() - began
    print(f"\n{took:.1f} s")
    assert took < 60
    assert error(o, ascend_attention.attention_reference(q.double(), k.double(), v.double())) < 0.01
