"""What the machine can do: the fastest kernels here, by which a program's best possible time is computed."""

import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import conv2d, scaled_dot_product_attention

from mmfunc import kernels
from mmfunc.kernels import wide

GEMMS = (2048, 768, 3072), (1380, 768, 4096), (1332, 3072, 768), (2048, 2048, 2048)  # tokens, in, out
CONVS = (128, 128, 128), (256, 256, 128)  # channels in and out, side; 3 x 3
BIG = 2**26  # floats, 256 MiB: more than any cache here
ATTENTION = (1, 6, 1950, 128), (1, 12, 1950, 64)  # batch, heads, tokens, width


def least(call: Callable, seconds: float = 1.0) -> float:
    """The shortest of the times of a call, tried for a while."""
    call()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


@torch.no_grad()
def fastest(fn: Callable, *args: Any, seconds: float) -> float:
    """The shortest time of a product, by PyTorch's kernel for these numbers or by ours."""
    return min(least(partial(f, *args), seconds) for f in (fn, partial(wide.call, fn)))


def both(fn: Callable, *tensors: torch.Tensor) -> None:
    live = [t.detach().requires_grad_() for t in tensors]
    y = fn(*live)
    torch.autograd.grad(y, live, y.detach())


def reading(seconds: float) -> float:
    """Bytes/s of reading memory; beside other guests of a machine it may double within minutes."""
    big = torch.ones(BIG)
    return big.nbytes / least(lambda: big.sum(), seconds)


def measure(seconds: float = 1.0) -> dict[str, float]:
    """bf16 FLOP/s of matrix products, convolutions, attention (there and back); bytes/s of reading and copying."""
    rand = lambda *size: torch.randn(size).bfloat16()
    gemm = conv = attention = 0.0
    for m, k, n in GEMMS:
        a, b = rand(m, k), rand(n, k)
        gemm = max(gemm, 2 * m * k * n / fastest(torch.matmul, a, b.T, seconds=seconds))
    for a, b, side in CONVS:
        x, w = rand(1, a, side, side).to(memory_format=torch.channels_last), rand(b, a, 3, 3)
        conv = max(conv, 18 * a * b * side**2 / fastest(conv2d, x, w, None, 1, 1, seconds=seconds))
    sdpa = lambda q, k, v: scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
    for b, h, n, d in ATTENTION:
        given = [rand(b, n, h, d) for _ in range(3)]
        for fn in (sdpa, kernels.attend):
            attention = max(attention, 14 * b * h * n * n * d / least(lambda fn=fn, g=given: both(fn, *g), seconds))
    big = torch.ones(BIG)
    into = torch.empty_like(big)
    return {"gemm": gemm, "conv": conv, "attention": attention, "read": reading(seconds),
            "copy": 2 * big.nbytes / least(lambda: into.copy_(big), seconds)}


def described() -> dict[str, str | int]:
    """The machine in words."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {"cpu": names[0] if names else platform.processor(), "cores": os.cpu_count() or 1,
            "threads": torch.get_num_threads(), "capability": torch.backends.cpu.get_cpu_capability(),
            "float32": ", ".join(str(t).removeprefix("torch.") for t in wide.slow()) or "none"}


def waits() -> str:
    """What OpenMP's threads do while they wait: those that sleep at once cost short steps, and spare other processes."""
    policy, spins = (os.environ.get(n) for n in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"))
    return f"spin {spins} times" if spins else policy or "as OpenMP has it"


def best_time(graph: dict[str, int], can: dict[str, float]) -> float:
    """Seconds that a graph takes at the least: each kind of kernel at its rate, each argument read once, and those that
    are renewed copied.

    All that lies between the products is taken as free: the real limit is higher.
    """
    work = sum(graph[k] / can[k] for k in ("gemm", "conv", "attention"))
    new = graph["renewed"]
    return graph["times"] * (work + (graph["bytes"] - new) / can["read"] + 2 * new / can["copy"])
