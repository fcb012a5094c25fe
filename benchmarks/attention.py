"""Our CPU attention beside PyTorch's kernel in bf16, interleaved in one process: medians in GFLOP a core-second.

    OMP_NUM_THREADS=2 python benchmarks/attention.py [runs]

Also the time of causal order, and of 16 segments packed into a row, as a part of that of full attention.
"""

import statistics
import sys
import time
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from mmfunc.kernels import cpu

SHAPES = [(4, 12, 512, 64), (1, 6, 1950, 128), (1, 12, 1950, 64), (1, 8, 4096, 64)]  # batch, heads, tokens, width


def interleaved(calls, runs):
    """Median seconds of each call, taken in turn; the first turn does not count."""
    times = {k: [] for k in calls}
    for i in range(runs + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name] += [time.perf_counter() - start] * (i > 0)
    return {k: statistics.median(v) for k, v in times.items()}


def theirs(q, k, v):
    return scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def ours(q, k, v, segments=None, causal=False):
    return cpu.attention(q, k, v, segments, segments, None, causal, q.shape[-1] ** -0.5)[0]


def both(fn, q, k, v, g):
    """Forward and backward."""
    live = [t.detach().requires_grad_() for t in (q, k, v)]
    torch.autograd.grad(fn(*live), live, g)


def main(runs=5):
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {threads} threads\n{'batch, heads, tokens, width':28} {'':8} {'PyTorch':>8} "
          f"{'ours':>6} {'ratio':>6} {'causal':>7} {'packed':>7}")
    for batch, heads, tokens, width in SHAPES:
        q, k, v, g = (torch.randn(batch, tokens, heads, width).bfloat16() for _ in range(4))
        segments = (torch.arange(tokens) * 16 // tokens + 1).expand(batch, -1)
        fns = {"theirs": theirs, "ours": ours, "causal": partial(ours, causal=True),
               "packed": partial(ours, segments=segments)}
        flops = 4 * batch * heads * tokens**2 * width / threads / 1e9
        forward = {n: partial(fn, q, k, v) for n, fn in fns.items()}
        back = {n: partial(both, fn, q, k, v, g) for n, fn in fns.items()}
        for name, calls, count in (("forward", forward, flops), ("and back", back, 3.5 * flops)):
            t = interleaved(calls, runs)
            rates = f"{count / t['theirs']:8.0f} {count / t['ours']:6.0f} {t['theirs'] / t['ours']:6.2f}"
            parts = f"{t['causal'] / t['ours']:7.2f} {t['packed'] / t['ours']:7.3f}"
            print(f"{str((batch, heads, tokens, width)):28} {name:8} {rates} {parts}", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
