"""Draw pictures or videos from prompts with a pipeline's folder.

    python programs/sample.py --model FLUX.1-dev/ --prompt "a red fox" --out fox
    python programs/sample.py --model Wan2.1-T2V-1.3B-Diffusers/ --prompts prompts.txt --repeat 5 --out wan
    python programs/sample.py --model Wan2.1-I2V-14B-480P-Diffusers/ --prompt "it wakes up" --image cat.png --out cat
    python programs/sample.py --again "fox/a red fox-0.png" --out twice

Files are named as VBench reads them. Each says how it was made: --again makes it anew, with the same bits on the same
machine. --out has gallery.jsonl and report.html too. In a prompts file a line is a prompt or, in a .jsonl, an object
with prompt and, if they differ, negative, seed, image (a list), video. Ranks that torchrun or Slurm starts take turns.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from mmfunc import gallery, metrics, pipeline, render, report, shard


@dataclass(frozen=True)
class Args:
    out: Path
    model: Path | None = None  # a folder with model_index.json
    prompt: str | None = None
    prompts: Path | None = None  # a file, one a line
    negative: str | None = None
    image: tuple[Path, ...] = ()  # first (and last) frame, what to begin with, or what Kontext looks at
    video: Path | None = None  # to begin with
    strength: float | None = None  # how much of the beginning is drawn anew, up to 1
    size: str | None = None  # height x width, as 480x832; else the pipeline's, in the shape of --image or --video
    frames: int | None = None
    fps: int | None = None
    steps: int | None = None
    guidance: float | None = None
    true_guidance: float | None = None  # classifier-free, of models that read guidance as a number
    shift: float | None = None  # of the times; else the scheduler's
    solver: str | None = None  # unipc, dpm, flow_euler, flow_heun; else the scheduler's
    reuse: float | None = None  # caching threshold (TeaCache), as 0.1: faster, not the same; 0 or none: off
    references: Literal["trained", "own"] | None = None  # sizes of the images that Kontext looks at
    tile: int | None = None  # pixels of a square that the VAE works on at once; all unless given
    seed: int = 0  # of the first sample; each further one has one more
    repeat: int = 1  # samples of each prompt
    strict: bool = False  # refuse prompts that the text encoder would cut
    lora: Path | None = None  # adapters: a folder or a file
    dtype: Literal["fp32", "bf16"] = "fp32"  # of transformer and text encoders
    backend: Literal["eager", "inductor", "npu"] = "eager"
    device: str = "cpu"
    again: Path | None = None  # a file of this program, to be made once more


def rows(a: Args) -> list[dict]:
    """What is asked for, one row a prompt."""
    if (a.prompt is None) == (a.prompts is None):
        raise ValueError("give a --prompt, or a file of --prompts")
    if a.prompts is None:
        return [{"prompt": a.prompt}]
    lines = [line for line in a.prompts.read_text().splitlines() if line.strip()]
    found = [json.loads(x) for x in lines] if a.prompts.suffix == ".jsonl" else [{"prompt": x.strip()} for x in lines]
    if bad := [i for i, r in enumerate(found) if not isinstance(r, dict) or not isinstance(r.get("prompt"), str)]:
        raise ValueError(f"{a.prompts}: line {bad[0] + 1} has no prompt")
    return found


def tasks(a: Args, pipe: pipeline.Pipeline) -> list[dict]:
    """A task for each sample of each prompt."""
    size = dict(zip(("height", "width"), map(int, a.size.lower().split("x")))) if a.size else {}
    names = ("negative", "image", "video", "strength", "frames", "fps", "steps", "guidance", "true_guidance", "shift",
             "solver", "reuse", "references", "tile", "backend")
    given = {n: getattr(a, n) for n in names} | size
    asked = [(r, r.get("seed", a.seed + i * a.repeat) + n) for i, r in enumerate(rows(a)) for n in range(a.repeat)]
    return [render.task(pipe, **given | r | {"seed": seed}) for r, seed in asked]


def main(a: Args) -> None:
    with shard.world(device=a.device, flags=a, files=["model", "prompts"], out=a.out) as job:
        run(a, job)


def run(a: Args, job: shard.Job) -> None:
    kept = gallery.said(a.again) if a.again else {}
    if not a.again and a.model is None:
        raise ValueError("give a --model, or a file to make --again")
    source = {"model": str(a.model or kept["model"]), "lora": str(a.lora) if a.lora else kept.get("lora"),
              "dtype": kept.get("dtype", a.dtype), "device": kept.get("device", a.device),
              "threads": kept.get("threads", torch.get_num_threads())}
    torch.set_num_threads(source["threads"])  # it may decide the last bits on a CPU
    low = torch.bfloat16 if source["dtype"] == "bf16" else torch.float32
    pipe = pipeline.load(Path(source["model"]), device=source["device"], dtype={
        "transformer": low, "text": low, "vae": torch.float32, "image": torch.float32})
    pipe = pipeline.adapted(pipe, Path(source["lora"])) if source["lora"] else pipe
    todo = [{k: v for k, v in kept.items() if k not in (*source, "versions")}] if kept else tasks(a, pipe)
    start = time.perf_counter()

    def tell(i: int, row: dict) -> None:
        spent = time.perf_counter() - start
        calls = f"{row['computed']} calls computed, {row['reused']} reused  " if "reused" in row else ""
        print(f"{i + 1}/{len(todo)}  seed {row['seed']}  {row['file']}  {calls}{spent:.1f} s, "
              f"ETA {spent / (i + 1) * (len(todo) - i - 1):.0f} s", flush=True)

    render.show(a.out, pipe, todo, said=source | {"versions": metrics.versions()}, tell=tell,
                strict=a.strict, each=job.each)
    shard.alone(lambda: print(report.write(a.out)))


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except (ValueError, FileNotFoundError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(3)
