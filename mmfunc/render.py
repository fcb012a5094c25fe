"""Pictures and videos of a pipeline from rows of settings: what the sample program and a training run's gallery share.

A task is a flat dict that JSON holds: prompt, negative, seed, image, video, height, width, frames, steps ... It is
written into the file that it makes, and makes the same bits again. Each is made by itself, so that it does not depend
on what is made beside it.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmfunc import gallery, media, pipeline, random, recipes, shard, teacache, tree
from mmfunc.pipeline import Pipeline

INPUTS = "image", "video"
HOW = "steps", "guidance", "true_guidance", "shift", "solver", "reuse", "backend"  # of pipeline.plan


def task(pipe: Pipeline, prompt: str, **given: Any) -> dict[str, Any]:
    """A task with all that decides its bits; what is not given, or None, is as the pipeline has it.

    given: negative, seed, image (paths), video (a path), height, width, frames, fps, tile, references, and of HOW.
    """
    said, known = pipeline.defaults(pipe), {k: v for k, v in given.items() if v is not None}
    images, video = known.pop("image", ()), known.pop("video", None)
    images = [str(x) for x in ([images] if isinstance(images, (str, Path)) else images)]
    video = str(video) if video else None
    size = dict(zip(("height", "width"), _size(pipe, images, video)))
    time = {k: said[k] for k in ("frames", "fps") if k in said}
    start = {"strength": said["strength"]} if video or (images and not _reads(pipe)) else {}
    made = {"prompt": prompt, "negative": "", "seed": 0, "true_guidance": 1.0, **size, **time, "steps": said["steps"],
            "guidance": said["guidance"], **start, **known, "image": images, "video": video}
    made["inputs"] = {p: _digest(p) for p in (*images, video) if p}
    check(pipe, made)
    return made


def _reads(pipe: Pipeline) -> bool:
    """Whether images are read beside the latents, and not what to begin with."""
    return recipes.of(pipe.kind).image or "references" in pipeline.defaults(pipe)


def _size(pipe: Pipeline, images: Sequence[str], video: str | None) -> tuple[int, int]:
    """The pipeline's height and width; with an input about so many pixels in its shape."""
    height, width = pipeline.defaults(pipe)["size"]
    if not images and not video:
        return height, width
    shape = media.header(Path(images[0] if images else video), video=not images)[1:]
    c, factor = pipe.transformer.config, pipe.vae.config.factor if pipe.vae else 1
    ratio, units = shape[0] / shape[1], [factor * n for n in recipes.of(pipe.kind).patch(c)[-2:]]
    return tuple(max(round(sqrt(height * width * r)) // u, 1) * u for r, u in zip((ratio, 1 / ratio), units))


def _digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def check(pipe: Pipeline, t: dict[str, Any]) -> None:
    """What cannot be made is a ValueError before anything runs."""
    recipe = recipes.of(pipe.kind)
    teacache.check(t.get("reuse") or 0)
    if odd := [n for n in ("frames", "fps") if n in t and n not in pipeline.defaults(pipe)]:
        raise ValueError(f"{pipe.kind} makes pictures; they have no {' and no '.join(odd)}")
    pipeline.shape(pipe, t["height"], t["width"], t.get("frames"))
    if recipe.image and not 1 <= len(t["image"]) <= 2:
        raise ValueError(f"{pipe.kind} needs an image, its first frame, and may have a second, its last")
    if t["video"] and (recipe.image or "frames" not in t):
        raise ValueError(f"{pipe.kind} takes no video")
    if t["image"] and "frames" in t and not recipe.image:
        raise ValueError(f"{pipe.kind} takes no image; a WanImageToVideoPipeline does")
    if len(t["image"]) > 1 and not _reads(pipe):
        raise ValueError(f"{pipe.kind} begins with one image; there are {len(t['image'])}")
    scale = t["true_guidance"] if recipe.embedded else t["guidance"]
    if t["negative"] and scale <= 1:
        raise ValueError(f"a negative prompt is not read at {'true ' if recipe.embedded else ''}guidance {scale}; give "
                         "more than 1")
    if t.get("strength") is not None and not (t["image"] or t["video"]):
        raise ValueError("a strength is given, but neither an image nor a video to begin with")
    if changed := [p for p, digest in t["inputs"].items() if _digest(p) != digest]:
        raise ValueError(f"{changed[0]} is not the file that it was when this was first made")


@torch.no_grad()
def make(pipe: Pipeline, t: dict[str, Any], plans: dict | None = None,
         tell: Callable[[int, int], None] | None = None, *, strict: bool | None = False,
         count: dict[str, int] | None = None) -> Tensor:
    """Pixels [3, (T,) Y, X] of a task, on the CPU; plans: a dict that keeps what was compiled for other tasks; strict:
    of prompts that are too long, as pipeline.texts takes it; count: as pipeline.sample takes it."""
    check(pipe, t)
    recipe, plans = recipes.of(pipe.kind), {} if plans is None else plans
    device = tree.leaves(pipe.transformer.params)[0].device
    key, tile = random.key(t["seed"], device), {"tile": t["tile"]} if t.get("tile") else {}
    size = (1, *pipeline.shape(pipe, t["height"], t["width"], t.get("frames")))
    look = lambda path: gallery.picture(Path(path), t["height"], t["width"])[None].to(device)
    sides = t.get("frames"), t["height"], t["width"]
    cond, start = pipeline.texts(pipe, [t["prompt"]], strict=strict), None
    if recipe.image:
        cond |= pipeline.conditions(pipe, look(t["image"][0]), t["frames"], *map(look, t["image"][1:]), **tile)
    elif t["image"] and _reads(pipe):
        cond |= {"image_latents": [pipeline.latents(pipe, _reference(pipe, p, t), **tile) for p in t["image"]]}
    elif t["image"] or t["video"]:
        x = look(t["image"][0]) if t["image"] else gallery.clip(Path(t["video"]), *sides, t["fps"])[None]
        start = pipeline.latents(pipe, x.to(device), random.fold_in(key, "image")[None] if t["image"] else None,
                                 **tile), t["strength"]
    scale = t["true_guidance"] if recipe.embedded else t["guidance"]
    uncond = pipeline.texts(pipe, [t["negative"]], strict=strict) if scale > 1 else None
    how = {k: t[k] for k in HOW if t.get(k) is not None} | {"strength": t.get("strength") if start else None}
    kind = json.dumps([size, how])
    plans[kind] = plans.get(kind) or pipeline.plan(pipe, size, **how)
    z = pipeline.sample(pipe, cond, uncond, size, key=key[None], start=start, made=plans[kind], tell=tell,
                        count=count)
    return pipeline.pixels(pipe, z, names=[f"prompt {t['prompt']!r} with seed {t['seed']}"], **tile)[0].cpu()


def _reference(pipe: Pipeline, path: str, t: dict[str, Any]) -> Tensor:
    """An image to look at, in the nearest of the sizes that the model was trained with, or cut to whole patches."""
    image, factor = media.image(Path(path)), pipe.vae.config.factor if pipe.vae else 1
    sizes = pipeline.defaults(pipe)["references"] if t.get("references", "trained") == "trained" else [image.size]
    width, height = min(sizes, key=lambda wh: abs(image.width / image.height - wh[0] / wh[1]))
    rows, columns = (factor * n for n in recipes.of(pipe.kind).patch(pipe.transformer.config)[-2:])
    device = tree.leaves(pipe.transformer.params)[0].device
    return gallery.resized(image, height // rows * rows, width // columns * columns)[None].to(device)


def show(folder: Path, pipe: Pipeline, tasks: Sequence[dict], *, step: int = 0, said: dict | None = None,
         plans: dict | None = None, tell: Callable[[int, dict], None] | None = None, strict: bool = False,
         each: Callable = map) -> list[dict]:
    """Make all tasks, write their files below a folder, and add their rows to its gallery.jsonl.

    step: of training, which names the files too. said: what every file says besides its task. tell gets (which, row).
    Prompts that are too long are cut with one warning for all, or refused when strict. each: map, or what lets ranks
    take turns.
    """
    folder, rows, plans = Path(folder), [], {} if plans is None else plans
    pipeline.check(pipe, list({t["prompt"]: None for t in tasks}), strict=strict)

    def one(item: tuple[dict, str]) -> dict:
        t, name = item
        stem = folder / f"step-{step:06d}" / name if step else folder / name
        count: dict[str, int] = {}
        file = gallery.save(stem, make(pipe, t, plans, strict=None, count=count), t | (said or {}), t.get("fps", 16))
        row = {"step": step, "prompt": t["prompt"], "seed": t["seed"], "file": str(file.relative_to(folder))}
        return row | (count if t.get("reuse") else {})

    for i, row in enumerate(each(one, list(zip(tasks, gallery.names([t["prompt"] for t in tasks]))))):
        rows.append(row)
        if shard.rank()[0]:
            continue
        with (folder / "gallery.jsonl").open("a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")
        if tell:
            tell(i, row)
    return rows
