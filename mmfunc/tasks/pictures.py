"""Diffusion models of pictures and videos: trained on captioned media or on features of them, shown by samples."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mmfunc import bundle, clips, diffusion, features, lora, models, pipeline, prompts, recipes, records, render, tree
from mmfunc.online import Encoder, Online, flops
from mmfunc.recipes import Part
from mmfunc.records import Record
from mmfunc.tree import Tree

LORA = r"(self|cross|attention)\.(q|k|v|out)$"  # rule over names of dense maps
ENCODERS = "vae", "text", "image"
FOLDERS = "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "image_encoder"


@dataclass(frozen=True)
class Clips:
    sizes: tuple[str, ...] = ()  # rows x columns of pictures, frames x rows x columns of videos, as 512x512 81x480x832
    batch: tuple[int, ...] = ()  # samples of a micro-batch, for each size; none: --batch
    fps: float = 16.0  # frames taken of a second of video
    drop: float = 0.1  # share of captions left out, for guidance
    strict: bool = False  # refuse captions that are longer than the text encoders read; else they are cut, and told
    times: Literal["uniform", "logit_normal", "mode", "cosmap"] = "logit_normal"  # distribution of noise levels
    shift: float = 0.0  # of noise levels towards noise; 0: as the pipeline's scheduler samples
    guidance: float = 1.0  # what a model that reads the strength of guidance is told


def model(a: Any) -> tuple[Path, Any, Any]:
    """(folder, family, Config) of what is trained, the transformer."""
    part = bundle.load(a.model, ()).transformer
    return Path(a.model) / "transformer", part.family, part.config


def sizes(said: tuple[str, ...]) -> list[clips.Size]:
    """(frames, rows, columns) from "512x512" and "81x480x832"."""
    out = []
    for text in said:
        numbers = text.lower().split("x")
        if len(numbers) not in (2, 3) or not all(n.isdigit() and int(n) for n in numbers):
            raise ValueError(f"the size {text!r} is neither rows x columns nor frames x rows x columns, as 81x480x832")
        out.append(tuple(map(int, ["1", *numbers][-3:])))
    return out


def made(model: Path, a: Clips) -> dict[str, Any]:
    """What the features of a run depend on: its encoders, sizes and frame rate."""
    there = [Path(model) / n for n in FOLDERS if (Path(model) / n).is_dir()]
    return {"encoders": features.digest(*there), "sizes": [list(s) for s in sizes(a.sizes)], "fps": a.fps}


def read(pipe: bundle.Pipeline, fps: float, r: Record, size: clips.Size) -> Tensor:
    """The pixels of a sample; of a model of videos a picture is a video of one frame."""
    c = pipe.transformer.config
    x = clips.pixels(r, size, fps, 3 if pipe.vae else c.channels)
    return x.unsqueeze(1) if x.ndim < len(recipes.of(pipe.kind).patch(c)) + 1 else x


def bare(part: Part | None) -> Part | None:
    """A part with parameters that have shapes only."""
    return part and replace(part, params=tree.map(lambda t: t.to("meta"), part.params))


def lookers(pipe: bundle.Pipeline) -> list[Encoder]:
    """What makes a sample's own features: latents, and what image-to-video models see."""
    still, empty = len(recipes.of(pipe.kind).patch(pipe.transformer.config)) == 2, replace(pipe, vae=bare(pipe.vae))

    @cache
    def cost(size: clips.Size) -> int:  # of both: the VAE runs on as many frames
        return flops(pipeline.latents, empty, torch.empty(1, 3, *size[still:], device="meta"))

    def encoder(look: Callable) -> Encoder:
        device = next((t.device for t in tree.leaves(pipe.vae and pipe.vae.params)), "cpu")
        return Encoder(lambda x: first(look(x[None].to(device))), cost)

    out = [encoder(lambda x: {"latents": pipeline.latents(pipe, x)})]
    if getattr(pipe.transformer.config, "condition", 0):
        out.append(encoder(lambda x: pipeline.conditions(pipe, x[:, :, 0], x.shape[2])))
    return out


def first(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The features of the only sample, on the CPU."""
    return {k: v[0].cpu() for k, v in found.items()}


def readers(pipe: bundle.Pipeline) -> list[Encoder]:
    """What makes the features of a caption: the text encoders."""
    recipe = recipes.of(pipe.kind)

    @cache
    def ends(i: int) -> tuple[int, int]:
        """FLOPs for one token, and for as many as there may be."""
        part, n = bare(pipe.text[i][0]), pipe.lengths[i]
        ids = torch.zeros(1, n, dtype=torch.int64, device="meta")
        return tuple(flops(recipe.text[i].features, part, ids, (torch.arange(n) < k)[None].long()) for k in (1, n))

    def cost(i: int, caption: str) -> float:
        n, (low, high) = pipe.lengths[i], ends(i)
        mask = prompts.encode(pipe.text[i][1], [recipe.clean(caption)], n)[0]["attention_mask"]
        return low + (high - low) * (int(mask.sum()) - 1) / max(n - 1, 1)

    return [Encoder(lambda x, fn=fn: first(fn(x)), partial(cost, i)) for i, fn in enumerate(pipeline.readers(pipe))]


def online(model: Path, rows: records.Records, a: Clips, device: str = "cpu") -> Online:
    """Samples of records, encoded by the pipeline of a folder when they are asked for."""
    pipe = bundle.load(model, ENCODERS, device=device)
    wanted = sizes(a.sizes)
    if not wanted:
        raise ValueError("give the sizes to train on, such as --clips.sizes 512x512, or features made ahead of time")
    still = len(recipes.of(pipe.kind).patch(pipe.transformer.config)) == 2
    for size in wanted:
        if still and size[0] > 1:
            raise ValueError(f"a {pipe.kind} draws pictures; the size {'x'.join(map(str, size))} has {size[0]} frames")
        pipeline.shape(pipe, *size[1:], frames=size[0])
    place, said = [0] * len(rows), {}
    for i in range(len(rows)):
        try:
            r = rows[i]
            place[i] = clips.nearest(clips.sized(r), wanted)
            said[features.caption(r)] = None
        except (ValueError, OSError):
            pass  # told when it is drawn
    pipeline.check(pipe, list(said), strict=a.strict)
    return Online(rows, place, wanted, partial(read, pipe, a.fps), lookers(pipe), readers(pipe))


def ahead(a: Any) -> bool:
    """Whether a run reads features that were made ahead of time."""
    return (Path(a.data) / "index.json").exists()


def source(a: Any) -> features.Ahead | Online:
    """The samples of a run: features of a folder with index.json, else records."""
    if not ahead(a):
        return online(a.model, records.open(a.data, a.media), a.clips)
    found, now = features.Ahead(a.data), made(a.model, a.clips)
    if not a.clips.sizes:
        now |= {n: found.said[n] for n in ("sizes", "fps")}
    if differ := [f"{k}: {found.said[k]} there, {v} in this run" for k, v in now.items() if found.said[k] != v]:
        raise ValueError(f"the features of {a.data} were made with {found.said['model']} otherwise than with {a.model} "
                         f"in this run: {'; '.join(differ)}. Encode them again")
    return found


def shifts(pipe: bundle.Pipeline, among: list[clips.Size], shift: float) -> tuple[float, ...]:
    """How far the noise levels of each size are moved: the given shift, or as the scheduler does when sampling."""
    s = pipe.scheduler
    if shift or not s.get("use_dynamic_shifting"):
        return tuple(shift or s.get("flow_shift") or s.get("shift") or 1.0 for _ in among)
    patch = math.prod(recipes.of(pipe.kind).patch(pipe.transformer.config))
    bounds = [s.get(k, v) for k, v in (("base_image_seq_len", 256), ("max_image_seq_len", 4096), ("base_shift", 0.5),
                                       ("max_shift", 1.15))]
    count = lambda size: math.prod(pipeline.shape(pipe, *size[1:], frames=size[0])[1:]) // patch
    return tuple(math.exp(diffusion.resolution_mu(count(size), *bounds)) for size in among)


def batches(a: Any, family: Any, c: Any) -> clips.Batches:
    """The global batches of a run by number."""
    samples, pipe = source(a), bundle.load(a.model, ())
    moved = shifts(pipe, samples.sizes, a.clips.shift)
    times = diffusion.Times(a.clips.times)
    plan = clips.Plan(a.clips.batch or (a.batch,), a.accumulate, a.seed, a.clips.drop, times, moved)
    return clips.Batches(samples, plan, {"guidance": a.clips.guidance} if getattr(c, "guidance", False) else {})


def signatures(a: Any) -> int:
    """How many shapes of batches there may be."""
    return max(len(a.clips.sizes), 1)


def show(a: Any, family: Any, c: Any, params: Tree, step: int) -> None:
    """Samples of a file's first twelve prompts, with the same seeds each time, for the report; in a .jsonl a line is an
    object as programs/sample.py reads it."""
    if not a.questions:
        return
    lines = [line.strip() for line in Path(a.questions).read_text().splitlines() if line.strip()][:12]
    rows = [json.loads(x) for x in lines] if a.questions.suffix == ".jsonl" else [{"prompt": x} for x in lines]
    pipe = trained(a, family, c, params)
    said = features.Ahead(a.data).said if ahead(a) else {"sizes": sizes(a.clips.sizes), "fps": a.clips.fps}
    given = dict(zip(("frames", "height", "width"), said["sizes"][0])) | {"fps": round(said["fps"])}
    given = {k: v for k, v in given.items() if k in pipeline.defaults(pipe) or k in ("height", "width")}
    asked = [render.task(pipe, **given | {"seed": a.seed + i} | r) for i, r in enumerate(rows)]
    render.show(a.out, pipe, asked, step=step)


def drawn(pipe: bundle.Pipeline, prompts: list[str], size: clips.Size, key: Tensor, **how: Any) -> Tensor:
    """Samples of prompts, pixels [B, 3, (T,) Y, X] in -1..1; how: as pipeline.plan takes it."""
    noise = len(prompts), *pipeline.shape(pipe, *size[1:], frames=size[0])
    made = pipeline.plan(pipe, noise, **how)
    uncond = pipeline.texts(pipe, [""] * len(prompts)) if made.scale > 1 else None
    x = pipeline.pixels(pipe, pipeline.sample(pipe, pipeline.texts(pipe, prompts), uncond, noise, key=key, made=made))
    return x.expand(-1, 3, *x.shape[2:])


def trained(a: Any, family: Any, c: Any, params: Tree) -> bundle.Pipeline:
    """The pipeline of the model folder with other weights of the transformer."""
    return replace(bundle.load(a.model, ENCODERS, device=a.device), transformer=Part(family, c, params))


def export(a: Any, family: Any, c: Any, params: Tree) -> None:
    """A pipeline folder with the trained transformer, its other parts carried along; low-rank paths apart as diffusers
    reads them."""
    if a.lora.rank:
        (a.out / "adapter").mkdir(parents=True, exist_ok=True)
        lora.export_weights(a.out / "adapter", params, models.table(family, c))
    whole = bundle.load(a.model, ())
    part = Part(family, c, lora.merge(params))
    bundle.export(a.out / "export", replace(whole, transformer=part), like=a.model)
