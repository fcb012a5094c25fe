"""Language models, with pictures or without: trained on conversations, shown by questions they answer."""

import json
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mmfunc import answer, data, lora, models, packs, processor, records, shard, tree
from mmfunc.tree import Tree

LORA = r"^blocks\..*\.(q|k|v|out|gate|up|down)$"  # rule over names of dense maps


@dataclass(frozen=True)
class Rows:
    tokens: tuple[int, ...] = (1024,)  # row lengths; a micro-batch takes the shortest that fits
    patches: tuple[int, ...] = (4096,)  # patch buffer of a micro-batch, for each row length
    attention: int = 1024  # patches of an attention row of the vision tower; at least the largest frame's
    pack: int = 0  # pack the samples of a micro-batch into this many rows; 0: one row each
    balance: bool = True  # ranks with different samples get some of equal FLOPs; all are measured at the start
    long: Literal["error", "replace"] = "error"  # what a sample longer than the rows is


def model(a: Any) -> tuple[Path, Any, Any]:
    """(folder, family, Config) of what is trained."""
    return a.model, *models.family(a.model)


def batches(a: Any, family: Any, c: Any) -> data.Batches:
    """The global batches of a run by number."""
    pr = processor.load(a.model)
    encode = lambda r: processor.encode(pr, r.messages, r.images, r.videos)
    row = a.rows.attention
    prepare = lambda batch, patches: family.prepare(c, batch, patches=patches, row=min(row, patches or row))
    plan = data.Plan(a.batch, a.rows.tokens, a.rows.patches, a.accumulate, a.rows.pack, a.seed, a.rows.long)
    found, known = records.open(a.data, a.media), None
    if a.rows.balance and shard.part()[1] > 1:
        measure = lambda r: processor.measure(pr, r.messages, r.images, r.videos)
        tokens, patches = data.measured(found, measure)
        rule = (a.lora.where or LORA) if a.lora.rank else a.train
        known = packs.Known(tokens, patches, flops(family, c, tokens, patches, rule, row))
    return data.Batches(found, encode, prepare, plan, pr.text.pad, known)


def flops(family: Any, c: Any, tokens: np.ndarray, patches: np.ndarray, rule: str, row: int) -> np.ndarray:
    """What training on samples of so many tokens and patches takes, [n]: dense maps, causal attention to a sample's own
    tokens, and of patches within rows or windows; a vision tower of which the rule trains nothing runs forward only."""
    flat, own = tree.flatten(family.params(c)), getattr(c, "text", c)
    maps = {n: 2 * prod(p.shape) for n, p in flat.items() if len(p.shape) > 1}
    dense = sum(x for n, x in maps.items() if not n.startswith("vision.") and (own.tied or not n.startswith("embed.")))
    text = dense * tokens + 2 * own.layers * own.heads * own.k * tokens.astype(float) ** 2
    if own is c:
        return 3 * text
    tower = sum(x / c.merge**2 if ".merger." in n else x for n, x in maps.items() if n.startswith("vision."))
    spans = [row if i in c.full or not c.window else (c.window // c.patch) ** 2 for i in range(c.layers)]
    passes = 3 if any(re.search(rule, n) for n in flat if n.startswith("vision.")) else 1
    return 3 * text + passes * (tower + 4 * c.width * sum(spans)) * patches


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


def export(a: Any, family: Any, c: Any, params: Tree) -> None:
    """A hub folder, and a PEFT folder of low-rank paths where there are some."""
    if a.lora.rank:
        lora.export(a.out / "adapter", params, models.table(family, c), base_model=str(a.model))
    models.export(a.out / "export", family, c, lora.merge(params), like=a.model)
