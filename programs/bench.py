"""Time a training step, or decoding, against the program's own FLOPs.

    python programs/bench.py --model qwen2vl:tiny --size.batch 4 --size.tokens 345 --size.height 336
    python programs/bench.py --model qwen2:2.5-0.5b --decode 32 --dtype bf16

Random weights, no data. Prints medians of the time and the FLOP/s, and the share of a measured matrix product's.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import tyro

from mmfunc import example, generate, jit, metrics, models, optim, random, tree

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Args:
    model: str  # family:preset
    size: example.Sizes = example.Sizes(tokens=256)  # of the batch, or of the prompts when decoding
    train: str = "."  # rule over parameter names: what is trained
    decode: int = 0  # time so many decoding steps instead of training
    dtype: Literal["fp32", "bf16"] = "fp32"  # of parameters; bf16 ones have float32 masters
    mode: Literal["whole", "split", "block"] = "whole"
    backend: Literal["inductor", "eager"] = "inductor"
    remat: Literal["nothing", "attention", "dots"] | None = None
    runs: int = 5  # counted calls
    threads: int = 0  # 0: torch's choice


def trainer(family: Any, c: Any, params: tree.Tree, b: dict, a: Args) -> tuple[Callable, float]:
    """(a call of the training step, its FLOPs)."""
    tx = optim.chain(optim.adamw(), optim.decay(0.01), optim.scale(1e-4))
    tx = optim.masters(tx) if a.dtype == "bf16" else tx
    state = optim.init(tx, *tree.split(params, a.train))
    step = jit.jit(partial(optim.step, example.loss(family, c), tx), a.mode, a.backend, donate=True, remat=a.remat)
    flops = step.lower(state, b).cost()["flops"]
    return lambda: step(state, b)[1]["loss"].item(), flops


def decoder(family: Any, c: Any, params: tree.Tree, b: dict, a: Args) -> tuple[Callable, float]:
    """(a call that decodes the tokens behind a prompt, its FLOPs without attention)."""
    call = generate.stepper(family.step, c, mode=a.mode, backend=a.backend)
    ready = {k: v for k, v in b.items() if k != "labels"}
    slots = a.size.tokens + a.decode + 1
    run = lambda new: generate.generate(family, params, c, ready, new=new, call=call, slots=slots)
    return lambda: run(a.decode + 1), 2.0 * a.size.batch * a.decode * tree.size(family.params(c))


def timed(call: Callable, runs: int) -> list[float]:
    """Wall seconds of each call."""
    out = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        out.append(time.perf_counter() - start)
    return out


def main(a: Args) -> None:
    if a.threads:
        torch.set_num_threads(a.threads)
    family, c = models.get(a.model)
    params = tree.init(family.params(c), random.key(0), DTYPES[a.dtype])
    b = example.batch(a.model, family, c, a.size)
    call, flops = (decoder if a.decode else trainer)(family, c, params, b, a)
    first = timed(call, 1)[0]
    times = timed(call, a.runs)
    median = statistics.median(times)
    peak = metrics.gemm(DTYPES[a.dtype])
    said = {
        "model": a.model,
        "first_s": round(first, 2),
        "median_s": round(median, 4),
        "spread_s": [round(min(times), 4), round(max(times), 4)],
        "gflop": round(flops / 1e9, 2),
        "gflop_per_s": round(flops / median / 1e9, 1),
        "share_of_gemm": round(flops / median / peak, 3),
        "peak_rss_gib": round(metrics.memory()["peak_rss"] / 2**30, 2),
    }
    if a.decode:
        said["ms_per_token"] = round(1e3 * median / (a.decode + 1), 2)
    print(json.dumps(said))


if __name__ == "__main__":
    main(tyro.cli(Args))
