"""A batch for the loss of any family, of given sizes or those of its pipeline: to lower and to try programs."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mmfunc import tree
from mmfunc.tree import Tree


@dataclass(frozen=True)
class Sizes:
    """How large a batch is; 0 stands for what the pipeline of the model takes, or else for something small."""

    batch: int = 1
    tokens: int = 0  # of a row of text
    pixels: int = 0  # side of a picture or video
    frames: int = 0  # of a video
    packed: bool = False  # two samples in a row of text


def _draw(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


def words(c: Any, s: Sizes) -> dict[str, Tensor]:
    """Rows of text."""
    n = s.tokens or 64
    ids = torch.randint(0, c.vocab // 2, (s.batch, n), generator=torch.Generator().manual_seed(0))
    if not s.packed:
        return {"input_ids": ids, "labels": ids}
    mask = 1 + (torch.arange(n) >= n // 3).long().expand(s.batch, n)
    place = torch.where(mask == 1, torch.arange(n), torch.arange(n) - n // 3)
    return {"input_ids": ids, "labels": ids, "attention_mask": mask, "position_ids": place}


def pictures(c: Any, s: Sizes, family: ModuleType) -> dict[str, Tensor]:
    """Rows of text with one square picture each."""
    unit = c.patch * c.merge
    side = (s.pixels or 6 * unit) // unit * c.merge
    n = side * side // c.merge**2
    text = words(c.text, replace(s, tokens=(s.tokens or 64) + n + 2, packed=False))
    ids = text["input_ids"] % min(c.text.vocab // 2, c.start_token)
    ids[:, 5], ids[:, 6 : 6 + n], ids[:, 6 + n] = c.start_token, c.image_token, c.end_token
    pixels = _draw(s.batch * side * side, c.channels * c.frames * c.patch**2)
    made = {"input_ids": ids, "labels": ids, "pixel_values": pixels,
            "image_grid_thw": torch.tensor([[1, side, side]] * s.batch)}
    return family.prepare(c, made, patches=len(pixels), row=side * side)


def noisy(c: Any, s: Sizes, run: dict[str, Any]) -> dict[str, Tensor]:
    """Latents of a pipeline's size, noise, levels and hidden text."""
    high, wide = (s.pixels or n for n in run.get("size", (48, 80)))
    video = hasattr(c, "patch")
    time = [((s.frames or run.get("frames", 5)) - 1) // 4 + 1] if video else []
    shape, n = (s.batch, c.channels, *time, high // 8, wide // 8), s.tokens or run.get("length", 16)
    made = {"latents": _draw(*shape), "noise": _draw(*shape).flip(0, -1), "t": torch.full((s.batch,), 0.5),
            "encoder_hidden_states": _draw(s.batch, n, c.text)}
    if not video:
        made |= {"guidance": torch.full((s.batch,), 3.0)} if c.guidance else {}
        return made | {"pooled_projections": _draw(s.batch, c.pooled)}
    if not c.image:
        return made
    tokens = _draw(2 * s.batch, c.places // 2, c.image) if c.places else _draw(s.batch, 257, c.image)
    return made | {"condition": _draw(s.batch, c.condition, *shape[2:]), "encoder_hidden_states_image": tokens}


def batch(name: str, family: ModuleType, c: Any, s: Sizes) -> dict[str, Tensor]:
    """What the loss of a family reads; name is family:preset."""
    kind, _, preset = name.partition(":")
    if kind == "qwen2vl":
        return pictures(c, s, family)
    if kind in ("wan", "flux"):
        return noisy(c, s, family.PARTS.get(preset, {}))
    if kind in ("sd_vae", "wan_vae"):
        time = [s.frames or 5] if kind == "wan_vae" else []
        return {"pixel_values": _draw(s.batch, c.channels, *time, s.pixels or 48, s.pixels or 48)}
    if getattr(c, "kind", "") == "vision":
        return {"pixel_values": _draw(s.batch, c.channels, c.image, c.image)}
    rows = words(c, replace(s, tokens=min(s.tokens or 64, getattr(c, "tokens", 512))))
    return rows if hasattr(family, "loss") else {"input_ids": rows["input_ids"]}


def loss(family: ModuleType, c: Any) -> Callable[[Tree, dict], Tensor]:
    """(parameters, batch) -> the loss, for an encoder the mean square of what it says."""
    if hasattr(family, "loss"):
        return lambda p, b: family.loss(p, c, b)
    return lambda p, b: sum(t.float().square().mean() for t in tree.leaves(family.forward(p, c, b)))
