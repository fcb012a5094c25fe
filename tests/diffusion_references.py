"""diffusers' transformers at tiny size, their weights drawn anew, and inputs that are hard: odd grids, several frames,
hidden text, several references."""

from functools import cache
from types import ModuleType
from typing import Any

import diffusers
import torch
from peft import LoraConfig
from references import redraw
from torch import Tensor

from mmfunc import keys, models, tree

CASES = ("wan:tiny", "wan:tiny-i2v", "wan:tiny-flf2v", "flux:tiny", "flux:tiny-schnell")


def made(module: ModuleType, c: Any) -> torch.nn.Module:
    """diffusers' model with the numbers of a Config."""
    said = module.hub(c)
    return getattr(diffusers, said["_class_name"])(**{k: v for k, v in said.items() if not k.startswith("_")})


@cache
def reference(name: str) -> torch.nn.Module:
    return redraw(made(*models.get(name)).eval())


def ours(name: str, ref: torch.nn.Module | None = None) -> tuple[dict, dict[str, keys.Place]]:
    """The parameters of a reference as our tree, and where each of them lies there."""
    module, c = models.get(name)
    declared = module.params(c)
    flat = tree.flatten(declared)
    places = keys.lookup(flat, models.table(module, c))
    theirs = dict((ref or reference(name)).named_parameters())
    keys.check(flat, places, {k: tuple(v.shape) for k, v in theirs.items()})
    return tree.unflatten(dict(keys.load(flat, places, lambda n: theirs[n].detach())), declared), places


def batch(name: str, shape: tuple[int, ...] | None = None) -> dict[str, Any]:
    """What loss reads: two samples of odd grids; for image-to-video 512 text tokens, as diffusers wants there."""
    _, c = models.get(name)
    g = torch.Generator().manual_seed(2)
    draw = lambda *size: torch.randn(size, generator=g)
    wan = name.startswith("wan")
    shape = shape or ((3, 6, 10) if wan else (6, 10))
    out = {"latents": draw(2, c.channels, *shape), "noise": draw(2, c.channels, *shape), "t": torch.tensor([0.83, 0.27])}
    out["encoder_hidden_states"] = draw(2, 512 if wan and c.image else 7, c.text)
    if not wan:
        out["pooled_projections"] = draw(2, c.pooled)
        return out | ({"guidance": torch.tensor([3.5, 1.0])} if c.guidance else {})
    if c.condition:
        out["condition"] = draw(2, c.condition, *shape)
        out["encoder_hidden_states_image"] = draw(4, 5, c.image) if c.places else draw(2, 9, c.image)
    return out


def packed(x: Tensor) -> Tensor:
    """FLUX's latents as its pipeline gives them to the transformer."""
    return diffusers.FluxPipeline._pack_latents(x, *x.shape)


def place(x: Tensor) -> Tensor:
    return diffusers.FluxPipeline._prepare_latent_image_ids(len(x), x.shape[2] // 2, x.shape[3] // 2, "cpu", x.dtype)


def inputs(name: str, b: dict[str, Any], x: Tensor) -> dict[str, Tensor]:
    """What the reference's forward reads."""
    kept = {k: v for k, v in b.items() if k.startswith(("encoder_hidden", "pooled", "guidance"))}
    if name.startswith("wan"):
        x = torch.cat([x, b["condition"]], 1) if "condition" in b else x
        return kept | {"hidden_states": x, "timestep": 1000 * b["t"]}
    found, places = [packed(x)], [place(x)]
    for y in b.get("image_latents", ()):
        found.append(packed(y))
        places.append(place(y))
        places[-1][:, 0] = len(places) - 1
    return kept | {"hidden_states": torch.cat(found, 1), "timestep": b["t"], "img_ids": torch.cat(places),
                   "txt_ids": torch.zeros(kept["encoder_hidden_states"].shape[1], 3)}


def velocity(name: str, b: dict[str, Any], x: Tensor, ref: torch.nn.Module | None = None) -> Tensor:
    """The reference's prediction in the layout of x."""
    y = (ref or reference(name))(**inputs(name, b, x), return_dict=False)[0]
    if name.startswith("wan"):
        return y
    size = [8 * n for n in x.shape[2:]]
    return diffusers.FluxPipeline._unpack_latents(y[:, : packed(x).shape[1]], *size, 8)


def theirs(name: str, b: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Prediction, loss and gradients of the reference; samples are weighted."""
    ref = reference(name)
    ref.zero_grad()
    t = b["t"].view(-1, *[1] * (b["latents"].ndim - 1))
    y = velocity(name, b, (1 - t) * b["latents"] + t * b["noise"])
    errors = (y - (b["noise"] - b["latents"])).pow(2).flatten(1).mean(1)
    weight = b.get("weight", torch.ones(len(errors)))
    loss = (errors * weight).sum() / b.get("num_items_in_batch", weight.sum())
    loss.backward()
    grads = {k: torch.zeros_like(p) if p.grad is None else p.grad.clone() for k, p in ref.named_parameters()}
    return y.detach(), loss.detach(), grads


def adapters(ref: torch.nn.Module, targets: list[str], ranks: dict[str, int], alphas: dict[str, float]) -> None:
    """Give a reference random adapters; ranks and alphas by pattern, 4 and 8 elsewhere."""
    ref.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=targets, rank_pattern=ranks, alpha_pattern=alphas))
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for n, p in ref.named_parameters():
            if "lora_" in n:
                p.copy_(torch.randn(p.shape, generator=g) * p[0].numel() ** -0.5)
