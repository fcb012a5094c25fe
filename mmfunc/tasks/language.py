"""Language models, with pictures or without: trained on conversations, shown by questions they answer."""

import json
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mmfunc import answer, data, lora, models, processor, records, tree
from mmfunc.tree import Tree

LORA = r"^blocks\..*\.(q|k|v|out|gate|up|down)$"  # rule over names of dense maps


@dataclass(frozen=True)
class Rows:
    tokens: tuple[int, ...] = (1024,)  # row lengths; a micro-batch takes the shortest that fits
    patches: tuple[int, ...] = (4096,)  # patch buffer of a micro-batch, for each row length
    attention: int = 1024  # patches of an attention row of the vision tower; at least the largest frame's
    pack: int = 0  # pack the samples of a micro-batch into this many rows; 0: one row each
    long: Literal["error", "replace"] = "error"  # what a sample longer than the rows is


def load(a: Any, key: Tensor) -> tuple[Any, Any, Tree]:
    """(family, Config, this rank's part of the parameters), random ones from scratch."""
    family, c = models.family(a.model)
    return family, c, models.start(a.model, family, c, key if a.scratch else None)


def batches(a: Any, family: Any, c: Any) -> data.Batches:
    """The global batches of a run by number."""
    pr = processor.load(a.model)
    encode = lambda r: processor.encode(pr, r.messages, r.images, r.videos)
    row = a.rows.attention
    prepare = lambda batch, patches: family.prepare(c, batch, patches=patches, row=min(row, patches or row))
    plan = data.Plan(a.batch, a.rows.tokens, a.rows.patches, a.accumulate, a.rows.pack, a.seed, a.rows.long)
    return data.Batches(records.open(a.data, a.media), encode, prepare, plan, pr.text.pad)


def signatures(a: Any) -> int:
    """How many shapes of batches there may be."""
    return 4 * len(a.rows.tokens)


def show(a: Any, family: Any, c: Any, params: Tree, step: int) -> None:
    """Ask twelve questions from the whole file, for the report."""
    if not a.questions:
        return
    asked = records.open(a.questions)
    which = [data.order(0, 0, len(asked), i) for i in range(min(12, len(asked)))]
    model = answer.ready(family, c, params, processor.load(a.model))
    rows = answer.examine(model, asked, which, metric="exact", new=32, batch=12)
    with (a.out / "samples.jsonl").open("a") as f:
        f.writelines(json.dumps({"step": step, **r}) + "\n" for r in rows)


def adapter(a: Any, family: Any, c: Any, params: Tree) -> None:
    """A PEFT folder of the low-rank paths."""
    lora.export(a.out / "adapter", params, models.table(family, c), base_model=str(a.model))


def export(a: Any, family: Any, c: Any, params: Tree) -> None:
    """A hub folder."""
    models.export(a.out / "export", family, c, params, like=a.model)
