"""One file per family: Config, PRESETS, params, forward, loss, KEYS, config, hub."""

import pkgutil
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mmfunc import hub, keys, shard, tree
from mmfunc.tree import Tree

HUB = {  # model_type in config.json, or diffusers' _class_name: family
    "qwen2": "qwen2", "qwen2_vl": "qwen2vl", "qwen2_5_vl": "qwen2vl",
    "t5": "t5", "mt5": "t5", "umt5": "t5", "clip": "clip", "clip_text_model": "clip", "clip_vision_model": "clip",
    "WanTransformer3DModel": "wan", "FluxTransformer2DModel": "flux",
    "AutoencoderKL": "sd_vae", "AutoencoderKLWan": "wan_vae",
}


def names() -> list[str]:
    """The families."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


def get(name: str) -> tuple[ModuleType, Any]:
    """"qwen2vl:2.5-7b" -> (its family, its Config)."""
    family, _, preset = name.partition(":")
    if family not in names():
        raise ValueError(f"there is no family {family!r}; there are {', '.join(names())}")
    module = import_module(f"{__name__}.{family}")
    if preset not in module.PRESETS:
        raise ValueError(f"{family} has no preset {preset!r}; it has {', '.join(module.PRESETS)}")
    return module, module.PRESETS[preset]


def family(folder: Path) -> tuple[ModuleType, Any]:
    """The family and the Config of a model folder, from its config.json."""
    said = hub.config(folder)
    kind = said.get("model_type", said.get("_class_name"))
    if kind not in HUB:
        raise ValueError(f"{folder}/config.json says model_type (or _class_name) {kind!r}; known are {', '.join(HUB)}")
    module = import_module(f"{__name__}.{HUB[kind]}")
    try:
        return module, module.config(said)
    except KeyError as e:
        raise ValueError(f"{folder}/config.json lacks {e}, which {kind} needs") from e


def table(module: ModuleType, c: Any) -> keys.Table:
    """The names of a family's parameters in published files."""
    return module.KEYS(c) if callable(module.KEYS) else module.KEYS


def spellings(module: ModuleType, c: Any) -> dict[str, str]:
    """Other prefixes of those names, and what they stand for."""
    found = getattr(module, "SPELLINGS", {})
    return found(c) if callable(found) else found


def load(folder: Path, dtype: torch.dtype | None = None, device: str = "cpu", *, parts: bool = False
         ) -> tuple[ModuleType, Any, Tree]:
    """(family, Config, parameters) of a hub folder; dtype None keeps that of the file. Where a family has a rule WIDE,
    what it matches gets no dtype below float32. parts: as shard.place gives them, and no more is read."""
    module, c = family(folder)
    boxes = shard.boxes(tree.flatten(module.params(c))) if parts else None
    params = hub.read(folder, module.params(c), table(module, c), spellings=spellings(module, c), dtype=dtype,
                      wide=getattr(module, "WIDE", None), device=device, boxes=boxes)
    return module, c, shard.filled(params) if parts else params


def start(folder: Path, declared: Tree, key: Tensor, device: str = "cpu", *, scratch: bool = False) -> Tree:
    """What training starts from, this rank's part of it in float32; of what other stages have, shapes only.

    What is declared beyond the folder's parameters, such as low-rank paths, is random by the key; with scratch all is.
    """
    known = {} if scratch else load(folder, torch.float32, device, parts=True)[2]
    drawn = shard.place(tree.init(tree.without(declared, known), key))
    return tree.merge(known, tree.put(drawn, device))


def export(folder: Path, module: ModuleType, c: Any, params: Tree, *, like: Path | None = None,
           dtype: torch.dtype | None = None) -> None:
    """Write a hub folder; config.json and the tokenizer's and processor's files come from the folder `like` if
    given."""
    said = hub.config(like) if like else module.hub(c)
    hub.write(folder, params, module.params(c), table(module, c), said, like=like, dtype=dtype)
