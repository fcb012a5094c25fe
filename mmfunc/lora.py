"""Low-rank adaptation (Hu et al. 2021) as a change of the parameter tree; PEFT's and diffusers' files in and out.

linear() adds the path y + lora_scale * B(A(x)) where it finds lora_a; lora_scale is a leaf that is never trained.
"""

import json
import re
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmfunc import keys, tree
from mmfunc.tree import Param, Tree, normal

TRAINED = r"\.lora_[ab]$"  # the rule for what is trained
WEIGHTS = "pytorch_lora_weights.safetensors"  # of diffusers


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
    return tree.maps(lambda n, p: {**p, **_pair(p["weight"], rank, factor)} if n in chosen else p, params)


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

    return tree.maps(one, params)


def base(params: Tree) -> Tree:
    """The tree without its adapters, nothing merged."""
    return tree.maps(lambda name, p: {k: v for k, v in p.items() if not k.startswith("lora_")}, params)


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
    ours = {there: maps[0][0] for there, maps in _places(declared, table).items() if maps[0][1].whole}
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
        pairs.setdefault(ours[there], {"lora_scale": torch.tensor(factor)})[f"lora_{ab.lower()}"] = t
    return _beside(declared, params, pairs, folder)


def _beside(declared: Tree, params: Tree, pairs: dict[str, dict[str, Tensor]], file: Path) -> tuple[Tree, Tree]:
    """(declaration, parameters) with the adapters of a file, {our map: lora_a, lora_b, lora_scale}, beside them."""
    wide = {}
    for name, pair in pairs.items():
        if pair.keys() != {"lora_a", "lora_b", "lora_scale"}:
            raise ValueError(f"{file} has only one half of the adapter of {name}")
        wide[name] = _pair(tree.at(declared, name)["weight"], len(pair["lora_a"]), pair["lora_scale"].item())
        for half in ("lora_a", "lora_b"):
            if tuple(pair[half].shape) != wide[name][half].shape:
                raise ValueError(f"{name}.{half} has the shape {wide[name][half].shape} in the model, "
                                 f"{tuple(pair[half].shape)} in {file}")
    added = lambda t, extra: tree.maps(lambda n, p: p | extra[n] if n in extra else p, t)
    return added(declared, wide), added(params, tree.put(pairs, tree.leaves(params)[0].device))


# ---- diffusers' files: one file, names of modules under a prefix, each with its own rank


def _places(params: Tree, table: keys.Table) -> dict[str, list[tuple[str, keys.Place]]]:
    """By their module, the maps of ours in it: more than one where ours are parts of theirs."""
    flat = {n: t for n, t in tree.flatten(params).items() if ".lora_" not in n}
    found: dict[str, list[tuple[str, keys.Place]]] = {}
    for name, place in keys.lookup(flat, table).items():
        leaf = flat[name]
        if name.endswith(".weight") and len(leaf.shape) == 2 and "vocab" not in getattr(leaf, "axes", ""):
            found.setdefault(place.name.removesuffix(".weight"), []).append((name.removesuffix(".weight"), place))
    return found


def export_weights(path: Path, params: Tree, table: keys.Table, *, prefix: str = "transformer.") -> None:
    """Write a file (or pytorch_lora_weights.safetensors in a folder) as diffusers reads it; B holds the scale.

    prefix: what stands before the names of modules, "diffusion_model." for ComfyUI.
    """
    out = {}
    for there, maps in _places(params, table).items():
        at = [tree.at(params, n) for n, _ in maps]
        if any("lora_a" in p for p in at):
            a, b = _joined(at, maps[0][1])
            out |= {f"{prefix}{there}.lora_{n}.weight": t.detach().cpu().contiguous() for n, t in (("A", a), ("B", b))}
    if not out:
        raise ValueError(f"these parameters have no adapters to write to {path}")
    path = _file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(out, path, {"format": "pt"})


def _file(path: Path) -> Path:
    return Path(path) if Path(path).suffix == ".safetensors" else Path(path) / WEIGHTS


def _joined(maps: list[Tree], place: keys.Place) -> tuple[Tensor, Tensor]:
    """A and B of their map, of which ours are slices along place.dim; one that has no adapter has rank 0."""
    pairs = [(p["lora_a"], p["lora_b"] * p["lora_scale"]) if "lora_a" in p else
             (p["weight"].new_zeros(0, p["weight"].shape[1]), p["weight"].new_zeros(len(p["weight"]), 0)) for p in maps]
    (a, *more_a), (b, *more_b) = zip(*pairs)
    if place.whole:
        shape = place.shape or (len(b), a.shape[1])  # of a convolution: A is one, B has a window of 1
        return a.reshape(len(a), *shape[1:]), b.reshape(*b.shape, *[1] * (len(shape) - 2))
    if place.dim == 1:  # slices of the input: one B where they share it, else a rank of its own for each
        same = all(torch.equal(b, other) for other in more_b)
        return (torch.cat([a, *more_a], 1), b) if same else (torch.block_diag(a, *more_a), torch.cat([b, *more_b], 1))
    same = all(torch.equal(a, other) for other in more_a)
    return (a, torch.cat([b, *more_b])) if same else (torch.cat([a, *more_a]), torch.block_diag(b, *more_b))


def load_weights(path: Path, declared: Tree, params: Tree, table: keys.Table, *,
                 prefix: str = "transformer.") -> tuple[Tree, Tree]:
    """(declaration, parameters) of declared and params with the adapters of diffusers' file (or folder) beside them.

    An adapter of a map of theirs that holds several of ours becomes one of each, with equal results.
    """
    pairs, places = {}, _places(declared, table)
    for module, (a, b, factor) in _adapters(_file(path), prefix).items():
        if module not in places:
            raise ValueError(f"{prefix}{module} of {path} is no dense map of the model, such as "
                             f"{', '.join([*places][:3])}")
        for name, place in places[module]:
            one = _part(a, b, place, tree.at(declared, name)["weight"].shape)
            if len(one["lora_a"]):
                pairs[name] = one | {"lora_scale": torch.tensor(factor)}
    return _beside(declared, params, pairs, path)


def _part(a: Tensor, b: Tensor, place: keys.Place, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """The adapter of our map within theirs, without the ranks that do nothing there."""
    a, b = a.flatten(1), b.flatten(1)
    if place.whole:
        return {"lora_a": a, "lora_b": b}
    s = slice(place.start, place.start + shape[place.dim])
    a, b = (a[:, s], b) if place.dim == 1 else (a, b[s])
    used = a.any(1) if place.dim == 1 else b.any(0) | ~b.any()
    return {"lora_a": a[used].clone(), "lora_b": b[:, used].clone()}


def _adapters(file: Path, prefix: str) -> dict[str, tuple[Tensor, Tensor, float]]:
    """(A, B, scale) of each module in a file."""
    with safe_open(file, "pt") as f:
        said = json.loads((f.metadata() or {}).get("lora_adapter_metadata", "{}"))
        found = {n: f.get_tensor(n) for n in f.keys()}
    said = {k.removeprefix(prefix): v for k, v in said.items() if k.startswith(prefix)}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, t in found.items():
        m = re.fullmatch(r"(.+?)\.(?:lora_(A|B|down|up)(?:\.default)?\.weight|(alpha))", name.removeprefix(prefix))
        if not m or not name.startswith(prefix) or said.get("use_dora"):
            raise ValueError(f"{name} of {file} is no plain LoRA under {prefix!r}: known are lora_A, lora_B and alpha")
        parts.setdefault(m[1], {})[{"down": "A", "up": "B"}.get(m[2], m[2] or m[3])] = t
    if bad := [m for m, p in parts.items() if not {"A", "B"} <= p.keys()]:
        raise ValueError(f"{file} has only a part of the adapter of {bad[0]}")
    return {m: (p["A"], p["B"], _factor(m, len(p["A"]), p.get("alpha"), said)) for m, p in parts.items()}


def _factor(module: str, rank: int, alpha: Tensor | None, said: dict) -> float:
    """The scale of a module's path: from the file's alpha, else from the PEFT config in its metadata, else 1."""
    if alpha is not None:
        return alpha.item() / rank
    own = (v for k, v in said.get("alpha_pattern", {}).items() if re.match(rf"(.*\.)?({k})$", module))
    alpha = next(own, said.get("lora_alpha", rank))
    return alpha / (rank**0.5 if said.get("use_rslora") else rank)
