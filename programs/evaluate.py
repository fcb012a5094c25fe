"""Score a model folder on questions with known answers.

    python programs/evaluate.py --model runs/sft/export --data questions.jsonl --out runs/sft/evaluation --metric anls

Questions are records (messages whose last turn is the truth, or question and answer(s), options, kind). Writes
rows.jsonl, a row a question, results.json and report.html; OUT may be the folder of the run. Ranks that torchrun or
Slurm starts take batches in turn.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from mmfunc import answer, records, report, score, shard


@dataclass(frozen=True)
class Args:
    model: Path  # a hub folder
    data: Path  # records
    out: Path  # rows.jsonl, results.json, report.html
    metric: Literal["exact", "relaxed", "anls", "choice"] = "exact"
    adapter: Path | None = None  # a PEFT folder
    media: Path | None = None  # root of media paths; the data file's folder when absent
    batch: int = 16  # questions at once
    new: int = 64  # tokens of an answer at most
    limit: int = 0  # only so many questions; 0: all
    dtype: Literal["fp32", "bf16"] = "fp32"
    int8: bool = False  # weights of the decoder: half of bf16's bytes, which bound the time of a token
    backend: Literal["eager", "inductor", "npu"] = "eager"
    device: str = "cpu"  # or cuda, npu


def main(a: Args) -> None:
    with shard.world(device=a.device, flags=a, files=["model", "data"], out=a.out) as job:
        dtype = torch.bfloat16 if a.dtype == "bf16" else torch.float32
        m = answer.load(a.model, adapter=a.adapter, dtype=dtype, backend=a.backend, device=a.device, int8=a.int8)
        asked = records.open(a.data, a.media)
        which = range(len(asked))[: a.limit or None]
        rows = answer.examine(m, asked, which, metric=a.metric, new=a.new, batch=a.batch, each=job.each)
        shard.alone(write, a, rows)


def write(a: Args, rows: list[dict]) -> None:
    """Rows and results as files."""
    a.out.mkdir(parents=True, exist_ok=True)
    (a.out / "rows.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    results = {"model": str(a.model), "data": str(a.data), "metric": a.metric, **score.table(rows)}
    (a.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    report.write(a.out)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except (ValueError, FileNotFoundError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(3)
