"""Low-rank adaptation (Hu et al. 2021) as a change of the parameter tree; PEFT's files in and out.

linear() adds the path y + lora_scale * B(A(x)) where it finds lora_a; lora_scale is a leaf that is never trained.
"""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmfunc import keys, tree
from mmfunc.tree import Param, Tree, normal

TRAINED = r"\.lora_[ab]$"  # the rule for what is trained


def LoRA(params: Tree, rank: int, where: str, alpha: float | None = None) -> Tree:
    """Declare lora_a [rank, in] and lora_b [out, rank] beside each dense weight whose dotted name (without .weight)
    matches.

    Where nothing matches, a ValueError. The path is scaled by alpha / rank (alpha None: 1), and starts as zero.
    """
    flat = tree.flatten(params)
    targets = [n.removesuffix(".weight") for n, p in flat.items()
               if n.endswith(".weight") and p.axes.count(" ") == 1 and "vocab" not in p.axes]
    chosen = {n for n in targets if re.search(where, n)}
    if not chosen:
        raise ValueError(
            f"the LoRA rule {where!r} matches none of the {len(targets)} dense maps, such as {', '.join(targets[:3])}"
        )
    factor = 1.0 if alpha is None else alpha / rank
    return _with(params, lambda n, p: {**p, **_pair(p["weight"], rank, factor)} if n in chosen else p)


def _with(params: Tree, fn, name: str = "") -> Tree:
    """fn(name, dict) on each dict that holds a weight."""
    if isinstance(params, (list, tuple)):
        return type(params)([_with(p, fn, f"{name}.{i}" if name else str(i)) for i, p in enumerate(params)])
    if not isinstance(params, dict):
        return params
    made = {k: _with(p, fn, f"{name}.{k}" if name else k) for k, p in params.items()}
    return fn(name, made) if "weight" in made else made


def _pair(weight: Param, rank: int, factor: float) -> dict[str, Param]:
    (out, width), (dst, src) = weight.shape, weight.axes.split()
    return {"lora_a": Param((rank, width), f"_ {src}", normal(width**-0.5)), "lora_b": Param((out, rank), f"{dst} _"),
            "lora_scale": Param((), "", lambda key, shape: torch.full(shape, factor, device=key.device))}


def merge(params: Tree) -> Tree:
    """The same network without adapters: their product is added to the weights."""
    def one(name: str, p: dict) -> dict:
        if "lora_a" not in p:
            return p
        delta = (p["lora_b"].float() @ p["lora_a"].float()) * p["lora_scale"].float()
        return {k: v for k, v in p.items() if not k.startswith("lora_")} | {
            "weight": (p["weight"] + delta).to(p["weight"].dtype)
        }

    return _with(params, one)


def base(params: Tree) -> Tree:
    """The tree without its adapters, nothing merged."""
    return _with(params, lambda name, p: {k: v for k, v in p.items() if not k.startswith("lora_")})


def _modules(params: Tree, table: keys.Table) -> dict[str, str]:
    """Their module path of each of our adapted maps."""
    flat = tree.flatten(params)
    ours = [n.removesuffix(".lora_a") for n in flat if n.endswith(".lora_a")]
    places = keys.lookup({f"{n}.weight": flat[f"{n}.weight"] for n in ours}, table)
    if cut := [n for n in ours if not places[f"{n}.weight"].whole]:
        raise ValueError(
            f"{cut[0]} is part of {places[cut[0] + '.weight'].name} in published files: PEFT has no adapter for a "
            "part; leave it out of the LoRA rule, or merge"
        )
    return {n: places[f"{n}.weight"].name.removesuffix(".weight") for n in ours}


def export(folder: Path, params: Tree, table: keys.Table, *, base_model: str = "", prefix: str = "") -> None:
    """Write adapter_config.json and adapter_model.safetensors as PEFT reads them.

    prefix: what stands before published names within the model object ("model." for a language half held deeper).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    modules = _modules(params, table)
    at = {n: tree.at(params, n) for n in modules}
    rank, factor = next(iter(at.values()))["lora_a"].shape[0], float(next(iter(at.values()))["lora_scale"])
    out = {f"base_model.model.{prefix}{there}.lora_{ab}.weight": at[n][f"lora_{ab.lower()}"].detach().cpu().contiguous()
           for n, there in modules.items() for ab in "AB"}
    said = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": factor * rank, "lora_dropout": 0.0,
            "bias": "none", "target_modules": sorted({prefix + m for m in modules.values()}), "use_rslora": False,
            "base_model_name_or_path": base_model, "inference_mode": True}
    save_file(out, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(said, indent=2) + "\n")


def load(
    folder: Path, declared: Tree, params: Tree, table: keys.Table, spellings: dict[str, str] | None = None
) -> tuple[Tree, Tree]:
    """(declaration, parameters) of declared and params with the adapters of a PEFT folder beside them."""
    folder = Path(folder)
    said = json.loads((folder / "adapter_config.json").read_text())
    if said.get("peft_type") != "LORA" or said.get("use_dora") or said.get("rank_pattern") or said.get("alpha_pattern"):
        raise ValueError(
            f"{folder} is no plain LoRA adapter: peft_type {said.get('peft_type')!r}, "
            f"use_dora {said.get('use_dora')!r}, rank_pattern {said.get('rank_pattern')!r}, "
            f"alpha_pattern {said.get('alpha_pattern')!r}"
        )
    rank = said["r"]
    factor = said["lora_alpha"] / (rank**0.5 if said.get("use_rslora") else rank)
    found = load_file(folder / "adapter_model.safetensors")
    flat = tree.flatten(declared)
    weights = {n: p for n, p in flat.items() if n.endswith(".weight") and len(p.shape) == 2 and "vocab" not in p.axes}
    ours = {
        p.name.removesuffix(".weight"): n.removesuffix(".weight")
        for n, p in keys.lookup(weights, table).items()
        if p.whole
    }
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, t in found.items():
        module, _, ab = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        there = next(
            (new + module[len(old) :] for old, new in (spellings or {}).items() if module.startswith(old)), module
        )
        if there not in ours or ab not in ("A", "B"):
            raise ValueError(
                f"{name} of {folder} belongs to no dense map of the model, such as {', '.join([*ours][:3])}"
            )
        pairs.setdefault(ours[there], {})[f"lora_{ab.lower()}"] = t
    tree_of = LoRA(declared, rank, "^(" + "|".join(map(re.escape, pairs)) + ")$", factor * rank)
    filled = _with(params, lambda n, p: p | pairs[n] | {"lora_scale": torch.tensor(factor)} if n in pairs else p)
    for name, p in tree.flatten(tree_of).items():
        if ".lora_" in name and tuple(tree.at(filled, name).shape) != p.shape:
            raise ValueError(
                f"{name} has the shape {p.shape} in the model, {tuple(tree.at(filled, name).shape)} in {folder}"
            )
    return tree_of, filled
