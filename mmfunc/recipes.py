"""How each kind of diffusers pipeline is put together and run: a row a kind, so that a new family is new rows."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.functional import pad

from mmfunc import prompts
from mmfunc.models import flux, wan
from mmfunc.tree import Tree


@dataclass(frozen=True)
class Part:
    """One model of a pipeline; params None: only its config was read."""

    family: Any
    config: Any
    params: Tree = None


@dataclass(frozen=True)
class Encoder:
    """A text encoder of a pipeline."""

    folder: str
    tokenizer: str
    features: Callable[[Part, Tensor, Tensor], dict[str, Tensor]]  # of input_ids, attention_mask [1, S]
    most: int | None = None  # tokens of a prompt; None: as long as the caller says


@dataclass(frozen=True)
class Recipe:
    """A kind of pipeline."""

    family: ModuleType  # of the transformer
    text: tuple[Encoder, ...]
    like: Callable[[Any], str]  # Config of the transformer -> the preset in PARTS whose settings are the defaults
    patch: Callable[[Any], tuple[int, ...]]  # Config of the transformer -> latents of a patch: (time,) rows, columns
    options: Callable[[dict, int], dict]  # scheduler_config.json, steps -> options of the sampler
    clean: Callable[[str], str] = str  # what is done to a prompt
    embedded: bool = False  # guidance is an input of the transformer
    up: bool = True  # a start from latents rounds the steps left out up
    image: bool = False  # a first frame is given, and is looked at by CLIP


def words(part: Part, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """T5's features of every token, padding among them."""
    return {"encoder_hidden_states": part.family.forward(part.params, part.config, {"input_ids": ids})}


def ended(part: Part, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """T5's features of a prompt, and zeros behind its end."""
    n = int(mask.sum())
    x = part.family.forward(part.params, part.config, {"input_ids": ids[:, :n]})
    return {"encoder_hidden_states": pad(x, (0, 0, 0, ids.shape[1] - n))}


def pooled(part: Part, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """CLIP's one vector."""
    return {"pooled_projections": part.family.forward(part.params, part.config, {"input_ids": ids})["pooled"]}


def own_sigmas(scheduler: dict, steps: int) -> dict:
    """FLUX's sigmas, in equal steps before they are shifted."""
    return {} if scheduler.get("use_flow_sigmas") else {"sigmas": np.linspace(1, 1 / steps, steps)}


WAN = Recipe(wan, (Encoder("text_encoder", "tokenizer", ended),), lambda c: "t2v-1.3b", lambda c: c.patch,
             lambda scheduler, steps: {}, prompts.clean)
FLUX = Recipe(flux, (Encoder("text_encoder", "tokenizer", pooled, 77), Encoder("text_encoder_2", "tokenizer_2", words)),
              lambda c: "dev" if c.guidance else "schnell", lambda c: flux.PATCH, own_sigmas, embedded=True, up=False)
KINDS = {
    "WanPipeline": WAN,
    "WanVideoToVideoPipeline": WAN,
    "WanImageToVideoPipeline": replace(WAN, like=lambda c: "flf2v-14b" if c.places else "i2v-14b-480p", image=True),
    "FluxPipeline": FLUX,
    "FluxImg2ImgPipeline": FLUX,
    "FluxKontextPipeline": replace(FLUX, like=lambda c: "kontext"),
}


def of(kind: str) -> Recipe:
    """The recipe of a pipeline's _class_name."""
    if kind not in KINDS:
        raise ValueError(f"pipelines of kind {kind!r} are not known; there are {', '.join(KINDS)}")
    return KINDS[kind]
