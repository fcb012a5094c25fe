"""Our CPU attention against its definition in float64, and against PyTorch's error."""

from functools import cache

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.nn.functional import linear

from mmfunc import jit, nn, tree
from mmfunc.kernels import attention, cpu, native, product

needed = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler")


def choice(g, *of):
    return of[int(torch.randint(len(of), (), generator=g))]


def draw(seed, dtype):
    """q, k, v, gradient (zero where a query sees nothing), masks, and which queries see something."""
    g = torch.Generator().manual_seed(seed)
    size = lambda top: int(torch.randint(1, top, (), generator=g))
    groups, width = choice(g, 1, 1, 2), choice(g, 16, 24, 32, 40, 64, 72, 80, 128, 136, 256, 5)
    batch, heads, queries, keys = choice(g, 1, 2), groups * choice(g, 1, 2, 3), size(choice(g, 8, 70, 230)), size(choice(g, 8, 70, 450, 1300))
    causal, start, segments = choice(g, True, False), None, None
    if causal:
        start = choice(g, None, torch.tensor(size(keys + 1) - 1))
    if choice(g, True, False, False):
        ids = lambda n: torch.randint(0, 5, (batch, n), generator=g)
        segments = choice(g, lambda t: t, lambda t: t.sort(-1).values)
        segments = segments(ids(queries)), segments(ids(keys))
    make = lambda n, h: torch.randn(batch, h, n, width, generator=g).to(dtype).transpose(1, 2)
    q, k, v, slope = make(queries, heads), make(keys, groups), make(keys, groups), make(queries, heads)
    seen = attention.visible(slice(0, queries), keys, causal, segments, start, q.device)
    seen = torch.ones(batch, queries, dtype=torch.bool) if seen is None else seen.any(-1)[:, 0, 0].expand(batch, -1)
    return (q, k, v, slope * seen[..., None, None]), (causal, segments, start, width**-0.5), seen


def ours(q, k, v, causal, segments, start, scale):
    return cpu.attention(q, k, v, *(segments or (None, None)), start, causal, scale)[0]


def results(fn, tensors, masks, dtype=None):
    """The output and the gradients of q, k and v."""
    q, k, v, g = (t if dtype is None else t.to(dtype) for t in tensors)
    live = [t.detach().requires_grad_() for t in (q, k, v)]
    y = fn(*live, *masks)
    return [y.detach(), *torch.autograd.grad(y, live, g)]


def exact(q, k, v, causal, segments, start, scale):
    """attention.reference rounds its scores to float32; this does not."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    mask = attention.visible(slice(0, q.shape[2]), k.shape[2], causal, segments, start, q.device)
    scores = q @ k.transpose(-1, -2) * scale
    scores = scores if mask is None else scores.masked_fill(~mask[:, 0], attention.HIDDEN)
    return (torch.softmax(scores, -1) @ v).transpose(1, 2)


@needed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_errors_are_no_larger_than_those_of_pytorch(dtype):
    """300 shapes and masks: each error within 1.2 times that of PyTorch's kernel or operations, all in all within 1.1."""
    # of the values: two orders of a sum of 256; in bf16 one rounding, which PyTorch's kernel on some CPUs does not make
    floor = 8e-7 if dtype == torch.float32 else 2**-9
    total = torch.zeros(4, 3)
    for seed in range(300):
        tensors, masks, seen = draw(seed, dtype)
        want = results(exact, tensors, masks, torch.float64)
        found = [results(fn, tensors, masks) for fn in (ours, attention.fused, attention.blocked)]
        assert (found[0][0][~seen] == 0).all() and (found[0][1][~seen] == 0).all()
        for i, w in enumerate(want):
            at = seen if i < 2 else slice(None)
            size = max(w[at].norm(), tensors[3].double().norm(), torch.tensor(1e-9))  # of one key, a query's gradient is 0
            error = torch.stack([(f[i].double() - w)[at].norm() / size for f in found])
            assert error[0] <= 1.2 * error[1:].max() + floor, (seed, i, error)
            total[i] += error.float() ** 2
    total = total.sqrt()
    assert (total[:, 0] <= 1.1 * total[:, 1:].max(1).values).all(), total


@needed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_few_queries_have_no_larger_errors_either(dtype):
    """The kernel of decoding, which has no gradient, at the same 300 shapes and masks."""
    assert native.available()  # which makes the operation known
    floor, total = 8e-7 if dtype == torch.float32 else 2**-9, torch.zeros(3)
    for seed in range(300):
        tensors, masks, seen = draw(seed, dtype)
        if not seen.any():
            continue
        q, k, v = tensors[:3]
        causal, segments, start, scale = masks
        ids = [cpu.ids(t, len(q)) for t in segments or (None, None)]
        few = torch.ops.mmfunc.cpu_attention_few(q, k, v, *ids, start, causal, scale)
        assert few.dtype == dtype and (few[~seen] == 0).all()
        want = exact(*(t.double() for t in (q, k, v)), *masks)[seen]
        found = [y[seen].double() for y in (few, attention.fused(q, k, v, *masks), attention.blocked(q, k, v, *masks))]
        error = torch.stack([(y - want).norm() / want.norm().clamp(min=1e-9) for y in found])
        assert error[0] <= 1.2 * error[1:].max() + floor, (seed, error)
        total += error.float() ** 2
    assert total[0] <= 1.1**2 * total[1:].max(), total


@needed
def test_decoding_reads_keys_by_the_kernel_of_few_queries():
    """Op by op and in a graph; the same bits with any number of threads; NaN shows; gradients go another way."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, h, 40, generator=g) for n, h in ((3, 6), (50, 2), (50, 2)))
    seen, start = torch.arange(50).expand(2, -1).lt(45).long(), torch.tensor(30)
    run = lambda p, start: attention.attend(*p, causal=True, segments=(seen.new_ones(2, 3), seen), start=start)
    was, found = torch.get_num_threads(), []
    with torch.no_grad():
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            found.append(run((q, k, v), start))
        torch.set_num_threads(was)
        assert all(torch.equal(found[0], y) for y in found[1:])
        assert "mmfunc.cpu_attention_few.default" in jit.jit(run).lower((q, k, v), start).cost()["flops_by_op"]
        assert torch.equal(jit.jit(run, backend="aot_eager")((q, k, v), start), found[0])
        want = attention.reference(q, k, v, True, (seen.new_ones(2, 3), seen), start, 40**-0.5)
        assert (found[0] - want).abs().max() < 2e-6
        k[0, 31, 0] = float("nan")
        y = run((q, k, v), start)
        assert y[0, 0].isfinite().all() and y[0, 1:, :3].isnan().all() and y[0, 1:, 3:].isfinite().all()
    live = q.requires_grad_()
    assert torch.autograd.grad(attention.attend(live, k[:, :40], v[:, :40]).sum(), live)[0].shape == q.shape


@needed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_same_bits_on_any_number_of_threads(dtype):
    g = torch.Generator().manual_seed(0)
    q, k, v, slope = (torch.randn(1, 900, h, 40, generator=g).to(dtype) for h in (4, 2, 2, 4))
    segments = torch.arange(900)[None] // 250 + 1
    runs, was = [], torch.get_num_threads()
    for threads in (1, 2, 2, 5):
        torch.set_num_threads(threads)
        runs.append(results(ours, (q, k, v, slope), (True, (segments, segments), None, 0.2)))
    torch.set_num_threads(was)
    assert all(torch.equal(x, y) for run in runs[1:] for x, y in zip(run, runs[0]))


@needed
def test_what_is_masked_has_no_influence():
    """And NaN that is seen shows."""
    q = torch.randn(1, 200, 2, 32)
    k, v = torch.randn(2, 1, 200, 2, 32)
    segments = torch.arange(200)[None] // 70
    before = results(ours, (q, k, v, q), (False, (segments, segments), None, 0.2))
    k[:, :70], v[:, :70] = 1e4, 1e4
    after = results(ours, (q, k, v, q), (False, (segments, segments), None, 0.2))
    assert all(torch.equal(x, y) for x, y in zip(before, after))
    k[:, 150] = float("nan")
    out = ours(q, k, v, True, None, None, 0.2)
    assert out[:, :150].isfinite().all() and out[:, 150:].isnan().all()


@needed
def test_strides_and_compilation():
    """The op's schema, fake and autograd hold; compiled it is one graph; tensors need not be dense."""
    g = torch.Generator().manual_seed(1)
    fused = torch.randn(2, 70, 3, 2, 24, generator=g)
    segments = torch.randint(0, 3, (2, 70), generator=g)
    q, k, v = (t.requires_grad_() for t in fused.unbind(2))
    odd = torch.randn(2, 70, 24, 2, generator=g).transpose(2, 3).requires_grad_()  # last dimension not contiguous
    for args in ((q, k, v, None, None, None, True, 0.2), (odd, k, v, segments, segments, torch.tensor(3), True, 0.2)):
        opcheck(cpu.attention, args, test_utils=("test_schema", "test_autograd_registration", "test_faketensor",
                                                 "test_aot_dispatch_static"))
    dense = ours(*(t.contiguous() for t in (q, k, v)), True, None, None, 0.2)
    assert torch.equal(ours(q, k, v, True, None, None, 0.2), dense)
    run = lambda p: jit.value_and_grad(lambda p: attention.attend(*p, causal=True).square().sum())(p)
    p = [t.detach() for t in (q, k, v)]
    (x, found), (y, want) = jit.jit(run, backend="aot_eager")(p), run(p)
    assert torch.equal(x, y) and all(map(torch.equal, found, want))
    flops = jit.jit(run).lower(p).cost()["flops_by_op"]
    seen = 2 * 2 * 2 * 24 * (70 * 71 // 2)  # batch, heads, multiply and add, width, pairs
    assert flops == {"mmfunc.cpu_attention.default": 2 * seen, "mmfunc.cpu_attention_backward.default": 5 * seen}


def layer(p, c, x, ctx):
    q, k, v = linear(x, p["qkv"]).unflatten(-1, (3, 2, 8)).unbind(2)
    return x + linear(attention.attend(q, k, v, causal=True).flatten(2), p["out"])


@needed
def test_policies_keep_or_repeat_it():
    chain = nn.Chain(lambda p, c, b: (b, {}), (("blocks", layer),), lambda p, c, x, ctx: x)
    step = lambda p, b: jit.value_and_grad(lambda p: chain(p, None, b).square().mean())(p)
    p, b = {"blocks": [{"qkv": torch.randn(48, 16) / 4, "out": torch.randn(16, 16) / 4} for _ in range(2)]}, torch.randn(2, 70, 16)
    value, want = step(p, b)
    for policy, calls in (("nothing", 4), ("attention", 2), ("dots", 2), ("everything", 2)):
        graph = jit.jit(step, remat=policy).lower(p, b).graph
        assert sum(n.target is torch.ops.mmfunc.cpu_attention.default for n in graph.graph.nodes) == calls
        runs = [(mode, "aot_eager") for mode in ("whole", "split", "block")]
        for mode, backend in runs + [("whole", "inductor")] * (policy == "attention"):
            loss, found = jit.jit(step, mode, backend, remat=policy)(p, b)
            assert torch.allclose(loss, value, rtol=1e-6)
            assert all(torch.allclose(x, y, rtol=1e-4, atol=1e-6) for x, y in zip(tree.leaves(found), tree.leaves(want)))


@cache
def machines():
    """Instruction sets that this machine has."""
    flags = torch.backends.cpu.get_cpu_capability()
    return ["x86-64"] + ["x86-64-v3"] * (flags in ("AVX2", "AVX512")) + ["x86-64-v4"] * (flags == "AVX512")


@torch.no_grad()
def decoding():
    """What the operations of a few rows give: bf16, int8, and attention."""
    g = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(*s, generator=g).bfloat16() for s in ((3, 200), (33, 200), (33,)))
    scale, q = torch.rand(33, 4, generator=g).bfloat16(), torch.randn(1, 9, 4, 72, generator=g).bfloat16()
    small = (w * 20).round().to(torch.int8)
    return [product.linear(x, w, b), product.linear(x, small, None, scale), attention.attend(q, q[:, :, :2], q[:, :, 2:])]


@needed
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="not x86-64")
def test_other_instruction_sets(monkeypatch):
    cases = [(d, *draw(seed, d)[:2]) for d in (torch.float32, torch.bfloat16) for seed in range(8)]
    want, few, cxx, here = [results(ours, *c[1:]) for c in cases], decoding(), native.compiler(), native.library()
    try:
        for machine in machines():
            library = native.ctypes.CDLL(str(native.build(cxx, machine)))
            monkeypatch.setattr(native, "library", lambda library=library: library)
            native.register(cxx, library)
            for (dtype, *case), w in zip(cases, want):
                for x, y in zip(results(ours, *case), w):
                    assert (x - y).norm() <= (2e-6 if dtype == torch.float32 else 8e-3) * max(y.norm(), case[0][3].norm())
            assert all((x - y).norm() <= 4e-3 * y.norm() for x, y in zip(decoding(), few))
    finally:
        native.register(cxx, here)


@needed
def test_a_system_that_allows_no_matrix_registers(monkeypatch):
    """Then the kernels are built without them, and compute the same."""
    made, real, cases = [], native.build, [draw(seed, torch.bfloat16)[:2] for seed in range(4)]
    want = [results(ours, *c) for c in cases]

    class Refusing:
        def attention_allowed(self):
            return 0

    def build(cxx, machine="native", *without):
        made.append(without)
        return real(cxx, machine, *without)

    load = native.ctypes.CDLL
    monkeypatch.setattr(native, "build", build)
    monkeypatch.setattr(native.ctypes, "CDLL", lambda path: load(path) if made[-1] else Refusing())
    native.library.cache_clear()
    try:
        for case, w in zip(cases, want):
            for x, y in zip(results(ours, *case), w):
                assert (x - y).norm() <= 8e-3 * max(y.norm(), case[0][3].norm())
    finally:
        native.library.cache_clear()
    assert made == [(), ("amx-bf16",)]


def test_without_a_compiler_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    q = torch.randn(1, 80, 2, 16)
    for cxx, said in ((None, "no C\\+\\+ compiler"), ("false", "exit status 1")):
        native.library.cache_clear()
        monkeypatch.setattr(native, "compiler", lambda cxx=cxx: cxx)
        with pytest.warns(UserWarning, match=said):
            y = attention.attend(q, q, q, causal=True)
        assert torch.equal(y, attention.blocked(q, q, q, True, None, None, 0.25))
    native.library.cache_clear()


@needed
@pytest.mark.parametrize("rows, n, k", [(1, 5, 7), (1, 130, 96), (3, 17, 33), (8, 64, 200), (5, 33, 4000)])
def test_products_of_few_rows(rows, n, k):
    """bf16 results differ from those of float64 by their own rounding."""
    g = torch.Generator().manual_seed(n)
    x, w, b = (torch.randn(*s, generator=g).bfloat16() for s in ((1, rows, k), (n, k), (n,)))
    for bias in (b, None):
        with torch.no_grad():
            y = product.linear(x, w, bias)
        want = linear(x.double(), w.double(), None if bias is None else bias.double())
        assert y.dtype == torch.bfloat16 and y.shape == (1, rows, n)
        assert ((y - want).abs() <= want.abs() * 2**-8 + 1e-5 * k**0.5).all()
    with torch.no_grad():
        assert torch.equal(y, jit.jit(product.linear, backend="aot_eager")(x, w, None))
    assert jit.jit(product.linear).lower(x, w, None).cost()["flops_by_op"] == {"mmfunc.cpu_matvec.default": 2 * rows * n * k}


@needed
def test_products_of_the_same_rows_are_one_call():
    """Of weights that the graph is given, with and without bias; the numbers stay."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 72, generator=g).bfloat16()
    p = [{"weight": torch.randn(n, 72, generator=g).bfloat16()} for n in (40, 8, 5, 72)]
    p[1]["bias"] = torch.randn(8, generator=g).bfloat16()
    p += [{"weight": torch.randn(n, 40, generator=g).bfloat16()} for n in (3, 6)]

    def run(p, x):
        a, b, c = (nn.linear(q, x) for q in p[:3])
        d, e = (nn.linear(q, a) for q in p[4:])  # of rows that are such a product themselves
        return torch.cat([a, b, c, d, e, nn.linear(p[3], x + 1), nn.linear({"weight": p[0]["weight"] * 2}, x)], -1)

    with torch.no_grad():
        want = run(p, x)
        found = make_fx(run, tracing_mode="fake")(p, x)
        product.gather(found.graph)
        found.graph.lint()
        found.recompile()
        names = [str(n.target) for n in found.graph.nodes if "matvec" in str(n.target)]
        assert sorted(names) == ["mmfunc.cpu_matvec.default"] * 2 + ["mmfunc.cpu_matvecs.default"] * 2
        assert torch.equal(found(p, x), want) and torch.equal(jit.jit(run)(p, x), want)


@pytest.mark.parametrize("macros, said", [
    (b"", {}), (b"__AVX2__ __AVX512VL__", {}), (b"__AVX2__ __AVX512VL__ __AMX_TILE__", {"cpp.vec_isa_ok": True})])
def test_inductor_is_told_of_vectors_that_the_compiler_has(monkeypatch, macros, said):
    """Of all that the CPU has; else it tries each."""
    monkeypatch.setattr("torch._inductor.cpu_vec_isa.x86_isa_checker", lambda: ["avx2", "avx512", "amx_tile"])
    monkeypatch.setattr(native, "compiler", lambda: "g++")
    monkeypatch.setattr(native, "defined", lambda *args: macros)
    assert native.vectors() == said
