"""Our CPU attention beside PyTorch's kernel in bf16, interleaved in one process: medians in GFLOP a core-second.

    OMP_NUM_THREADS=2 python benchmarks/attention.py [runs]

Also the time of causal order, and of 16 segments packed into a row, as a part of that of full attention.

With a GPU: the candidates of `kernels.attention` for CUDA instead, each compiled, by kind of mask; TFLOP/s of what the
mask lets through, and whether the fastest is the one of the table `CUDA`.
"""

import json
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention
from workloads import row, settle, turns

from mmfunc import jit
from mmfunc.kernels import attention, cpu, flex

SHAPES = [(4, 12, 512, 64), (1, 6, 1950, 128), (1, 12, 1950, 64), (1, 8, 4096, 64)]  # batch, heads, tokens, width
CANDIDATES = {"fused": attention.fused, "flex": flex.attention}
CASES = [  # heads, key heads, queries, keys, width, kind, segments
    (40, 40, 32760, 32760, 128, "full", 0),  # Wan 14B, 81 frames of 480p
    (40, 40, 32760, 512, 128, "full", 0),  # and its text
    (24, 24, 4608, 4608, 128, "full", 0),  # FLUX, 1024 x 1024
    (28, 4, 8192, 8192, 128, "causal", 0),  # Qwen2.5-VL 7B
    (28, 4, 8192, 8192, 128, "segments", 16),  # and packed
    (16, 16, 8192, 8192, 80, "segments", 128),  # windows of its vision tower, no causal order
    (28, 4, 1024, 8192, 128, "cache", 0),  # a prompt into a cache
    (28, 4, 1, 8192, 128, "cache", 0),  # decoding
    (64, 64, 512, 512, 64, "bias", 0),  # umT5, the text encoder of Wan
]


def theirs(q, k, v):
    return scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def ours(q, k, v, segments=None, causal=False):
    return cpu.attention(q, k, v, segments, segments, None, causal, q.shape[-1] ** -0.5)[0]


def both(fn, q, k, v, g):
    """Forward and backward."""
    live = [t.detach().requires_grad_() for t in (q, k, v)]
    torch.autograd.grad(fn(*live), live, g)


def rows(runs: int = 5) -> list[dict]:
    """For each shape and pass: GFLOP a core-second of PyTorch's and ours, and shares of the time of full attention."""
    threads, out = torch.get_num_threads(), []
    for batch, heads, tokens, width in SHAPES:
        q, k, v, g = (torch.randn(batch, tokens, heads, width).bfloat16() for _ in range(4))
        segments = (torch.arange(tokens) * 16 // tokens + 1).expand(batch, -1)
        fns = {"theirs": theirs, "ours": ours, "causal": partial(ours, causal=True),
               "packed": partial(ours, segments=segments)}
        flops = 4 * batch * heads * tokens**2 * width / threads / 1e9
        forward = {n: partial(fn, q, k, v) for n, fn in fns.items()}
        back = {n: partial(both, fn, q, k, v, g) for n, fn in fns.items()}
        for name, calls, count in (("forward", forward, flops), ("and back", back, 3.5 * flops)):
            t = {n: row(x)["median_s"] for n, x in turns(calls, runs).items()}
            out.append({"shape": [batch, heads, tokens, width], "pass": name, "theirs": round(count / t["theirs"], 1),
                        "ours": round(count / t["ours"], 1), "ratio": round(t["theirs"] / t["ours"], 3),
                        "causal": round(t["causal"] / t["ours"], 3), "packed": round(t["packed"] / t["ours"], 3)})
    return out


def masks(case: tuple, device: str) -> dict:
    """Arguments of a candidate that make a mask of that kind; what is packed for heads that share keys is causal."""
    heads, groups, queries, keys, _, kind, segments = case
    causal = kind in ("causal", "cache") or kind == "segments" and heads != groups
    found = {"causal": causal, "segments": None, "start": None, "bias": None}
    if kind == "segments":
        found["segments"] = (torch.arange(queries, device=device) * segments // queries + 1)[None]
    if kind == "cache":
        found["start"] = torch.tensor(keys // 2, device=device)
    if kind == "bias":
        found["bias"] = torch.randn(1, heads, queries, keys, device=device).bfloat16()
    return found


def timed(calls: dict[str, Callable], runs: int, device: str) -> dict[str, float]:
    """Median seconds of each call, in turn, until the device has done it."""
    found = turns({n: lambda call=call: (call(), settle(device)) for n, call in calls.items()}, runs)
    return {n: row(t)["median_s"] for n, t in found.items()}


def compiled(fn: Callable, causal: bool, scale: float, back: bool, backend: str) -> Callable:
    """(q, k, v, slope), masks -> the output, or with back the gradients of q, k and v; one graph."""
    def forward(p, segments, start, bias):
        return fn(*p, causal, segments, start, scale, bias)

    def gradients(p, *masks):
        return jit.value_and_grad(lambda live: (forward(live, *masks) * p[3]).float().sum())(p[:3])[1]

    return jit.jit(gradients if back else lambda p, *masks: forward(p[:3], *masks), backend=backend)


def compared(case: tuple, back: bool, runs: int, device: str, backend: str) -> dict:
    """TFLOP/s of each candidate, "refused: why" for one that does not run, and what the table takes."""
    heads, groups, queries, keys, width = case[:5]
    given = masks(case, device)
    rand = lambda n, h: torch.randn(1, n, h, width, device=device).bfloat16()
    p = [rand(queries, heads), rand(keys, groups), rand(keys, groups), rand(queries, heads)]
    causal, args = given["causal"], (given["segments"], given["start"], given["bias"])
    seen = pairs(queries, keys, **given)
    calls, out = {}, {}
    for name, fn in CANDIDATES.items():
        call = partial(compiled(fn, causal, width**-0.5, back, backend), p, *args)
        try:
            call()
            calls[name] = call
        except Exception as e:  # of memory, or of the compiler: a result too
            out[name] = f"refused: {type(e).__name__}: {str(e)[:100]}"
    seconds = timed(calls, runs, device)
    flops = (14 if back else 4) * heads * width * seen / 1e12
    out |= {name: float(f"{flops / t:.3g}") for name, t in seconds.items()}
    run = attention.CUDA[attention.kind(causal, *args)]
    few = run is flex.attention and queries < flex.FEW
    taken = "fused" if few else next(name for name, fn in CANDIDATES.items() if fn is run)
    return {"case": case, "pass": "and back" if back else "forward", **out, "table": taken,
            "fastest": min(seconds, key=seconds.get, default=None)}


def pairs(queries: int, keys: int, causal: bool, segments, start, bias) -> int:
    """Of queries and keys that see each other: what has to be computed."""
    device = "cpu" if segments is None else segments.device
    total = 0
    for a in range(0, queries, 1024):  # not all at once: 32,760 squared are 1 GB
        s = slice(a, min(a + 1024, queries))
        place = None if start is None else start.to(device)
        seen = attention.visible(s, keys, causal, segments, place, device)
        total += (s.stop - a) * keys if seen is None else int(seen.sum())
    return total


def table(device: str, runs: int = 5, cases: list[tuple] = CASES, backend: str = "inductor",
          passes: tuple[bool, ...] = (False, True)) -> list[dict]:
    """All cases, printed as they come, and where the table does not take the fastest; a cache has no gradient."""
    out = []
    for case in cases:
        for back in passes:
            if back and case[5] == "cache":
                continue
            found = compared(case, back, runs, device, backend)
            out.append(found)
            print(json.dumps(found), flush=True)
            best, taken = found["fastest"], found["table"]
            if best != taken:
                print(f"MISMATCH: {case[5]}, {found['pass']}: the table takes {taken} ({found[taken]} TFLOP/s), the "
                      f"fastest is {best} ({found.get(best)})", flush=True)
    print(f"the table takes the fastest in {sum(f['fastest'] == f['table'] for f in out)} of {len(out)}")
    return out


if __name__ == "__main__":
    if torch.cuda.is_available():
        table("cuda", *map(int, sys.argv[1:]))
    else:
        for found in rows(*map(int, sys.argv[1:])):
            print(json.dumps(found))
