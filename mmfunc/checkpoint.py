"""Training state on disk: safetensors and a manifest with checksums, written aside, synced, then renamed.

A folder step-00000042 exists whole or not at all; restore takes the newest one whose every byte matches its checksum,
before a tensor of it is used. Tensors are stored by dotted name. No file of a state is a pickle.
"""

import json
import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmfunc import tree
from mmfunc.hub import sync
from mmfunc.tree import Tree

PART = 5_000_000_000  # bytes of a file
BLOCK = 1 << 24  # bytes hashed at a time


class SaveError(OSError):
    """A checkpoint that could not be written; earlier ones are as they were."""


def steps(root: Path) -> list[int]:
    """Steps that have a folder, oldest first."""
    found = (re.fullmatch(r"step-(\d+)", p.name) for p in Path(root).iterdir()) if Path(root).is_dir() else ()
    return sorted(int(m[1]) for m in found if m)


def place(root: Path, step: int) -> Path:
    """The folder of a step."""
    return Path(root) / f"step-{step:08d}"


def digest(file: Path) -> str:
    """xxh3-128 of a file."""
    h = xxhash.xxh3_128()
    with open(file, "rb") as f:
        while block := f.read(BLOCK):
            h.update(block)
    return h.hexdigest()


def save(root: Path, step: int, state: Tree, meta: dict[str, Any], *, keep: int = 3) -> Path:
    """Write the tensors of a state and meta (JSON); then remove all but the newest `keep` steps."""
    root = Path(root)
    temporary = root / f".tmp-{step}-{os.getpid()}"
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        _fill(temporary, step, tree.flatten(state), meta)
        final = place(root, step)
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
        sync(root)
    except OSError as e:
        shutil.rmtree(temporary, ignore_errors=True)
        raise SaveError(f"the checkpoint of step {step} could not be written to {root}: {e}") from e
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in steps(root)[:-keep] if keep else ():
        shutil.rmtree(place(root, old), ignore_errors=True)
    return final


def _fill(folder: Path, step: int, flat: dict[str, Tensor], meta: dict[str, Any]) -> None:
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, t in flat.items():
        if parts[-1] and size + t.nbytes > PART:
            parts.append({})
            size = 0
        parts[-1][name] = t.detach().cpu().contiguous()
        size += t.nbytes
    files = {}
    for i, part in enumerate(parts):
        file = folder / f"state-{i}.safetensors"
        try:
            save_file(part, file)
        except Exception as e:  # safetensors wraps a full disk in an error of its own
            raise OSError(str(e)) from e
        sync(file)
        files[file.name] = {"bytes": file.stat().st_size, "xxh3_128": digest(file)}
    said = {"format": 1, "step": step, "meta": meta, "files": files, "torch": torch.__version__}
    said["xxh3_128"] = xxhash.xxh3_128(json.dumps(said, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(said, sort_keys=True, indent=1))
    sync(folder / "manifest.json")
    sync(folder)


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a step's folder, every byte of which is what was written; else a ValueError that says what is
    not."""
    try:
        said = json.loads((folder / "manifest.json").read_text())
        own = said.pop("xxh3_128")
        if xxhash.xxh3_128(json.dumps(said, sort_keys=True).encode()).hexdigest() != own:
            raise ValueError("manifest.json does not match its checksum")
        for name, want in said["files"].items():
            if (folder / name).stat().st_size != want["bytes"] or digest(folder / name) != want["xxh3_128"]:
                raise ValueError(f"{name} does not match its checksum")
        if place(folder.parent, said["step"]).name != folder.name:
            raise ValueError(f"it holds step {said['step']}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{folder} is damaged: {e}") from e
    return said


def restore(root: Path, like: Tree) -> tuple[Tree, dict[str, Any], list[str]] | None:
    """(state, meta, what was wrong with newer steps) of the newest step that is whole; None where there is none.

    like: a state of the same structure. Another structure, shape or dtype is a ValueError.
    """
    if not Path(root).is_dir():
        return None
    for stale in Path(root).glob(".tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)
    wrong: list[str] = []
    for step in reversed(steps(root)):
        folder = place(root, step)
        try:
            said = verify(folder)
        except ValueError as e:
            wrong.append(str(e))
            continue
        flat = {}
        for name in said["files"]:
            flat |= load_file(folder / name)
        _compare(folder, flat, tree.flatten(like))
        return (
            tree.unflatten({k: t.to(v.device) for (k, t), v in zip(sorted(flat.items()), _sorted(like))}, like),
            said["meta"],
            wrong,
        )
    if wrong:
        raise ValueError("no checkpoint is whole: " + "; ".join(wrong))
    return None


def _sorted(like: Tree) -> list[Tensor]:
    return [t for _, t in sorted(tree.flatten(like).items())]


def _compare(folder: Path, found: dict[str, Tensor], like: dict[str, Tensor]) -> None:
    if found.keys() != like.keys():
        gone, extra = sorted(like.keys() - found.keys()), sorted(found.keys() - like.keys())
        raise ValueError(f"{folder} holds another state: it lacks {', '.join(gone[:3]) or 'nothing'}, has besides "
                         f"{', '.join(extra[:3]) or 'nothing'}; was it trained with other settings?")
    for name, t in found.items():
        if (t.shape, t.dtype) != (like[name].shape, like[name].dtype):
            raise ValueError(f"{name} is {t.dtype} {tuple(t.shape)} in {folder}, {like[name].dtype} "
                             f"{tuple(like[name].shape)} in this run")


def same(saved: dict[str, Any], given: dict[str, Any]) -> None:
    """Resuming needs the same settings; a ValueError lists what differs."""
    differ = [f"{k}: {saved.get(k)!r} then, {given.get(k)!r} now" for k in sorted(saved.keys() | given.keys())
              if saved.get(k) != given.get(k)]
    if differ:
        raise ValueError(
            "the run was started with other settings: " + "; ".join(differ) + ". Use another --out, or those."
        )


class Saver:
    """Saves in the background, one at a time: a call copies the state, waits for the one before, and returns."""

    def __init__(self, root: Path, keep: int = 3):
        self.root, self.keep = Path(root), keep
        self.pool = ThreadPoolExecutor(1)
        self.running: Future | None = None

    def __call__(self, step: int, state: Tree, meta: dict[str, Any]) -> None:
        """Start to save; a SaveError of the one before is raised here."""
        copy = tree.map(lambda t: t.detach().to("cpu", copy=True), state)
        try:
            self.wait()
        finally:
            self.running = self.pool.submit(save, self.root, step, copy, meta, keep=self.keep)

    def wait(self) -> None:
        """Until what was started is on the disk."""
        running, self.running = self.running, None
        if running:
            running.result()

    def close(self) -> None:
        """Wait, and end the thread."""
        try:
            self.wait()
        finally:
            self.pool.shutdown()
