"""Compilation: CPU seconds by depth in block mode, and how soon a second start of the demo takes its first step.

    python benchmarks/compile_time.py depth              # 4 and 80 layers, each in a process with an empty cache
    python benchmarks/compile_time.py start runs/demo block    # or whole: the demo's program, cold and then warm

CPU seconds count this process and the compilers it starts. Prints a JSON line.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from mmfunc import jit, optim, random, tree
from mmfunc.models import qwen2

PROGRAM = Path(__file__).parent.parent / "programs" / "train.py"


def spent() -> float:
    """CPU seconds of this process and of its children that have ended."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in both)


def first_step(layers: int) -> dict:
    """The first training step of a decoder in block mode, less what a second one takes."""
    c = replace(qwen2.PRESETS["tiny"], layers=layers)
    tx = optim.chain(optim.clip(1.0), optim.adamw(), optim.scale(1e-3))
    state = optim.init(tx, tree.init(qwen2.params(c), random.key(0)))
    ids = torch.randint(0, c.vocab, (2, 64), generator=torch.Generator().manual_seed(0))
    step = jit.jit(partial(optim.step, lambda p, b: qwen2.loss(p, c, b), tx), "block", donate=True)
    times = [spent()]
    for _ in range(2):
        step(state, {"input_ids": ids, "labels": ids})
        times.append(spent())
    return {"layers": layers, "compile_cpu_s": round(2 * times[1] - times[0] - times[2], 1)}


def alone(*args: str, cache: str) -> str:
    """What a process of its own, with this compile cache, prints last."""
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    done = subprocess.run([sys.executable, *args], env=env, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


def depth() -> dict:
    """Compile CPU seconds of each depth."""
    rows = []
    for layers in (4, 80):
        with tempfile.TemporaryDirectory() as cache:
            rows.append(json.loads(alone(__file__, "one", str(layers), cache=cache)))
    return {"what": "compile CPU seconds in block mode by depth", "rows": rows,
            "ratio": round(rows[-1]["compile_cpu_s"] / rows[0]["compile_cpu_s"], 3)}


def start(run: str, mode: str) -> dict:
    """Seconds from the start of the demo's training program to the end of its first step."""
    said = (f"--model {run}/model --data {run}/data/train.jsonl --mode {mode} --scratch --steps 1 --batch 96 --lr 3e-3 "
            "--decay 0.05 --save 9 --rows.tokens 28 --rows.patches 3072 --rows.attention 64").split()
    times = []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(3):
            out = Path(folder) / str(i)
            begun = time.time()
            alone(str(PROGRAM), *said, "--out", str(out), cache=f"{folder}/cache")
            row = next(r for r in map(json.loads, (out / "metrics.jsonl").open()) if "loss" in r)
            times.append(round(row["time"] - begun, 1))
    return {"what": f"seconds to the first step of the demo, mode {mode}", "cold": times[0], "warm": times[1:]}


if __name__ == "__main__":
    kind = sys.argv[1] if len(sys.argv) > 1 else "depth"
    made = {"depth": depth, "one": partial(first_step, int(sys.argv[2]) if kind == "one" else 0),
            "start": partial(start, *map(str, sys.argv[2:4]))}[kind]()
    print(json.dumps(made | {"torch": torch.__version__}))
