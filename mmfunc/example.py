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
    tokens: int = 0  # of a row of text, pictures included
    caption: int = 0  # tokens of what describes a picture or video
    height: int = 0  # of a picture or video, in pixels
    width: int = 0  # the height, if only that is given
    frames: int = 0  # of a video
    packed: bool = False  # two samples in a row of text

    def sides(self, height: int, width: int) -> tuple[int, int]:
        """(height, width), of these where none are given."""
        return (self.height, self.width or self.height) if self.height else (height, self.width or width)


def drawn(*size: int, seed: int = 0) -> Tensor:
    """Normal numbers, the same in each call."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def words(c: Any, s: Sizes) -> dict[str, Tensor]:
    """Rows of text."""
    n = s.tokens or 64
    ids = torch.randint(0, c.vocab // 2, (s.batch, n), generator=torch.Generator().manual_seed(0))
    if not s.packed:
        return {"input_ids": ids, "labels": ids}
    mask = 1 + (torch.arange(n) >= n // 3).long().expand(s.batch, n)
    place = torch.where(mask == 1, torch.arange(n), torch.arange(n) - n // 3)
    return {"input_ids": ids, "labels": ids, "attention_mask": mask, "position_ids": place}


def pictures(c: Any, s: Sizes, family: ModuleType, draw: Callable) -> dict[str, Tensor]:
    """Rows of text with one picture each."""
    unit = c.patch * c.merge
    high, wide = (max(n // unit, 1) * c.merge for n in s.sides(6 * unit, 6 * unit))
    n = high * wide // c.merge**2
    if s.tokens and s.tokens < n + 7:
        raise ValueError(f"a picture of {high * c.patch} x {wide * c.patch} pixels is {n} tokens: a row of {s.tokens} "
                         f"cannot hold it; it needs {n + 7}")
    ids = words(c.text, replace(s, tokens=s.tokens or 66 + n, packed=False))["input_ids"]
    ids = ids % min(c.text.vocab // 2, c.start_token)
    ids[:, 5], ids[:, 6 : 6 + n], ids[:, 6 + n] = c.start_token, c.image_token, c.end_token
    pixels = draw(s.batch * high * wide, c.channels * c.frames * c.patch**2)
    made = {"input_ids": ids, "labels": ids, "pixel_values": pixels,
            "image_grid_thw": torch.tensor([[1, high, wide]] * s.batch)}
    return family.prepare(c, made, patches=len(pixels), row=high * wide)


def noisy(c: Any, s: Sizes, run: dict[str, Any], draw: Callable) -> dict[str, Tensor]:
    """Latents of a pipeline's size, noise, levels and hidden text."""
    high, wide = s.sides(*run.get("size", (48, 80)))
    video = hasattr(c, "patch")
    time = [((s.frames or run.get("frames", 5)) - 1) // 4 + 1] if video else []
    shape, n = (s.batch, c.channels, *time, high // 8, wide // 8), s.caption or run.get("length", 16)
    made = {"latents": draw(*shape), "noise": draw(*shape, seed=1), "t": torch.full((s.batch,), 0.5),
            "encoder_hidden_states": draw(s.batch, n, c.text)}
    if not video:
        made |= {"guidance": torch.full((s.batch,), 3.0)} if c.guidance else {}
        return made | {"pooled_projections": draw(s.batch, c.pooled)}
    if not c.image:
        return made
    tokens = draw(2 * s.batch, c.places // 2, c.image) if c.places else draw(s.batch, 257, c.image)
    return made | {"condition": draw(s.batch, c.condition, *shape[2:]), "encoder_hidden_states_image": tokens}


def batch(name: str, family: ModuleType, c: Any, s: Sizes, draw: Callable = drawn) -> dict[str, Tensor]:
    """What the loss of a family reads; name is family:preset, or anything if c is a preset's. draw: (*size, seed) ->
    the numbers in it."""
    kind, preset = family.__name__.rpartition(".")[2], name.partition(":")[2]
    preset = preset or next((n for n, known in family.PRESETS.items() if known == c), "")
    if kind == "qwen2vl":
        return pictures(c, s, family, draw)
    if kind in ("wan", "flux"):
        return noisy(c, s, family.PARTS.get(preset, {}), draw)
    if kind in ("sd_vae", "wan_vae"):
        time = [s.frames or 5] if kind == "wan_vae" else []
        return {"pixel_values": draw(s.batch, c.channels, *time, *s.sides(48, 48))}
    if getattr(c, "kind", "") == "vision":
        return {"pixel_values": draw(s.batch, c.channels, c.image, c.image)}
    if hasattr(family, "loss"):
        return words(c, s)
    return {"input_ids": words(c, replace(s, tokens=min(s.tokens or 64, getattr(c, "tokens", 512))))["input_ids"]}


def abstract(name: str, family: ModuleType, c: Any, s: Sizes) -> dict[str, Tensor]:
    """The same as shapes only, with num_items_in_batch."""
    made = batch(name, family, c, s, lambda *size, seed=0: torch.zeros(()).expand(size))
    made |= {"num_items_in_batch": torch.zeros((), dtype=torch.int64)}
    return tree.map(lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta") if isinstance(t, Tensor) else t, made)


def loss(family: ModuleType, c: Any) -> Callable[[Tree, dict], Tensor]:
    """(parameters, batch) -> the loss, for an encoder the mean square of what it says."""
    if hasattr(family, "loss"):
        return lambda p, b: family.loss(p, c, b)
    return lambda p, b: sum(t.float().square().mean() for t in tree.leaves(family.forward(p, c, b)))
