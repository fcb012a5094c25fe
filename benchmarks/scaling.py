"""How time grows: with packed tokens, with depth (compilation), with ranks; and whether the loader keeps up.

    python benchmarks/scaling.py              # prints all of it
"""

import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import attention
import compile_time
import torch
from workloads import LLM, row, turns

from mmfunc import data, jit, models, optim, random, shard, tasks, tree
from mmfunc.models import qwen2

PROGRAMS = Path(__file__).parent.parent / "programs"
SMALL = replace(LLM, width=512, hidden=1536, heads=8, kv_heads=2, layers=6, vocab=8192)


def versions() -> dict[str, str]:
    """Of the packages that are compared."""
    from importlib.metadata import PackageNotFoundError, version

    out = {}
    for name in ("torch", "transformers", "diffusers", "openvino"):
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            out[name] = "none"
    return out


def stepper(c: qwen2.Config, rows: int, tokens: int, segment: int, *, update: bool = True) -> Any:
    """A call of a training step in bfloat16 on rows of packed segments, or of its loss and gradients alone."""
    tx = optim.chain(optim.adamw(), optim.scale(1e-4))
    shard.declare(qwen2.params(c))
    state = optim.init(tx, shard.place(tree.init(qwen2.params(c), random.key(0), torch.bfloat16)))
    ids = torch.randint(0, c.vocab, (rows, tokens), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids, "attention_mask": (torch.arange(tokens) // segment + 1).expand(rows, -1),
             "position_ids": (torch.arange(tokens) % segment).expand(rows, -1),
             "num_items_in_batch": torch.tensor(rows * (tokens - tokens // segment))}
    loss = lambda p, b: qwen2.loss(p, c, b)
    if not update:
        call = jit.jit(jit.value_and_grad(loss), remat="dots")
        return lambda: call(state["params"], batch)[0].item()
    step = jit.jit(partial(optim.step, loss, tx), donate=True, remat="dots")
    return lambda: step(state, batch)[1]["loss"].item()


def tokens(runs: int = 5) -> dict[str, Any]:
    """Microseconds a token of loss and gradients on rows of 512-token segments, and of the whole step, in which the
    optimizer takes as long for few tokens as for many."""
    lengths, out = (512, 1024, 2048, 4096), {}
    for name, update in (("", False), ("step_", True)):
        found = turns({str(n): stepper(SMALL, 1, n, 512, update=update) for n in lengths}, runs)
        each = [1e6 * row(found[str(n)])["median_s"] / n for n in lengths]
        out |= {f"{name}us_per_token": [round(x, 1) for x in each],
                f"{name}last_over_first": round(each[-1] / each[0], 3)}
    return {"tokens": lengths} | out


def shards(folder: Path, count: int = 512, side: int = 336) -> Path:
    """Tar shards of jpeg pictures with a question and an answer each, and a model folder."""
    import numpy as np
    from PIL import Image

    sys.path.insert(0, str(PROGRAMS))
    import digits

    digits.main(digits.Args(folder, singles=10, pages=1))
    rng = np.random.default_rng(0)
    (folder / "shards").mkdir()
    with tarfile.open(folder / "shards" / "0000.tar", "w") as tar:
        for i in range(count):
            picture = io.BytesIO()
            pixels = rng.integers(0, 255, (side // 8, side // 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((side, side)).save(picture, "jpeg", quality=90)
            talk = [{"role": "user", "content": "<image>which digit is this ?"}, {"role": "assistant", "content": "7"}]
            for suffix, said in (("jpg", picture.getvalue()), ("json", json.dumps({"messages": talk}).encode())):
                entry = tarfile.TarInfo(f"{i:06}.{suffix}")
                entry.size = len(said)
                tar.addfile(entry, io.BytesIO(said))
    return folder


def loader(rate: float, count: int = 60) -> dict[str, float]:
    """Samples a second that one loader process gives, and the share of time waited when `rate` are taken."""
    sys.path.insert(0, str(PROGRAMS))
    import train

    with tempfile.TemporaryDirectory() as folder:
        root = shards(Path(folder))
        a = train.Args(root / "model", root / "shards", root / "out", batch=4,
                       rows=train.Rows((600,), (2400,), 600))
        task = tasks.of(a.model)
        source = task.batches(a, *models.family(a.model))
        waits, out = [], {}
        for name, pause in (("free", 0.0), ("paced", 4 / rate)):
            stream = iter(data.stream(source, 0, count, 1))
            next(stream)  # starts the process
            begun, waited = time.perf_counter(), 0.0
            while True:
                taken = None  # unmapping a batch is no waiting
                start = time.perf_counter()
                taken = next(stream, None)
                waited += time.perf_counter() - start
                if taken is None:
                    break
                time.sleep(pause)
            waits.append(waited)
            out[name] = time.perf_counter() - begun
    return {"samples_per_s": round(4 * (count - 1) / out["free"], 1), "asked_per_s": round(rate, 1),
            "wait_share": round(waits[1] / out["paced"], 4)}


def rank(runs: int) -> None:
    """One of the ranks of ranks()."""
    torch.set_num_threads(1)
    with shard.world(shard.Mesh(data=int(os.environ.get("WORLD_SIZE", "1")))):
        call = stepper(SMALL, 1, 1024, 512)
        call()
        times = turns({"": call}, runs)[""]
        if shard.rank()[0] == 0:
            print(json.dumps(row(times)["median_s"]))


def ranks(runs: int = 5) -> dict[str, Any]:
    """Seconds of a step with one thread a rank and as many samples on each: one rank, then one for each core."""
    n = os.cpu_count() or 1
    start = [[sys.executable], [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]]
    found = []
    for command in start:
        done = subprocess.run([*command, __file__, "rank", str(runs)], capture_output=True, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        found.append(float(done.stdout.splitlines()[-1]))
    return {"ranks": [1, n], "seconds": [round(x, 3) for x in found], "efficiency": round(found[0] / found[1], 3)}


PARTS = {"attention": attention.rows, "packed": tokens, "depth": compile_time.depth, "loader": loader, "ranks": ranks}


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        rank(int(sys.argv[2]))
    else:
        print(json.dumps({n: part(*[20.0] * (n == "loader")) for n, part in PARTS.items()}, indent=1))
