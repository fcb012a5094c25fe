"""Model folders as the Hugging Face hub has them: read by slices, written in shards, strict on both sides.

config.json, model.safetensors (diffusers: diffusion_pytorch_model.safetensors) or shards with an index, and the files
of tokenizer and processor beside them. Older .bin files are read through torch.load(weights_only=True) only: nothing
here can run code.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmfunc import keys, tree
from mmfunc.tree import Tree

CARRIED = ("*.jinja", "tokenizer*", "vocab.json", "merges.txt", "*preprocessor_config.json", "processor_config.json",
           "chat_template.json", "generation_config.json", "special_tokens_map.json", "added_tokens.json", "LICENSE*")
SHARD = 5_000_000_000  # bytes of a weights file
NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.bin",
         "model.pth")  # of a weights file; shards have an index beside them


def config(folder: Path) -> dict:
    """The config.json of a folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; give a model folder with config.json and *.safetensors")
    file = folder / "config.json"
    if not file.exists():
        raise FileNotFoundError(
            f"{folder} has no config.json; it has {', '.join(sorted(os.listdir(folder))[:8]) or 'no files'}"
        )
    return settings(file)


def settings(file: Path) -> dict:
    """What a JSON file says; nothing where there is none."""
    try:
        return json.loads(file.read_text()) if file.exists() else {}
    except json.JSONDecodeError as e:
        raise ValueError(f"{file} is no valid JSON: {e}") from e


def files(folder: Path) -> list[Path]:
    """The weights files of a folder."""
    folder = Path(folder)
    for index in (f"{n}.index.json" for n in NAMES):
        if (folder / index).exists():
            names = sorted(set(json.loads((folder / index).read_text())["weight_map"].values()))
            if bad := [n for n in names if Path(n).name != n]:
                raise ValueError(f"{folder / index} points outside its folder: {bad[0]!r}")
            if gone := [n for n in names if not (folder / n).exists()]:
                raise FileNotFoundError(f"{folder / index} names {gone[0]}, which is not there")
            return [folder / n for n in names]
    for name in NAMES:
        if (folder / name).exists():
            return [folder / name]
    raise FileNotFoundError(
        f"{folder} has no weights: neither {' nor '.join(NAMES[:2])} nor an index of shards; to start from random "
        "weights, say so explicitly"
    )


def _opened(file: Path, stack: ExitStack) -> tuple[dict[str, tuple[int, ...]], Callable[[str], Tensor]]:
    """Shapes of the tensors of a file, and what reads one by slices."""
    if file.suffix == ".safetensors":
        try:
            f = stack.enter_context(safe_open(file, "pt"))
        except SafetensorError as e:
            raise ValueError(f"{file} is broken: {e}") from e
        return {k: tuple(f.get_slice(k).get_shape()) for k in f.keys()}, f.get_slice
    try:
        loaded = torch.load(file, weights_only=True, mmap=True, map_location="cpu")
    except Exception as e:  # whatever it is, the file is refused
        raise ValueError(f"{file} cannot be read as plain tensors: {str(e).splitlines()[0]}") from e
    return {k: tuple(t.shape) for k, t in loaded.items()}, loaded.__getitem__


def read(folder: Path, params: Tree, table: keys.Table, *, spellings: dict[str, str] | None = None,
         dtype: torch.dtype | None = None, wide: str | None = None, device: str = "cpu",
         boxes: keys.Boxes | None = None) -> Tree:
    """The tensors that params declare, read by slices; every tensor on both sides must find its place.

    spellings: other prefixes of their names and what they stand for. dtype: None keeps the file's; wide: a rule over
    our names, whose tensors get 32 bits when the dtype has fewer. boxes: which part of each is wanted.
    """
    declared = tree.flatten(params)
    more = lambda name: dtype and wide and re.search(wide, name)
    kind = lambda name, t: torch.promote_types(dtype, torch.float32) if more(name) else dtype or t.dtype
    places = keys.lookup(declared, table)
    with ExitStack() as stack:
        shapes, readers, real = {}, {}, {}
        for file in files(folder):
            found, reader = _opened(file, stack)
            for name, shape in found.items():
                said = respelled(name, spellings or {})
                if said in shapes:
                    raise ValueError(f"{said} is twice in {folder}")
                shapes[said], readers[said], real[said] = shape, reader, name
        keys.check(declared, places, shapes)
        get = lambda name: readers[name](real[name])
        out = {name: t if t.is_meta else t.to(device=device, dtype=kind(name, t))
               for name, t in keys.load(declared, places, get, boxes)}
        claimed = {p.name for p in places.values()}
        for name, place in places.items():
            if place.copy in shapes and place.copy not in claimed and not out[name].is_meta and not torch.equal(
                    get(place.copy)[(boxes or {}).get(name, ...)].to(device, out[name].dtype), out[name]):
                raise ValueError(f"{place.copy} in {folder} differs from {place.name}, to which the config ties it")
    return tree.unflatten(out, params)


def respelled(name: str, spellings: dict[str, str]) -> str:
    """A name with its prefix as the table has it."""
    return next((new + name[len(old):] for old, new in spellings.items() if name.startswith(old)), name)


def write(folder: Path, tensors: Tree, params: Tree, table: keys.Table, config: dict, *, like: Path | None = None,
          dtype: torch.dtype | None = None, shard: int = SHARD) -> None:
    """Write a hub folder: config.json, weights in shards, and the tokenizer's and processor's files of the folder
    `like`.

    It appears whole or not at all. An existing folder is replaced.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    flat = tree.flatten(tensors)
    places = keys.lookup(tree.flatten(params), table)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        cast = {n: t.detach().to(device="cpu", dtype=dtype or t.dtype) for n, t in flat.items()}
        diffusers = "_class_name" in config  # its config.json has no dtype
        _write_weights(temporary, keys.export(cast, places), shard, "diffusion_pytorch_model" if diffusers else "model")
        kind = str(dtype or next(iter(flat.values())).dtype).removeprefix("torch.")
        said = config if diffusers else config | {"dtype": kind, "torch_dtype": kind}
        (temporary / "config.json").write_text(json.dumps(said, indent=2) + "\n")
        for file in sorted({f for pattern in CARRIED for f in Path(like).glob(pattern)}) if like else ():
            shutil.copyfile(file, temporary / file.name)
        for file in temporary.iterdir():
            sync(file)
        temporary.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_weights(folder: Path, tensors: Iterator[tuple[str, Tensor]], limit: int, stem: str) -> None:
    shards: list[dict[str, int]] = []
    part: dict[str, Tensor] = {}

    def close() -> None:
        save_file(part, folder / f"part-{len(shards)}", {"format": "pt"})
        shards.append({n: t.nbytes for n, t in part.items()})
        part.clear()

    for name, t in tensors:
        if part and sum(x.nbytes for x in part.values()) + t.nbytes > limit:
            close()
        part[name] = t.contiguous()
    close()
    if len(shards) == 1:
        (folder / "part-0").rename(folder / f"{stem}.safetensors")
        return
    index = {}
    for i, names in enumerate(shards):
        file = f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{i}").rename(folder / file)
        index |= dict.fromkeys(names, file)
    total = {"total_size": sum(sum(s.values()) for s in shards)}
    said = {"metadata": total, "weight_map": index}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(said, indent=2))


def sync(path: Path) -> None:
    """Make sure that a file or a folder's list is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
