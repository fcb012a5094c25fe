"""Pipeline folders as diffusers keeps them, in and out: model_index.json with a folder for each part.

A pipeline is a value: its models with their parameters, tokenizers, and the config of its scheduler.
"""

import json
import shutil
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mmfunc import hub, lora, models, nn, prompts, random, recipes, sampler, tree
from mmfunc.prompts import Prompts
from mmfunc.recipes import Part

PARTS = "transformer", "vae", "text", "image"


@dataclass(frozen=True)
class Pipeline:
    """The parts of a diffusers pipeline. vae None: pixels stand for latents."""

    folder: Path | None
    kind: str  # _class_name of model_index.json
    transformer: Part
    vae: Part | None
    text: tuple[tuple[Part, Prompts], ...]  # text encoders with their tokenizers; none where they were not loaded
    image: Part | None  # CLIP's vision half
    scheduler: dict  # scheduler_config.json
    lengths: tuple[int, ...] = ()  # tokens of a prompt, for each text encoder


def load(folder: Path, parts: Collection[str] | None = None, dtype: torch.dtype | dict | None = None,
         device: str = "cpu") -> Pipeline:
    """The pipeline of a folder; parts: which of PARTS get their weights, all unless given; dtype: of all, or by part.

    A text encoder that is left out is not there at all; of other parts the config is read.
    """
    folder, wanted = Path(folder), set(PARTS if parts is None else parts)
    if odd := wanted - {*PARTS}:
        raise ValueError(f"a pipeline has no part {', '.join(sorted(odd))}; it has {', '.join(PARTS)}")
    index = _index(folder)
    recipe = recipes.of(index["_class_name"])
    there = lambda name: index.get(name, [None])[0] is not None

    def read(name: str, part: str) -> Part:
        asked = dtype.get(part) if isinstance(dtype, dict) else dtype
        return _part(folder, name, part in wanted, asked, device)

    transformer = read("transformer", "transformer")
    if transformer.family is not recipe.family:
        raise ValueError(f"{folder} is a {index['_class_name']}; its transformer cannot be of the family "
                         f"{transformer.family.__name__.rpartition('.')[2]}")
    chosen = recipe.text if "text" in wanted and all(there(e.folder) for e in recipe.text) else ()
    text = tuple((read(e.folder, "text"), prompts.load(_there(folder, e.tokenizer))) for e in chosen)
    vae = read("vae", "vae") if there("vae") else None
    if vae and vae.params:
        vae = replace(vae, params=nn.laid(vae.params))
    image = recipe.image and there("image_encoder") and ("image" in wanted or (folder / "image_encoder").is_dir())
    pipe = Pipeline(folder, index["_class_name"], transformer, vae, text,
                    read("image_encoder", "image") if image else None,
                    hub.settings(_there(folder, "scheduler") / "scheduler_config.json"))
    limits = [hub.settings(folder / e.tokenizer / "tokenizer_config.json").get("model_max_length") for e in chosen]
    return replace(pipe, lengths=_lengths(pipe, limits))


def scratch(kind: str, transformer: Part, vae: Part | None, text: Sequence[tuple[Part, Prompts]] = (),
            image: Part | None = None, scheduler: dict | None = None, *, key: Tensor,
            limits: Sequence[int | None] = ()) -> Pipeline:
    """A pipeline from its parts, in which those without parameters get random ones; limits: tokens of a prompt."""
    def drawn(part: Part | None, name: str) -> Part | None:
        if part is None or part.params is not None:
            return part
        return replace(part, params=tree.init(part.family.params(part.config), random.fold_in(key, name)))

    name, options = transformer.family.PARTS[recipes.of(kind).like(transformer.config)]["sampler"]
    pipe = Pipeline(None, kind, drawn(transformer, "transformer"), drawn(vae, "vae"),
                    tuple((drawn(part, f"text.{i}"), p) for i, (part, p) in enumerate(text)), drawn(image, "image"),
                    scheduler or sampler.to_config(name, **options))
    return replace(pipe, lengths=_lengths(pipe, limits or [None] * len(text)))


def defaults(pipe: Pipeline) -> dict[str, Any]:
    """How a pipeline is run unless told otherwise: steps, guidance, strength, size, length; frames, fps of videos."""
    c = pipe.transformer.config
    return pipe.transformer.family.PARTS[recipes.of(pipe.kind).like(c)]


def adapted(pipe: Pipeline, path: Path) -> Pipeline:
    """The pipeline with adapters of its transformer: PEFT's folder, diffusers' file or folder, or ComfyUI's file."""
    part, path = pipe.transformer, Path(path)
    module, c = part.family, part.config
    if (path / "adapter_config.json").exists():
        params = lora.load(path, module.params(c), part.params, models.table(module, c))[1]
    else:
        with safe_open(path if path.suffix == ".safetensors" else path / lora.WEIGHTS, "pt") as file:
            prefix = next(iter(file.keys())).partition(".")[0] + "."
        if prefix == "diffusion_model." and not hasattr(module, "ORIGINAL"):
            raise ValueError(f"{path} is made for ComfyUI; this family reads PEFT's and diffusers' adapters")
        table = module.ORIGINAL(c) if prefix == "diffusion_model." else models.table(module, c)
        params = lora.load_weights(path, module.params(c), part.params, table, prefix=prefix)[1]
    like = tree.leaves(part.params)[0]
    cast = {n: t.to(like) if ".lora_" in n else t for n, t in tree.flatten(params).items()}
    return replace(pipe, transformer=replace(part, params=tree.unflatten(cast, params)))


def _lengths(pipe: Pipeline, limits: Sequence[int | None]) -> tuple[int, ...]:
    most = [e.most or defaults(pipe)["length"] for e in recipes.of(pipe.kind).text]
    return tuple(min(n, limit or n, getattr(part.config, "tokens", n))
                 for n, limit, (part, _) in zip(most, limits, pipe.text))


def _index(folder: Path) -> dict:
    if not (folder / "model_index.json").exists():
        raise FileNotFoundError(f"{folder} has no model_index.json; give the folder of a whole diffusers pipeline")
    index = hub.settings(folder / "model_index.json")
    second = [n for n in ("boundary_ratio", "expand_timesteps") if index.get(n)]
    second += ["transformer_2"] * (index.get("transformer_2", [None])[0] is not None)
    if second or "_class_name" not in index:
        raise ValueError(f"{folder}/model_index.json has {' and '.join(second) or 'no _class_name'}; that is not known")
    return index


def _there(folder: Path, name: str) -> Path:
    if not (folder / name).is_dir():
        raise FileNotFoundError(f"{folder} lacks {name}/, which its model_index.json names; it has "
                                f"{', '.join(sorted(p.name for p in folder.iterdir()))}")
    return folder / name


def _part(folder: Path, name: str, weights: bool, dtype: torch.dtype | None, device: str) -> Part:
    at = _there(folder, name)
    return Part(*models.load(at, dtype, device)) if weights else Part(*models.family(at))


def export(folder: Path, pipe: Pipeline, *, like: Path | None = None) -> None:
    """Write a pipeline's folder, which appears whole or not at all; an existing one is replaced.

    Of the folder `like`, else of the one that was loaded, come configs, tokenizers, and the weights of parts without
    parameters. Adapters are merged into the weights.
    """
    folder, source = Path(folder), like or pipe.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    index = _index(Path(source)) if source else _made(pipe)
    given = {name: part for name, part in parts(pipe).items() if part.params is not None}
    there = {n for n, v in index.items() if isinstance(v, list) and v[0] is not None}
    if odd := given.keys() - there or ({"vae"} & there if pipe.vae is None else set()):
        raise ValueError(f"{source} and this pipeline differ: only one of them has {', '.join(sorted(odd))}")
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name in sorted(there):
            if name in given:
                _write(temporary / name, given[name], Path(source) / name if source else None)
            elif name == "scheduler":
                _dump(temporary / name / "scheduler_config.json", pipe.scheduler)
            elif source:
                shutil.copytree(_there(Path(source), name), temporary / name)
            else:
                _tool(temporary / name, pipe, name)
        _dump(temporary / "model_index.json", index | {"_class_name": pipe.kind})
        for file in temporary.rglob("*"):
            hub.sync(file)
        temporary.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
        hub.sync(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _dump(file: Path, said: dict) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(said, indent=2) + "\n")


def parts(pipe: Pipeline) -> dict[str, Part]:
    """The parts that are there, by their folder."""
    text = {e.folder: part for e, (part, _) in zip(recipes.of(pipe.kind).text, pipe.text)}
    all_parts = {"transformer": pipe.transformer, "vae": pipe.vae, **text, "image_encoder": pipe.image}
    return {name: part for name, part in all_parts.items() if part is not None}


def _write(folder: Path, part: Part, like: Path | None) -> None:
    c, module = part.config, part.family
    kept = like is not None and like.is_dir() and models.family(like) == (module, c)
    said = hub.config(like) if kept else module.hub(c)
    hub.write(folder, lora.merge(part.params), module.params(c), models.table(module, c), said)


def _made(pipe: Pipeline) -> dict:
    """The model_index.json of a pipeline that comes from no folder."""
    index: dict[str, Any] = {"_class_name": pipe.kind, "_diffusers_version": "0.42.1", "vae": [None, None]}
    for name, part in parts(pipe).items():
        said = part.family.hub(part.config)
        index[name] = ["diffusers", said["_class_name"]] if "_class_name" in said else [
            "transformers", said["architectures"][0]]
    index |= {e.tokenizer: ["transformers", "PreTrainedTokenizerFast"]
              for e, _ in zip(recipes.of(pipe.kind).text, pipe.text)}
    index |= {"image_processor": ["transformers", "CLIPImageProcessor"]} if pipe.image else {}
    return index | {"scheduler": ["diffusers", pipe.scheduler["_class_name"]]}


def _tool(folder: Path, pipe: Pipeline, name: str) -> None:
    """A tokenizer's or the image processor's folder."""
    if name == "image_processor":
        n = pipe.image.config.image
        _dump(folder / "preprocessor_config.json", {"image_processor_type": "CLIPImageProcessor", "crop_size":
                                                    {"height": n, "width": n}, "size": {"shortest_edge": n}})
        return
    at = [e.tokenizer for e in recipes.of(pipe.kind).text].index(name) if pipe.text else None
    if at is None:
        raise ValueError(f"no {name} to write: give the folder of a pipeline that has it as like=")
    words = pipe.text[at][1]
    pad = words.tokenizer.id_to_token(words.pad)
    _dump(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": pad,
                                             "model_max_length": pipe.lengths[at]})
    words.tokenizer.save(str(folder / "tokenizer.json"))
