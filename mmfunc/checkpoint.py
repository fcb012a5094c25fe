"""Training state on disk: safetensors and a manifest with checksums, written aside, synced, then renamed.

A folder step-00000042 exists whole or not at all; restore takes the newest one whose every byte matches its checksum,
before a tensor of it is used. Tensors are stored by dotted name. No file of a state is a pickle.

On a mesh each rank writes some of what it has, so that all together write every element once, and the first one, when
all are done, the manifest: where in its tensor each part lies. Any other mesh reads what its ranks need of the parts.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmfunc import shard, tree
from mmfunc.hub import sync
from mmfunc.shard import Piece
from mmfunc.tree import Tree

FORMAT = 2  # of a manifest
PART = 5_000_000_000  # bytes of a file
BLOCK = 1 << 24  # bytes hashed at a time
PATIENCE = 600.0  # seconds that the first rank waits for the others' parts


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


def save(root: Path, step: int, state: Tree, meta: dict[str, Any], *, keep: int = 3,
         pieces: dict[str, Piece] | None = None) -> Path:
    """Write the tensors of a state and meta (JSON); then remove all but the newest `keep` steps.

    On a mesh all ranks call this. pieces: what this rank has of each tensor, if not as the mesh in use has it.
    """
    root, (rank, world) = Path(root), shard.rank()
    temporary = root / (f".tmp-{step}" if world > 1 else f".tmp-{step}-{os.getpid()}")
    final = place(root, step)
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        said = _fill(temporary, tree.flatten(state), pieces or shard.pieces(state), rank)
        if rank:
            _tell(temporary, rank, said)
            return final
        _close(temporary, [said, *(_told(temporary, r) for r in range(1, world))], step, meta)
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
        sync(root)
    except OSError as e:
        if rank:
            with suppress(OSError):  # the first one has given up already
                _tell(temporary, rank, {"error": str(e)})
        else:
            shutil.rmtree(temporary, ignore_errors=True)
        raise SaveError(f"the checkpoint of step {step} could not be written to {root}: {e}") from e
    except BaseException:
        if not rank:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in steps(root)[:-keep] if keep else ():
        shutil.rmtree(place(root, old), ignore_errors=True)
    return final


def _fill(folder: Path, flat: dict[str, Tensor], pieces: dict[str, Piece], rank: int) -> dict[str, Any]:
    """Write this rank's part: of what several ranks have, every copy's turn comes."""
    mine = [n for i, n in enumerate(flat) if i % pieces[n].copies == pieces[n].copy and 0 not in pieces[n].size]
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name in mine:
        t = flat[name][tuple(slice(0, n) for n in pieces[name].size)]  # without padding
        if parts[-1] and size + t.nbytes > PART:
            parts.append({})
            size = 0
        parts[-1][name] = t.detach().cpu().contiguous()
        size += t.nbytes
    said: dict[str, Any] = {"files": {}, "tensors": {}}
    for i, part in enumerate(parts):
        file = folder / (f"state-{rank}-{i}.safetensors" if i else f"state-{rank}.safetensors")
        try:
            save_file(part, file)
        except Exception as e:  # safetensors wraps a full disk in an error of its own
            raise OSError(str(e)) from e
        sync(file)
        said["files"][file.name] = {"bytes": file.stat().st_size, "xxh3_128": digest(file)}
        said["tensors"] |= {n: {"dtype": str(t.dtype), "shape": list(pieces[n].shape),
                                "parts": [[file.name, list(pieces[n].start), list(t.shape)]]} for n, t in part.items()}
    return said


def _tell(folder: Path, rank: int, said: dict[str, Any]) -> None:
    """Say what a rank has written."""
    new = folder / f".part-{rank}"
    new.write_text(json.dumps(said))
    sync(new)
    os.replace(new, folder / f"part-{rank}.json")


def _told(folder: Path, rank: int) -> dict[str, Any]:
    """What a rank has written, when it is done."""
    file, start = folder / f"part-{rank}.json", time.monotonic()
    while not file.exists():
        if time.monotonic() - start > PATIENCE:
            raise OSError(f"rank {rank} has written nothing in {PATIENCE:.0f} s; is the folder shared by all hosts?")
        time.sleep(0.01)
    said = json.loads(file.read_text())
    file.unlink()
    if "error" in said:
        raise OSError(f"rank {rank}: {said['error']}")
    return said


def _close(folder: Path, told: list[dict[str, Any]], step: int, meta: dict[str, Any]) -> None:
    """Write the manifest of all parts."""
    tensors: dict[str, Any] = {}
    for said in told:
        for name, t in said["tensors"].items():
            tensors.setdefault(name, t | {"parts": []})["parts"] += t["parts"]
    files = {k: v for said in told for k, v in said["files"].items()}
    said = {"format": FORMAT, "step": step, "meta": meta, "files": files, "tensors": tensors,
            "torch": torch.__version__}
    said["xxh3_128"] = xxhash.xxh3_128(json.dumps(said, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(said, sort_keys=True))
    sync(folder / "manifest.json")
    sync(folder)


def verify(folder: Path, rank: int = 0, world: int = 1) -> dict[str, Any]:
    """The manifest of a step's folder, every byte of which is what was written; else a ValueError that says what is
    not. Of several ranks each reads some of the files."""
    try:
        said = json.loads((folder / "manifest.json").read_text())
        own = said.pop("xxh3_128")
        if xxhash.xxh3_128(json.dumps(said, sort_keys=True).encode()).hexdigest() != own:
            raise ValueError("manifest.json does not match its checksum")
        for name, want in [*said["files"].items()][rank::world]:
            if (folder / name).stat().st_size != want["bytes"] or digest(folder / name) != want["xxh3_128"]:
                raise ValueError(f"{name} does not match its checksum")
        if said["format"] != FORMAT:
            raise ValueError(f"it has format {said['format']}; this version reads {FORMAT}")
        if place(folder.parent, said["step"]).name != folder.name:
            raise ValueError(f"it holds step {said['step']}")
        for name, t in said["tensors"].items():
            if sum(prod(size) for _, _, size in t["parts"]) != prod(t["shape"]):
                raise ValueError(f"parts of {name} are missing")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{folder} is damaged: {e}") from e
    return said


def _whole(folder: Path) -> tuple[dict[str, Any] | None, str | None]:
    """(manifest, None) or (None, what is wrong), the same on all ranks."""
    said, wrong = None, None
    try:
        said = verify(folder, *shard.rank())
    except ValueError as e:
        wrong = str(e)
    found = [w for w in shard.everyone(wrong) if w]
    return (None, found[0]) if found else (said, None)


def restore(root: Path, like: Tree) -> tuple[Tree, dict[str, Any], list[str]] | None:
    """(state, meta, what was wrong with newer steps) of the newest step that is whole; None where there is none.

    like: a state of the same structure. Another structure, shape or dtype is a ValueError.
    """
    if not Path(root).is_dir():
        return None
    for stale in Path(root).glob(".tmp-*") if shard.rank()[0] == 0 else ():
        shutil.rmtree(stale, ignore_errors=True)
    wrong: list[str] = []
    for step in reversed(steps(root)):
        folder = place(root, step)
        said, why = _whole(folder)
        if why:
            wrong.append(why)
            continue
        pieces, flat = shard.pieces(like), tree.flatten(like)
        _compare(folder, said["tensors"], flat, pieces)
        found = {n: _read(folder, n, said["tensors"][n]["parts"], pieces[n], t) for n, t in flat.items()}
        return tree.unflatten(found, like), said["meta"], wrong
    if wrong:
        raise ValueError("no checkpoint is whole: " + "; ".join(wrong))
    return None


def resume(root: Path, state: Tree, meta: dict[str, Any]) -> tuple[Tree, list[str]]:
    """What restore finds of a run with the same meta, and what was wrong with newer steps; else the given state."""
    if (found := restore(root, state)) is None:
        return state, []
    same(found[1], meta)
    return found[0], found[2]


def _read(folder: Path, name: str, parts: list, piece: Piece, like: Tensor) -> Tensor:
    """What a rank has of a tensor, from the parts in which it was written."""
    out = torch.zeros(like.shape, dtype=like.dtype)
    for file, start, size in parts:
        box = [(max(a, b), min(a + n, b + m)) for a, n, b, m in zip(start, size, piece.start, piece.size)]
        if any(a >= b for a, b in box):
            continue
        with safe_open(folder / file, "pt") as f:
            t = f.get_slice(name)[tuple(slice(a - s, b - s) for (a, b), s in zip(box, start))] if box else (
                f.get_tensor(name))
        out[tuple(slice(a - s, b - s) for (a, b), s in zip(box, piece.start))] = t
    return out.to(like.device)


def _compare(folder: Path, found: dict[str, Any], like: dict[str, Tensor], pieces: dict[str, Piece]) -> None:
    names = set().union(*shard.everyone([*like]))  # a stage of a pipeline has some of them
    if found.keys() != names:
        gone, extra = sorted(names - found.keys()), sorted(found.keys() - names)
        raise ValueError(f"{folder} holds another state: it lacks {', '.join(gone[:3]) or 'nothing'}, has besides "
                         f"{', '.join(extra[:3]) or 'nothing'}; was it trained with other settings?")
    for name, t in ((n, found[n]) for n in like):
        if (tuple(t["shape"]), t["dtype"]) != (pieces[name].shape, str(like[name].dtype)):
            raise ValueError(f"{name} is {t['dtype']} {tuple(t['shape'])} in {folder}, {like[name].dtype} "
                             f"{pieces[name].shape} in this run")


def same(saved: dict[str, Any], given: dict[str, Any]) -> None:
    """Resuming needs the same settings; a ValueError lists what differs."""
    differ = [f"{k}: {saved.get(k)!r} then, {given.get(k)!r} now" for k in sorted(saved.keys() | given.keys())
              if saved.get(k) != given.get(k)]
    if differ:
        raise ValueError(f"the run was started with other settings: {'; '.join(differ)}. Use another --out, or those.")


class Saver:
    """Saves in the background, one at a time: a call copies the state, waits for the one before, and returns.

    failed(error) is told of what could not be written, and all goes on; without it a SaveError is raised.
    """

    def __init__(self, root: Path, keep: int = 3, failed: Callable[[SaveError], None] | None = None):
        self.root, self.keep, self.failed = Path(root), keep, failed
        self.pool = ThreadPoolExecutor(1)
        self.running: Future | None = None

    def __call__(self, step: int, state: Tree, meta: dict[str, Any]) -> Future:
        """Start to save, and say when it is on the disk; whether the one before failed is told here."""
        copy, pieces = tree.map(lambda t: t.detach().to("cpu", copy=True), state), shard.pieces(state)
        try:
            self.wait()
        finally:
            self.running = self.pool.submit(save, self.root, step, copy, meta, keep=self.keep, pieces=pieces)
        return self.running

    def wait(self) -> None:
        """Until what was started is on the disk."""
        running, self.running = self.running, None
        try:
            if running:
                running.result()
        except SaveError as e:
            if self.failed is None:
                raise
            self.failed(e)

    def close(self, *, strict: bool = False) -> None:
        """Wait, and end the thread; strict: what could not be written now is raised in any case."""
        try:
            self.failed = None if strict else self.failed
            self.wait()
        finally:
            self.pool.shutdown()
