"""The public implementations at tiny size, their weights drawn anew, and inputs that are hard: odd grids, padding,
videos.

Published initialisations are zero in places and hide errors, so every parameter is re-drawn.
"""

from dataclasses import replace
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mmfunc import keys, models, tree

CASES = ("qwen2:tiny", "qwen2:tied", "qwen2vl:tiny", "qwen2vl:tied", "qwen2vl:tiny-2")


def config(name: str) -> tuple[ModuleType, Any]:
    family, _, preset = name.partition(":")
    module, c = models.get(f"{family}:{'tiny' if preset == 'tied' else preset}")
    if preset == "tied":
        c = replace(c, tied=True) if family == "qwen2" else replace(c, text=replace(c.text, tied=True))
    return module, c


def redraw(ref: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Matrices N(0, 1/fan_in), embeddings N(0, 0.5), norms 1 + 0.15 N, biases 0.1 N."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for n, p in ref.named_parameters():
            r = torch.randn(p.shape, generator=g)
            if "embed_tokens" in n:
                p.copy_(0.5 * r)
            elif p.ndim > 1:
                p.copy_(r * p[0].numel() ** -0.5)
            else:
                p.copy_(1 + 0.15 * r if n.endswith("weight") else 0.1 * r)
    return ref


@cache
def reference(name: str) -> torch.nn.Module:
    module, c = config(name)
    said = module.hub(c)
    made = CONFIG_MAPPING[said["model_type"]](
        **{k: v for k, v in said.items() if k not in ("model_type", "architectures")}
    )
    auto = AutoModelForCausalLM if module.__name__.endswith("qwen2") else AutoModelForImageTextToText
    return redraw(auto.from_config(made, attn_implementation="eager").float().eval())


def published(name: str) -> dict[str, Tensor]:
    """The reference's parameters under published names."""
    from mmfunc.hub import respelled

    spellings = models.spellings(*config(name))
    return {respelled(n, spellings): p for n, p in reference(name).named_parameters()}


def ours(name: str) -> tuple[dict, dict[str, keys.Place]]:
    """The same parameters as our tree, and where each of them lies in published files."""
    module, c = config(name)
    declared = module.params(c)
    flat = tree.flatten(declared)
    places = keys.lookup(flat, models.table(module, c))
    theirs = published(name)
    keys.check(flat, places, {k: tuple(v.shape) for k, v in theirs.items()})
    loaded = dict(keys.load(flat, places, lambda n: theirs[n].detach()))
    return tree.unflatten(loaded, declared), places


def batch(name: str, left: bool = False) -> dict[str, Tensor]:
    """Three rows of different lengths; for VLMs images of odd sizes, a video, and a row of text only."""
    c = config(name)[1]
    g = torch.Generator().manual_seed(1)
    words = lambda n: torch.randint(0, 140, (n,), generator=g).tolist()
    extra: dict[str, Tensor] = {}
    if name.startswith("qwen2:"):
        rows = [words(150), words(131), words(7)]
    else:
        images, video = [[1, 6, 10], [1, 4, 14], [1, 2, 2]], [[3, 6, 4]]
        run = lambda grid, token: [c.start_token] + [token] * (int(np.prod(grid)) // 4) + [c.end_token]
        rows = [words(3) + run(images[0], c.image_token) + words(4) + run(images[1], c.image_token) + words(5),
                words(2) + run(video[0], c.video_token) + words(7) + run(images[2], c.image_token) + words(2), words(9)]
        pixels = lambda grids: torch.randn(sum(int(np.prod(x)) for x in grids), 3 * 2 * c.patch**2, generator=g)
        extra = {
            "pixel_values": pixels(images),
            "image_grid_thw": torch.tensor(images),
            "pixel_values_videos": pixels(video),
            "video_grid_thw": torch.tensor(video),
        }
        extra |= {"second_per_grid_ts": torch.tensor([1.5])} if c.window else {}
    size = max(map(len, rows))
    pad = lambda r, v: [v] * (size - len(r)) + r if left else r + [v] * (size - len(r))
    ids = torch.tensor([pad(r, 0) for r in rows])
    mask = torch.tensor([pad([1] * len(r), 0) for r in rows])
    labels = torch.where((mask == 1) & (ids < 140), ids, -100)
    labels[torch.arange(3), mask.argmax(1)] = -100  # what a padded position would predict
    return {"input_ids": ids, "attention_mask": mask, "labels": labels} | extra


def hub_batch(name: str, b: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the reference wants besides."""
    c = config(name)[1]
    if name.startswith("qwen2:"):
        return b
    return b | {
        "mm_token_type_ids": (b["input_ids"] == c.image_token).int() + 2 * (b["input_ids"] == c.video_token).int()
    }


def prepared(name: str, b: dict[str, Tensor], **how: Any) -> dict[str, Tensor]:
    module, c = config(name)
    return module.prepare(c, b, rule="5.23", **how) if hasattr(module, "prepare") else b
