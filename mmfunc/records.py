"""Records of conversations and captions from the files people have, told apart by their keys and read at random.

messages (OpenAI, LLaMA-Factory, ms-swift), conversations (LLaVA, ShareGPT), query/response, instruction/output
(Alpaca), captions beside media (metadata.csv|jsonl, Open-Sora's csv, MindSpeed-MM's data.json and data.txt,
finetrainers' prompt.txt and videos.txt); as .jsonl, .json, .csv, .txt, a folder, or .tar shards (WebDataset), which are
read by an index of offsets and never unpacked.
"""

import csv
import json
import tarfile
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mmfunc import media

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
MEDIA = {"images": ("images", "image"), "videos": ("videos", "video")}
SUFFIXES = {
    "images": (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"),
    "videos": (".mp4", ".webm", ".mkv", ".mov", ".avi"),
}
FORMATS = ("messages", "conversations", "query + response", "instruction + output", "question + answer",
           "image/video/file_name/path + text/prompt/caption/cap")
CAPTIONS = "text", "prompt", "caption", "cap"
LISTS = ("prompts.txt", "prompt.txt", "captions.txt"), ("videos.txt", "images.txt")  # a line each, in the same order


@dataclass(frozen=True)
class Record:
    """One conversation, with the files or bytes of its media."""

    id: str
    messages: list[dict]
    images: list[Any] = field(default_factory=list)
    videos: list[Any] = field(default_factory=list)
    extra: dict = field(default_factory=dict)  # what else the row holds


@dataclass(frozen=True)
class Records:
    """Records by number; nothing is read before it is asked for."""

    size: int
    row: Callable[[int], tuple[str, dict, Callable[[str], Any]]]  # (id, row, what finds a media name)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> Record:
        return record(*self.row(i))


def messages(row: dict) -> list[dict]:
    """The conversation of a row in any known format; an unknown one is a ValueError with its keys."""
    if "messages" in row:
        return row["messages"]
    if "conversations" in row:
        return [{"role": _role(t["from"]), "content": t["value"]} for t in row["conversations"]]
    for ask, answer in (("query", "response"), ("instruction", "output"), ("question", "answer")):
        if ask in row:
            asked = "\n".join(filter(None, [row[ask], row.get("input")])) if ask == "instruction" else row[ask]
            told = row.get(answer, row.get(answer + "s"))
            told = told[0] if isinstance(told, list) else told
            places = "".join(f"<{kind[:-1]}>" * len(_named(row, kind)) for kind in MEDIA)
            asked = asked if any(f"<{k[:-1]}>" in asked for k in MEDIA) else places + asked
            return [{"role": "user", "content": asked}] + (
                [{"role": "assistant", "content": str(told)}] if told is not None else []
            )
    said = next((row[k] for k in CAPTIONS if k in row), None)
    said = said[0] if isinstance(said, list) and said else said
    kinds = [k for k in MEDIA if _named(row, k)]
    if said is None or not kinds:
        raise ValueError(
            f"a record with the keys {', '.join(row)} is of no known format; known are {'; '.join(FORMATS)}"
        )
    return [{"role": "user", "content": f"<{kinds[0][:-1]}>"}, {"role": "assistant", "content": said}]


def _role(name: str) -> str:
    if name not in ROLES:
        raise ValueError(f"the speaker {name!r} is unknown; known are {', '.join(ROLES)}")
    return ROLES[name]


def _named(row: dict, kind: str) -> list:
    """Media that a row names beside its messages."""
    found = next((row[k] for k in MEDIA[kind] if row.get(k)), [])
    for name in ("file_name", "path"):
        if not found and str(row.get(name, "")).lower().endswith(SUFFIXES[kind]):
            found = [row[name]]
    return found if isinstance(found, list) else [found]


def record(key: str, row: dict, find: Callable[[str], Any]) -> Record:
    """A row as a Record; media named within content lists are found too. Errors are ValueErrors that name the
    record."""
    try:
        turns = messages(row)
        if not turns or any("role" not in t or "content" not in t for t in turns):
            raise ValueError("a message needs a role and content")
        found = {kind: _named(row, kind) or [p[kind[:-1]] for t in turns if isinstance(t["content"], list)
                                             for p in t["content"] if kind[:-1] in p] for kind in MEDIA}
        sources = {kind: [find(n) if isinstance(n, str) else n for n in names] for kind, names in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{key}: {e if isinstance(e, ValueError) else f'malformed ({e!r})'}") from e
    extra = {k: v for k, v in row.items() if k not in ("messages", "conversations")}
    return Record(str(row.get("id", key)), turns, **sources, extra=extra)


def open(path: Path, root: Path | None = None) -> Records:
    """Records of a file or folder; media are looked for below root (the file's folder when None). None at all is an
    error."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_dir():
        inside = [path / n for n in ("metadata.jsonl", "metadata.csv") if (path / n).exists()] or sorted(
            path.glob("*.tar")
        )
        lists = [next((path / n for n in names if (path / n).exists()), None) for names in LISTS]
        if not inside and not all(lists):
            raise ValueError(f"{path} has neither metadata.jsonl nor metadata.csv nor *.tar nor prompt.txt and "
                             "videos.txt")
        out = mix([open(f, root or path) for f in inside]) if inside else _paired(*lists, root or path)
    elif path.suffix == ".tar":
        out = _tar(path)
    elif path.suffix == ".jsonl":
        out = _lines(path, root or path.parent)
    elif path.suffix in (".json", ".csv"):
        out = _listed(path, root or path.parent)
    elif path.suffix == ".txt":
        out = mix([open(*_source(path, line)) for line in path.read_text().splitlines() if line.strip()])
    else:
        raise ValueError(f"{path} has no known ending; records come as .jsonl, .json, .csv, .txt, .tar or a folder")
    if not len(out):
        raise ValueError(f"{path} holds no record")
    return out


def mix(parts: Sequence[Records], repeats: Sequence[int] | None = None) -> Records:
    """Several sources as one, each repeated."""
    parts = [p for p, n in zip(parts, repeats or [1] * len(parts), strict=True) for _ in range(n)]
    ends = [sum(map(len, parts[: i + 1])) for i in range(len(parts))]

    def row(i: int) -> tuple:
        k = bisect_right(ends, i)
        return parts[k].row(i - (ends[k - 1] if k else 0))

    return Records(ends[-1] if ends else 0, row)


def _lines(path: Path, root: Path) -> Records:
    offsets, bad, at = [], [], 0
    with path.open("rb") as f:
        for number, line in enumerate(f, 1):
            if line.strip():
                try:
                    if not isinstance(json.loads(line), dict):
                        raise ValueError("no object")
                except ValueError as e:
                    bad.append(f"{path}:{number}: {e}")
                offsets.append((at, number))
            at += len(line)
    if bad:
        raise ValueError(f"{len(bad)} lines are no JSON objects: " + "; ".join(bad[:10]))

    def row(i: int) -> tuple:
        with path.open("rb") as f:
            f.seek(offsets[i][0])
            return f"{path}:{offsets[i][1]}", json.loads(f.readline()), partial(media.inside, root)

    return Records(len(offsets), row)


def _listed(path: Path, root: Path) -> Records:
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as f:
            rows = list(csv.DictReader(f))
    else:
        rows = json.loads(path.read_text())
        if not isinstance(rows, list):
            raise ValueError(f"{path} holds no list of records")
    return Records(len(rows), lambda i: (f"{path}[{i}]", rows[i], partial(media.inside, root)))


def _paired(captions: Path, files: Path, root: Path) -> Records:
    """finetrainers' lists: line by line a caption and a file."""
    said, names = captions.read_text().splitlines(), files.read_text().splitlines()
    if len(said) != len(names):
        raise ValueError(f"{captions} has {len(said)} lines, {files} has {len(names)}; they must match line by line")
    rows = [{"file_name": n.strip(), "text": s} for s, n in zip(said, names)]
    return Records(len(rows), lambda i: (f"{files}:{i + 1}", rows[i], partial(media.inside, root)))


def _source(path: Path, line: str) -> tuple[Path, Path]:
    """(records, media root) of a line of MindSpeed-MM's data.txt: "media folder,records file"."""
    folder, comma, rows = (part.strip() for part in line.partition(","))
    if not comma or not rows.endswith((".json", ".jsonl", ".csv")):
        raise ValueError(f"{path}: the line {line!r} is not 'media folder,records file'")
    return path.parent / rows, path.parent / folder


def _tar(path: Path) -> Records:
    """Members with one stem are one record: key.json or key.txt, and media."""
    groups: dict[str, dict[str, tuple[int, int]]] = {}
    with tarfile.open(path, "r:") as t:
        for m in t:
            folder, _, name = m.name.rpartition("/")
            stem, _, ending = name.partition(".")
            stem = f"{folder}/{stem}"
            if m.isfile() and ending:
                groups.setdefault(stem, {})["." + ending.lower()] = (m.offset_data, m.size)
    keys = sorted(k for k, g in groups.items() if ".json" in g or ".txt" in g)

    def read(at: tuple[int, int]) -> bytes:
        with path.open("rb") as f:
            f.seek(at[0])
            return f.read(at[1])

    def row(i: int) -> tuple:
        group = groups[keys[i]]
        said = json.loads(read(group[".json"])) if ".json" in group else {"text": read(group[".txt"]).decode()}
        for kind, endings in SUFFIXES.items():
            own = [e for e in group if e.endswith(endings)]
            said = said | {kind: own} if own and kind[:-1] not in said and "file_name" not in said else said
        return f"{path}:{keys[i]}", said, lambda name: read(_member(group, name, path))

    return Records(len(keys), row)


def _member(group: dict, name: str, path: Path) -> tuple[int, int]:
    """A record's own member, by its ending: a record can name no other file."""
    ending = name if name in group else Path(name).suffix.lower()
    if ending not in group:
        raise media.BadMedia(f"{path} has no member {name} in this record; it has {', '.join(group)}")
    return group[ending]
