"""Encode captioned pictures and videos ahead of time: what a diffusion model reads, by the pipeline of a folder.

    python programs/encode.py --model Wan2.1-T2V-1.3B-Diffusers/ --data clips/ --out features/ --clips.sizes 81x480x832

Training reads the folder in place of the records, with the same numbers, and without the encoders' weights. The same
command again goes on behind the last whole part.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import tyro
from rich.progress import track

from mmfunc import features, records
from mmfunc.tasks import pictures


@dataclass(frozen=True)
class Args:
    model: Path  # a diffusers pipeline's folder
    data: Path  # records: jsonl, json, csv, txt, a folder or tar shards
    out: Path  # the folder of features
    media: Path | None = None  # root of media paths; the data file's folder when absent
    part: int = 256  # samples of a file
    clips: pictures.Clips = field(default_factory=pictures.Clips)  # sizes and frame rate


def usable(source: features.Online, which: range, bad: list[dict]) -> Iterator[tuple]:
    """Encoded samples; those that cannot be used are noted."""
    for i in which:
        try:
            yield source.row(i)
        except (ValueError, OSError) as e:
            bad.append({"index": i, "reason": str(e)})


def main(a: Args) -> None:
    said = pictures.made(a.model, a.clips)
    a.out.mkdir(parents=True, exist_ok=True)
    begun = a.out / "encoding.json"
    if begun.exists() and json.loads(begun.read_text()) != said | {"part": a.part}:
        raise ValueError(f"{a.out} was begun with {begun.read_text()}, now it is {said | {'part': a.part}}")
    begun.write_text(json.dumps(said | {"part": a.part}))
    source = pictures.online(a.model, records.open(a.data, a.media), a.clips)
    bad: list[dict] = []
    parts = range(features.done(a.out), -(-len(source) // a.part))
    for n in track(parts, "encoding", disable=not sys.stdout.isatty()):
        at = len(bad)
        features.write_part(a.out, n, usable(source, range(n * a.part, min((n + 1) * a.part, len(source))), bad))
        with (a.out / "bad_samples.jsonl").open("a") as f:
            f.writelines(json.dumps(b) + "\n" for b in bad[at:])
        if len(bad) > 0.01 * len(source):
            raise ValueError(f"{len(bad)} of {len(source)} samples could not be used; see {a.out}/bad_samples.jsonl. "
                             f"The last: {bad[-1]['reason']}")
    features.finish(a.out, said | {"model": str(a.model)}, source.empty())
    print(f"{a.out}: {len(features.Ahead(a.out))} samples in {features.done(a.out)} parts, {len(bad)} left out")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except (ValueError, FileNotFoundError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(3)
