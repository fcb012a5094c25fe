"""Train a model: all of it, a part of it, LoRA adapters, or from scratch.

    python programs/train.py --model Qwen2.5-VL-7B/ --data sft.jsonl --out runs/sft --train '^blocks' --lr 1e-5
    python programs/train.py --model Qwen2.5-VL-7B/ --data sft.jsonl --out runs/lora --lora.rank 16

Running the same command again goes on from the newest checkpoint. Exit codes: 0 done, 3 bad input, 4 five updates in a
row were not finite, 75 stopped by SIGTERM after saving.
"""

import signal
import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro

from mmfunc import answer, checkpoint, data, jit, lora, metrics, models, optim, processor, random, report, tree

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Lora:
    rank: int = 0  # 0: no adapters
    alpha: float | None = None  # scale is alpha / rank; None: equal to rank
    where: str = r"^blocks\..*\.(q|k|v|out|gate|up|down)$"  # rule over names of dense maps


@dataclass(frozen=True)
class Data:
    tokens: tuple[int, ...] = (1024,)  # token buckets; a batch is padded to the smallest that fits
    patches: tuple[int, ...] = (4096,)  # patches of a micro-batch, one number for each token bucket
    pack: bool = False  # put several samples in one row, apart by segment ids
    workers: int = 0  # loader processes; the batches are the same for any number
    root: Path | None = None  # media root; the folder of the data file when absent
    evaluate: Path | None = None  # questions that are asked at each save, for the report


@dataclass(frozen=True)
class Args:
    model: Path  # a hub folder: config, tokenizer, processor and (without --scratch) weights
    data: Path  # records: jsonl, json, csv, a folder or tar shards
    out: Path  # checkpoints, metrics.jsonl, report.html, export/
    scratch: bool = False  # start from random weights
    train: str = "."  # rule over parameter names: what is trained; the rest is frozen
    steps: int = 1000  # parameter updates
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
    remat: Literal["nothing", "dots", "attention"] | None = None  # what layers keep for the backward pass; None: all
    lora: Lora = field(default_factory=Lora)
    records: Data = field(default_factory=Data)
