"""Check a model folder, merge adapters into it, cast it, and write it in shards.

    python programs/convert.py --model Qwen2.5-VL-7B/ --adapter runs/lora/adapter --out merged/ --dtype bf16
    python programs/convert.py --model FLUX.1-dev/ --adapter pytorch_lora_weights.safetensors --out merged/

Without --out it only checks: every tensor's name and shape, finite values, the tokenizer against the embedding.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from mmfunc import bundle, hub, lora, models, text, tree

DTYPES = {"keep": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Args:
    model: Path  # a hub folder, or a diffusers pipeline's
    out: Path | None = None  # the folder to write
    adapter: Path | None = None  # merged into the weights: PEFT's folder; of a pipeline diffusers' or ComfyUI's file
    dtype: Literal["keep", "fp32", "bf16", "fp16"] = "keep"
    shard: float = 5.0  # GB of a weights file at most; a pipeline's have 5


def check(folder: Path, family: str, params: tree.Tree) -> Table:
    """What a folder holds; a value that is not finite, or a token beyond the embedding, is a ValueError."""
    bad = [n for n, t in tree.flatten(params).items() if not torch.isfinite(t).all()]
    if bad:
        raise ValueError(f"{len(bad)} tensors of {folder} have values that are not finite, such as {bad[0]}")
    table = Table("what", "value", title=str(folder))
    table.add_row("family", family)
    table.add_row("parameters", f"{tree.size(params):,}")
    table.add_row("bytes", f"{tree.nbytes(params):,}")
    table.add_row("dtypes", ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tree.leaves(params)})))
    if (folder / "tokenizer.json").exists():
        most, rows = text.load(folder).tokenizer.get_vocab_size(), params["embed"]["weight"].shape[0]
        if most > rows:
            raise ValueError(f"the tokenizer of {folder} has {most} tokens, the embedding {rows} rows")
        table.add_row("tokens / rows of the embedding", f"{most} / {rows}")
    return table


def pipeline(a: Args) -> None:
    """The same of a pipeline's folder, part by part; what diffusers keeps in float32 stays so."""
    pipe = bundle.load(a.model, dtype=DTYPES[a.dtype])
    pipe = bundle.adapted(pipe, a.adapter) if a.adapter else pipe
    for name, part in bundle.parts(pipe).items():
        Console().print(check(a.model / name, part.family.__name__.rpartition(".")[2], part.params))
    if a.out:
        bundle.export(a.out, pipe)
        print(f"written to {a.out}")


def main(a: Args) -> None:
    if (a.model / "model_index.json").exists():
        return pipeline(a)
    family, c, params = models.load(a.model, DTYPES[a.dtype])
    if a.adapter:
        table, spelled = models.table(family, c), models.spellings(family, c)
        params = lora.merge(lora.load(a.adapter, family.params(c), params, table, spelled)[1])
    Console().print(check(a.model, family.__name__.rpartition(".")[2], params))
    if a.out:
        hub.write(a.out, params, family.params(c), models.table(family, c), hub.config(a.model), like=a.model,
                  shard=int(a.shard * 1e9))
        print(f"written to {a.out}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except (ValueError, FileNotFoundError) as e:
        sys.exit(f"error: {e}")
