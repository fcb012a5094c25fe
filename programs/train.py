"""Train a model: all of it, a part of it, LoRA adapters, or from scratch.

    python programs/train.py --model Qwen2.5-VL-7B/ --data sft.jsonl --out runs/sft --train '^blocks' --lr 1e-5
    python programs/train.py --model Qwen2.5-VL-7B/ --data sft.jsonl --out runs/lora --lora.rank 16

The same command again goes on from the newest checkpoint. Exit codes: 0 done, 3 bad input, 4 five updates in a row
were not finite, 75 stopped by SIGTERM after saving.
"""

import json
import signal
import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from mmfunc import answer, checkpoint, data, jit, lora, metrics, models, optim, processor, random, records, report, tree

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Lora:
    rank: int = 0  # 0: no adapters
    alpha: float | None = None  # the path is scaled by alpha / rank; None: by 1
    where: str = r"^blocks\..*\.(q|k|v|out|gate|up|down)$"  # rule over names of dense maps


@dataclass(frozen=True)
class Rows:
    tokens: tuple[int, ...] = (1024,)  # row lengths; a micro-batch takes the shortest that fits
    patches: tuple[int, ...] = (4096,)  # patch buffer of a micro-batch, for each row length
    attention: int = 1024  # patches of an attention row of the vision tower; at least the largest frame's
    pack: int = 0  # pack the samples of a micro-batch into this many rows; 0: one row each
    long: Literal["error", "replace"] = "error"  # what a sample longer than the rows is


@dataclass(frozen=True)
class Args:
    model: Path  # a hub folder: config, tokenizer, processor and (without --scratch) weights
    data: Path  # records: jsonl, json, csv, a folder or tar shards
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
    save: int = 500  # updates between checkpoints
    seed: int = 0
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the computation; parameters are kept in float32
    mode: Literal["whole", "split", "block"] = "whole"  # how the step is compiled
    backend: Literal["inductor", "eager"] = "inductor"
    remat: Literal["nothing", "attention", "dots"] | None = None  # what layers keep for the backward pass; None: all
    workers: int = 1  # loader processes; batches are the same for any number
    questions: Path | None = None  # asked at each save, for the report
    lora: Lora = field(default_factory=Lora)
    rows: Rows = field(default_factory=Rows)


def start(a: Args) -> tuple[Any, Any, dict, optim.Transform]:
    """(family, Config, training state, optimizer) before the first step."""
    family, c = models.family(a.model)
    declared = family.params(c)
    params = tree.init(declared, random.key(a.seed)) if a.scratch else models.load(a.model, torch.float32)[2]
    if a.lora.rank:
        declared = lora.LoRA(declared, a.lora.rank, a.lora.where, a.lora.alpha)
        params = tree.merge(params, tree.init(tree.select(declared, r"\.lora_"), random.key(a.seed)))
    trained = tree.select(params, lora.TRAINED if a.lora.rank else a.train)
    rate = optim.warmup(a.warmup, optim.cosine(a.lr, max(a.steps - a.warmup, 1), 0.01 * a.lr))
    tx = optim.chain(optim.clip(a.clip), optim.adamw(0.9, 0.98), optim.decay(a.decay), optim.scale(rate))
    tx = optim.accumulate(a.accumulate, tx)
    return family, c, optim.init(tx, trained, tree.without(params, trained), fp16=a.dtype == "fp16"), tx


def batches(a: Args, family: Any, c: Any) -> data.Batches:
    pr = processor.load(a.model)
    encode = lambda r: processor.encode(pr, r.messages, r.images, r.videos)
    row = a.rows.attention
    prepare = lambda batch, patches: family.prepare(c, batch, patches=patches, row=min(row, patches or row))
    plan = data.Plan(a.batch, a.rows.tokens, a.rows.patches, a.accumulate, a.rows.pack, a.seed, a.rows.long)
    return data.Batches(records.open(a.data, a.media), encode, prepare, plan, pr.text.pad)


def main(a: Args) -> int:
    family, c, state, tx = start(a)
    settings = {k: v for k, v in asdict(a).items() if k not in ("out", "workers", "save", "questions")}
    meta = json.loads(json.dumps(settings, default=str))
    found = checkpoint.restore(a.out / "checkpoints", state)
    if found:
        checkpoint.same(found[1], meta)
        state, done = found[0], int(found[0]["step"]) // a.accumulate
        print(*[f"skipped: {w}" for w in found[2]], f"going on after update {done}", sep="\n")
    done = int(state["step"]) // a.accumulate
    loss = lambda p, batch: family.loss(p, c, batch)
    step = jit.jit(partial(optim.step, loss, tx, compute=DTYPES[a.dtype]), a.mode, a.backend, donate=True,
                   buckets=4 * len(a.rows.tokens), remat=a.remat)
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    source, watch = batches(a, family, c), data.Watch(a.out / "bad_samples.jsonl")
    saver = checkpoint.Saver(a.out / "checkpoints")
    with metrics.Log(a.out, a.steps, metrics.config(asdict(a)), resume=done) as log:
        for number, micro, facts in _timed(data.stream(source, done, a.steps, a.workers), log):
            watch(number, facts)
            with log.time("compute"):
                for batch in micro:
                    state, told = step(state, batch)
                told = {k: v.item() for k, v in told.items()}
            log(number + 1, told, tokens=facts["tokens"], samples=facts["samples"])
            if not told["finite"]:
                log.event("not finite", ids=facts["ids"])
            if told["in_a_row"] >= 5:
                print("five updates in a row were not finite; see metrics.jsonl for their samples", file=sys.stderr)
                return 4
            if (number + 1) % a.save == 0 or number + 1 == a.steps or stopped:
                with log.time("checkpoint"):
                    _told(partial(saver, number + 1, state, meta), log)
                    show(a, family, c, optim.full(state), number + 1)
            if stopped:
                saver.close()
                return 75
        _told(saver.close, log)
        for entry in step.stats():
            log.event("compile", **entry)
    report.write(a.out)
    params = optim.full(state)
    if a.lora.rank:
        lora.export(a.out / "adapter", params, models.table(family, c), base_model=str(a.model))
    models.export(a.out / "export", family, c, lora.merge(params), like=a.model)
    return 0


def show(a: Args, family: Any, c: Any, params: tree.Tree, step: int) -> None:
    """Ask twelve questions from the whole file, and rewrite the report."""
    if a.questions:
        asked = records.open(a.questions)
        which = [data.order(0, 0, len(asked), i) for i in range(min(12, len(asked)))]
        rows = answer.examine(
            answer.ready(family, c, params, processor.load(a.model)), asked, which, metric="exact", new=32, batch=12
        )
        with (a.out / "samples.jsonl").open("a") as f:
            f.writelines(json.dumps({"step": step, **r}) + "\n" for r in rows)
    report.write(a.out)


def _told(save: Any, log: metrics.Log) -> None:
    """Training goes on when a checkpoint cannot be written; it is told, and the earlier ones are intact."""
    try:
        save()
    except checkpoint.SaveError as e:
        log.event("save failed", reason=str(e))
        print(e, file=sys.stderr)


def _timed(stream: Any, log: metrics.Log) -> Any:
    """The items of a stream, the waiting for each counted as data wait."""
    stream = iter(stream)
    while True:
        with log.time("data_wait"):
            item = next(stream, None)
        if item is None:
            return
        yield item


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Args)))
    except (ValueError, FileNotFoundError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(3)
