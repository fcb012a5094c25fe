"""Train a model: all of it, a part of it, LoRA adapters, or from scratch.

    python programs/train.py --model Qwen2.5-VL-7B/ --data sft.jsonl --out runs/sft --train '^blocks' --lr 1e-5
    python programs/train.py --model Qwen2.5-VL-7B/ --data sft.jsonl --out runs/lora --lora.rank 16
    torchrun --nproc-per-node 4 programs/train.py ... --mesh.fsdp 2 --mesh.tp 2     # or under Slurm: srun python ...

The same command again goes on from the newest checkpoint, on any mesh. Exit codes: 0 done, 3 bad input, 4 five updates
in a row were not finite, 5 a rank is missing, 75 stopped by SIGTERM after saving.
"""

import json
import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from mmfunc import checkpoint, data, lora, metrics, models, optim, random, relay, report, shard, tasks, tree, update
from mmfunc.profile import traced
from mmfunc.tasks.language import Rows
from mmfunc.tasks.pictures import Clips

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Lora:
    rank: int = 0  # 0: no adapters
    alpha: float | None = None  # the path is scaled by alpha / rank; None: by 1
    where: str | None = None  # rule over names of dense maps; None: the usual one


@dataclass(frozen=True)
class Args:
    model: Path  # a hub folder: config, tokenizer, processor and (without --scratch) weights; or a diffusers pipeline's
    data: Path  # records: jsonl, json, csv, a folder or tar shards; or a folder of features made by encode.py
    out: Path  # checkpoints/, metrics.jsonl, report.html, export/
    media: Path | None = None  # root of media paths; the data file's folder when absent
    scratch: bool = False  # start from random weights
    train: str = "."  # rule over parameter names: what is trained; the rest is frozen
    steps: int = 1000  # updates
    batch: int = 8  # samples of a micro-batch
    accumulate: int = 1  # micro-batches of an update
    lr: float = 1e-5
    warmup: int = 100
    decay: float = 0.0  # weight decay of matrices
    clip: float = 1.0  # limit of the gradient norm
    ema: float = 0.0  # rate of a running mean of the weights, which is then shown and exported; 0: none
    save: int = 500  # updates between checkpoints
    seed: int = 0
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the computation; parameters are kept in float32
    mode: Literal["whole", "split", "block"] = "whole"  # how the step is compiled
    backend: Literal["inductor", "eager", "npu"] = "inductor"  # npu: torchair
    device: str = "cpu"  # or cuda, npu: of parameters and steps; media are read, and encoded online, on the CPU
    remat: Literal["nothing", "attention", "dots"] | None = None  # what layers keep for the backward pass; None: all
    workers: int = 1  # loader processes; batches are the same for any number
    patience: float = 600  # seconds without progress, ten times as many for a first step, after which a rank is missing
    profile: tuple[int, int] | None = None  # from which step of this run to before which to trace into profile/
    mesh: shard.Mesh = field(default_factory=shard.Mesh)  # ranks along each axis, which torchrun starts
    stages: relay.Plan = field(default_factory=relay.Plan)  # of layers along --mesh.pp
    questions: Path | None = None  # asked at each save, for the report: records, or a file of prompts to draw
    lora: Lora = field(default_factory=Lora)
    rows: Rows = field(default_factory=Rows)  # batches of conversations
    clips: Clips = field(default_factory=Clips)  # batches of captioned pictures and videos


def start(a: Args, task: Any) -> tuple[Any, Any, Any, Any, dict]:
    """(family, Config, batches, step, training state) before the first step."""
    (folder, family, c), key = task.model(a), random.key(a.seed)
    declared, rule = family.params(c), a.train
    if a.lora.rank:
        declared, rule = lora.LoRA(declared, a.lora.rank, a.lora.where or task.LORA, a.lora.alpha), lora.TRAINED
    rate = optim.warmup(a.warmup, optim.cosine(a.lr, max(a.steps - a.warmup, 1), 0.01 * a.lr))
    parts = [optim.clip(a.clip), optim.adamw(0.9, 0.98), optim.decay(a.decay), optim.scale(rate)]
    tx = optim.accumulate(a.accumulate, optim.chain(*parts, *([optim.ema(a.ema)] if a.ema else [])))
    shard.declare(declared)
    source, shapes = task.batches(a, family, c), tree.split(shard.place(tree.abstract(declared)), rule)
    first = lambda: tree.put(source[0][0][0], a.device)
    step = update.step(lambda p, batch: family.loss(p, c, batch), tx, *shapes, first, a.mesh.pp, a.stages,
                       compute=DTYPES[a.dtype], mode=a.mode, backend=a.backend, buckets=task.signatures(a),
                       remat=a.remat)
    params = models.start(folder, declared, key, a.device, scratch=a.scratch)
    return family, c, source, step, optim.init(tx, *tree.split(params, rule), fp16=a.dtype == "fp16")


def main(a: Args) -> int:
    relay.check(a.mesh.pp, a.stages, a.mode)
    with shard.world(a.mesh, a.device, flags=a, files=["model", "data"], out=a.out, patience=a.patience) as job:
        return run(a, job)


def run(a: Args, job: shard.Job) -> int:
    task = tasks.of(a.model)
    family, c, source, step, state = start(a, task)
    apart = "out", "workers", "save", "questions", "mesh", "stages", "patience", "device", "profile"  # free to change
    meta = json.loads(json.dumps({k: v for k, v in asdict(a).items() if k not in apart}, default=str))
    state, skipped = checkpoint.resume(a.out / "checkpoints", state, meta)
    if done := int(state["step"]) // a.accumulate:
        print(*[f"skipped: {w}" for w in skipped], f"going on after update {done}", sep="\n")
    out = a.out / f"rank-{job.rank}" if job.rank else a.out  # the first rank's log is the run's
    watch = data.Watch(out / "bad_samples.jsonl")
    with metrics.Log(out, a.steps, metrics.config(asdict(a), a.device), resume=done, device=a.device) as log:
        saver = checkpoint.Saver(a.out / "checkpoints", failed=partial(log.failed, "save failed"))

        def save(n: int) -> Any:
            with log.time("checkpoint"):
                return saver(n, state, meta)

        items = log.each("data_wait", data.stream(source, done, a.steps, a.workers, watch))
        items = job.steps(items, done, save, ahead=a.backend != "eager")
        for number, micro, facts in traced(items, a.profile, out / "profile", a.device):
            with log.time("data_wait"):
                micro, facts = data.complete(source, number, micro, facts, watch)
            with log.time("compute"):
                state, told = step(state, micro)
                told = {k: v.item() for k, v in told.items()}
            log(number + 1, told | facts.get("told", {}), tokens=facts["tokens"], samples=facts["samples"])
            if not told["finite"]:
                log.event("not finite", ids=facts["ids"])
            if told["in_a_row"] >= 5:
                print("five updates in a row were not finite; see metrics.jsonl for their samples", file=sys.stderr)
                return 4
            if (number + 1) % a.save == 0 or number + 1 == a.steps:
                job.save(number + 1)
                with log.time("checkpoint"):
                    job.alone(task.show, a, family, c, result(a, state), number + 1)
                    report.write(out)
        saver.close(strict=job.stopped)  # exit code 75 says that all is saved
        if job.stopped:
            return 75
        for entry in step.stats():
            log.event("compile", **entry)
    report.write(out)
    job.alone(task.export, a, family, c, result(a, state))
    return 0


def result(a: Args, state: tree.Tree) -> tree.Tree:
    """The whole parameters that training has arrived at, or their running mean."""
    return shard.whole(tree.merge(optim.averaged(state), state["frozen"]) if a.ema else optim.full(state))


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Args)))
    except (ValueError, FileNotFoundError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(3)
