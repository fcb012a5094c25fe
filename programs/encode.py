"""Encode captioned pictures and videos ahead of time: what a diffusion model reads, by the pipeline of a folder.

    python programs/encode.py --model Wan2.1-T2V-1.3B-Diffusers/ --data clips/ --out features/ --clips.sizes 81x480x832

Training reads the folder in place of the records, with the same numbers, and without the encoders' weights. The same
command again goes on behind the last whole part. Ranks that torchrun or Slurm starts take parts in turn.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import tyro
from rich.progress import track

from mmfunc import features, records, shard
from mmfunc.tasks import pictures


@dataclass(frozen=True)
class Args:
    model: Path  # a diffusers pipeline's folder
    data: Path  # records: jsonl, json, csv, txt, a folder or tar shards
    out: Path  # the folder of features
    media: Path | None = None  # root of media paths; the data file's folder when absent
    part: int = 256  # samples of a file
    device: str = "cpu"  # or cuda, npu
    clips: pictures.Clips = field(default_factory=pictures.Clips)  # sizes and frame rate


def main(a: Args) -> None:
    with shard.world(device=a.device, flags=a, files=["model", "data"], out=a.out) as job:
        said = pictures.made(a.model, a.clips)
        done = job.once(features.begin, a.out, said | {"part": a.part})
        with shard.use(None):
            source = pictures.online(a.model, records.open(a.data, a.media), a.clips, a.device)
        parts = range(done, -(-len(source) // a.part))
        turns = lambda fn, parts: track(job.each(fn, parts), "encoding", len(parts), disable=not sys.stdout.isatty())
        bad = features.write(a.out, source, parts, a.part, turns)
        shard.alone(lambda: features.finish(a.out, said | {"model": str(a.model)}, source.empty()))
        if not job.rank:
            print(f"{a.out}: {len(features.Ahead(a.out))} samples in {features.done(a.out)} parts, {bad} left out")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except (ValueError, FileNotFoundError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(3)
