"""Our CPU attention beside PyTorch's kernel in bf16, interleaved in one process: medians in GFLOP a core-second.

    OMP_NUM_THREADS=2 python benchmarks/attention.py [runs]

Also the time of causal order, and of 16 segments packed into a row, as a part of that of full attention.
"""

import json
import sys
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention
from workloads import row, turns

from mmfunc.kernels import cpu

SHAPES = [(4, 12, 512, 64), (1, 6, 1950, 128), (1, 12, 1950, 64), (1, 8, 4096, 64)]  # batch, heads, tokens, width


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


if __name__ == "__main__":
    for found in rows(*map(int, sys.argv[1:])):
        print(json.dumps(found))
