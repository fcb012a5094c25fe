"""Encoded samples on disk: what a diffusion model reads, made ahead of time; safetensors shards with their rows.

part-00000.safetensors and part-00000.jsonl hold some samples each, one row a sample; texts that a part repeats are kept
once. index.json comes last: a folder without it is not finished, and writing goes on behind its whole parts.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmfunc import shard
from mmfunc.hub import sync
from mmfunc.metrics import replace

OWN, TEXT = "own", "text"  # what belongs to a sample, and what to its caption


def digest(*folders: Path) -> str:
    """xxh3-128 of the weights and configs in folders: which encoders made the features."""
    h = xxhash.xxh3_128()
    for folder in folders:
        for file in sorted(f for f in Path(folder).rglob("*") if f.suffix in (".json", ".safetensors", ".bin")):
            h.update(file.name.encode())
            with file.open("rb") as f:
                while block := f.read(1 << 24):
                    h.update(block)
    return h.hexdigest()


def done(folder: Path) -> int:
    """How many parts of a folder are whole."""
    n = 0
    while (Path(folder) / f"part-{n:05d}.jsonl").exists():
        n += 1
    return n


Row = tuple[dict, dict[str, Tensor], str, dict[str, Tensor]]  # facts, own tensors, caption, the caption's tensors


def finite(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a sample; values that are not finite are a ValueError."""
    if odd := [k for k, t in tensors.items() if not torch.isfinite(t).all()]:
        raise ValueError(f"{name}: {odd[0]} has values that are not finite")
    return tensors


def attempt(fn: Callable, *args: Any) -> Any:
    """What fn gives, or a ValueError that says why a sample cannot be used."""
    try:
        return fn(*args)
    except (ValueError, OSError) as e:
        return ValueError(str(e))


def write_part(folder: Path, number: int, rows: Iterable[Row]) -> int:
    """Write one part; the number of its samples."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    texts: dict[str, int] = {}
    said = []
    for i, (row, own, caption, words) in enumerate(rows):
        tensors |= {f"{OWN}.{i}.{k}": t.contiguous() for k, t in own.items()}
        if caption not in texts:
            tensors |= {f"{TEXT}.{len(texts)}.{k}": t.contiguous() for k, t in words.items()}
        said.append(row | {"caption": caption, "text": texts.setdefault(caption, len(texts))})
    file = folder / f"part-{number:05d}.safetensors"
    temporary = file.with_suffix(".tmp")
    save_file(tensors, temporary)
    sync(temporary)
    os.replace(temporary, file)
    replace(file.with_suffix(".jsonl"), "".join(json.dumps(r) + "\n" for r in said))
    return len(said)


def begin(folder: Path, said: dict[str, Any]) -> int:
    """How many parts of a folder are whole, which is begun, or was with what is said now."""
    file = Path(folder) / "encoding.json"
    if file.exists() and json.loads(file.read_text()) != said:
        raise ValueError(f"{folder} was begun with {file.read_text()}, now it is {said}")
    replace(file, json.dumps(said))
    return done(folder)


def write(folder: Path, source: Any, parts: Sequence[int], size: int, each: Callable = map) -> int:
    """Write parts of so many samples; how many samples could not be used. each: map, or what lets ranks take turns.

    Samples that cannot be used are noted; more than a hundredth of all are a ValueError.
    """
    def encode(n: int) -> list[dict]:
        bad: list[dict] = []
        write_part(folder, n, _usable(source, range(n * size, min((n + 1) * size, len(source))), bad))
        return bad

    bad: list[dict] = []
    for found in each(encode, parts):
        bad += found
        shard.alone(_note, Path(folder) / "bad_samples.jsonl", found)
        if len(bad) > 0.01 * len(source):
            raise ValueError(f"{len(bad)} of {len(source)} samples could not be used; see {folder}/bad_samples.jsonl. "
                             f"The last: {bad[-1]['reason']}")
    return len(bad)


def _usable(source: Any, which: range, bad: list[dict]) -> Iterator[Row]:
    """Encoded samples; those that cannot be used are noted."""
    for i in which:
        try:
            yield source.row(i)
        except (ValueError, OSError) as e:
            bad.append({"index": i, "reason": str(e)})


def _note(file: Path, bad: list[dict]) -> None:
    with file.open("a") as f:
        f.writelines(json.dumps(b) + "\n" for b in bad)


def finish(folder: Path, said: dict[str, Any], empty: dict[str, Tensor]) -> None:
    """Write index.json with what made the features, and the features of an empty caption."""
    save_file({k: t.contiguous() for k, t in empty.items()}, Path(folder) / "empty.safetensors")
    replace(Path(folder) / "index.json", json.dumps({"format": 1, "parts": done(folder), **said}, indent=2) + "\n")


class Ahead:
    """The samples of a folder by number: source[i] -> (id, tensors)."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        index = self.folder / "index.json"
        if not index.exists():
            raise ValueError(f"{folder} is no finished folder of features: it has {done(folder)} parts and no "
                             "index.json; run programs/encode.py again, it goes on behind them")
        self.said = json.loads(index.read_text())
        self.rows = [(n, i, row) for n in range(self.said["parts"])
                     for i, row in enumerate(map(json.loads, (self._part(n, "jsonl")).read_text().splitlines()))]
        self.sizes = [tuple(s) for s in self.said["sizes"]]
        self.place = [self.sizes.index(tuple(row["size"])) for _, _, row in self.rows]
        self.names: dict[int, dict] = {}
        self.open: dict[str, Any] = {}  # files, in the process that reads them

    def _part(self, number: int, ending: str) -> Path:
        return self.folder / f"part-{number:05d}.{ending}"

    def _file(self, path: Path) -> Any:
        key = f"{os.getpid()}:{path.name}"
        if key not in self.open:
            self.open[key] = safe_open(path, "pt")
        return self.open[key]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[str, dict[str, Tensor]]:
        part, own, row = self.rows[i]
        f = self._file(self._part(part, "safetensors"))
        keys = self._names(part, f)
        both = keys[f"{OWN}.{own}"] | keys[f"{TEXT}.{row['text']}"]
        return row["id"], finite(row["id"], {name: f.get_tensor(key) for name, key in both.items()})

    def _names(self, part: int, f: Any) -> dict[str, dict[str, str]]:
        """Of each sample and text of a part, {name: its key in the file}."""
        if part not in self.names:
            found: dict[str, dict[str, str]] = {}
            for key in f.keys():
                kind, number, name = key.split(".", 2)
                found.setdefault(f"{kind}.{number}", {})[name] = key
            self.names[part] = found
        return self.names[part]

    def empty(self) -> dict[str, Tensor]:
        """The features of an empty caption."""
        f = self._file(self.folder / "empty.safetensors")
        return {k: f.get_tensor(k) for k in f.keys()}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"open": {}}


def caption(r: Any) -> str:
    """What a record says of its picture or video: the assistant's last words."""
    said = r.messages[-1]
    if said["role"] != "assistant" or not isinstance(said["content"], str):
        raise ValueError(f"{r.id} has no caption")
    return said["content"]
