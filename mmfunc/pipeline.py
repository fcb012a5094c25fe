"""Diffusion pipelines: prompts to features, pixels to latents, noise to latents, latents to pixels.

Folders are read and written by bundle, what differs between kinds is in recipes. All of it equals diffusers' pipelines;
what a sample becomes does not depend on the others in its batch where it is prepared and decoded.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import exp, prod
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmfunc import diffusion, hoist, jit, prompts, random, recipes, sampler, teacache, tree
from mmfunc.bundle import PARTS, Part, Pipeline, adapted, defaults, export, load, scratch
from mmfunc.sampler import Table
from mmfunc.tree import Tree

__all__ = ["PARTS", "Part", "Pipeline", "Plan", "adapted", "check", "conditions", "defaults", "export", "keys_of",
           "latents", "load", "pixels", "plan", "readers", "sample", "scratch", "shape", "texts"]

SHIFTS = {"flow_euler": "shift", "flow_heun": "shift", "unipc": "flow_shift", "dpm": "flow_shift"}  # samplers of flows
RESOLUTION = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}  # FLUX's


def _loaded(part: Part | None, what: str, pipe: Pipeline) -> Part:
    """A part with its parameters, or a ValueError."""
    if part is None or part.params is None:
        raise ValueError(f"the {what} of {pipe.folder or 'this pipeline'} is not loaded: load(..., parts=[{what!r}])")
    return part


def _apart(fn: Callable, x: Tensor) -> Tensor:
    """fn on each sample by itself, so that its bits do not depend on the others."""
    return torch.cat([fn(row) for row in x.split(1)])


# what conditions a model


@torch.no_grad()
def texts(pipe: Pipeline, said: Sequence[str], length: int | None = None, *, strict: bool | None = False
          ) -> dict[str, Tensor]:
    """Features of prompts under the transformer's names, [B, ...] each; a prompt's do not depend on the others.

    length: tokens for the transformer, fewer than the default. What is longer is cut, and told as by check; strict
    None: it is not told.
    """
    each = readers(pipe, length)
    if strict is not None:
        check(pipe, said, length, strict=strict)
    rows = [{k: x for read in each for k, x in read(prompt).items()} for prompt in said]
    return {k: torch.cat([r[k] for r in rows]) for k in rows[0]}


def readers(pipe: Pipeline, length: int | None = None) -> list[Callable[[str], dict[str, Tensor]]]:
    """What each text encoder makes of a prompt, [1, ...] under the transformer's names."""
    recipe = recipes.of(pipe.kind)

    @torch.no_grad()
    def read(part: Part, words: prompts.Prompts, encoder: recipes.Encoder, n: int, prompt: str) -> dict[str, Tensor]:
        batch, _ = prompts.encode(words, [recipe.clean(prompt)], n)
        ids = batch["input_ids"].to(tree.leaves(part.params)[0].device)
        return encoder.features(part, ids, batch["attention_mask"].to(ids.device))

    return [partial(read, *text, *how) for text, *how in zip(pipe.text, recipe.text, _lengths(pipe, length))]


def _lengths(pipe: Pipeline, length: int | None) -> tuple[int, ...]:
    if not pipe.text:
        _loaded(None, "text", pipe)
    return pipe.lengths if length is None else (*pipe.lengths[:-1], length)


def check(pipe: Pipeline, said: Sequence[str], length: int | None = None, *, strict: bool = False) -> None:
    """One warning that counts the prompts that lose their ends, by encoder; strict: where no encoder reads a prompt to
    its end, a ValueError."""
    recipe, lengths = recipes.of(pipe.kind), _lengths(pipe, length)
    clean = list(map(recipe.clean, said))
    lost = [prompts.encode(words, clean, n)[1] for (_, words), n in zip(pipe.text, lengths)]
    each = [[cut for cut in column if cut] for column in lost]
    found = "; ".join(f"{len(cuts)} of {len(said)} prompts are longer than the {n} tokens of {encoder.folder} and lose "
                      f"up to {max(cuts)}" for encoder, n, cuts in zip(recipe.text, lengths, each) if cuts)
    if strict and any(min(cuts) for cuts in zip(*lost)):
        raise ValueError(found)
    if found:
        warnings.warn(found, stacklevel=2)


@torch.no_grad()
def conditions(pipe: Pipeline, first: Tensor, frames: int, last: Tensor | None = None, **how: Any) -> dict[str, Tensor]:
    """What image-to-video models see of a first (and last) frame [B, 3, Y, X] in -1..1: condition [B, 20, T, Y, X],
    a mask above latents, and where CLIP looks encoder_hidden_states_image [B, L, D]. how: as latents takes it."""
    c = pipe.transformer.config
    if not c.condition or (last is not None and c.image and not c.places):
        raise ValueError(f"this {pipe.kind} takes no {'last' if c.condition else 'first'} frame: its transformer has "
                         + ("no places for a second image" if c.condition else "no channels for it"))
    known = [first] if last is None else [first, last]
    video = first.new_zeros(len(first), 3, frames, *first.shape[2:])
    seen = first.new_zeros(1, 1, frames, 1, 1)
    for at, frame in zip((0, frames - 1), known):
        video[:, :, at], seen[:, :, at] = frame, 1
    z = latents(pipe, video, **how)
    n = pipe.vae.config.frames if pipe.vae else 1  # the first frame has a latent of its own
    seen = torch.cat([seen[:, :, :1].expand(-1, -1, n, -1, -1), seen[:, :, 1:]], 2).unflatten(2, (-1, n))
    mask = seen[:, 0].transpose(1, 2).expand(len(z), -1, -1, *z.shape[3:]).to(z)
    out = {"condition": torch.cat([mask, z], 1)}
    if c.image:
        part = _loaded(pipe.image, "image", pipe)
        looked = [_apart(lambda x: _look(part, x[0]), x) for x in known]
        out["encoder_hidden_states_image"] = torch.cat(looked, 1)
    return out


def _look(part: Part, frame: Tensor) -> Tensor:
    """CLIP's last but one hidden state of a frame [3, Y, X] in -1..1, which it gets in 8 bits: [1, L, D]."""
    x = ((frame.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    token = part.params["token"]
    x = part.family.pixels(Image.fromarray(x), part.config.image)[None].to(token)
    return part.family.forward(part.params, part.config, {"pixel_values": x})["penultimate"]


# latents


@torch.no_grad()
def latents(pipe: Pipeline, pixels: Tensor, key: Tensor | None = None, **how: Any) -> Tensor:
    """Pixels [B, 3, (T,) Y, X] in -1..1 -> the transformer's latents, float32: the mode of the VAE's distribution, with
    a key ([2], or [B, 2] with one for each sample) a sample of it. how: chunk, tile, overlap of the VAE's encode."""
    if pipe.vae is None:
        return pixels.float()
    vae = _loaded(pipe.vae, "vae", pipe)
    like = tree.leaves(vae.params)[0]
    keys = [None] * len(pixels) if key is None else keys_of(key, len(pixels))

    def one(x: Tensor, key: Tensor | None) -> Tensor:
        z, logvar = (y.float() for y in vae.family.encode(vae.params, vae.config, x.to(like), **how))
        if key is not None:
            z = z + (0.5 * logvar).exp() * random.normal(key, tuple(z.shape[1:])).to(z.device)
        return vae.family.normalise(vae.config, z)

    return torch.cat([one(x, key) for x, key in zip(pixels.split(1), keys)])


@torch.no_grad()
def pixels(pipe: Pipeline, latents: Tensor, *, names: Sequence[str] = (), **how: Any) -> Tensor:
    """Latents [B, C, ...] -> pixels [B, 3, (T,) Y, X] in -1..1, float32; names: of the samples, for errors.

    how: chunk, tile, overlap of the VAE's decode.
    """
    bad = [i for i, z in enumerate(latents) if not z.isfinite().all()]
    if bad:
        raise ValueError(f"the latents of {names[bad[0]] if names else f'sample {bad[0]}'} are not finite"
                         + (f", nor are {len(bad) - 1} others'" if bad[1:] else ""))
    if pipe.vae is None:
        return latents.float().clamp(-1, 1)
    vae = _loaded(pipe.vae, "vae", pipe)
    like = tree.leaves(vae.params)[0]
    restored = lambda z: vae.family.restore(vae.config, z.float()).to(like)
    return _apart(lambda z: vae.family.decode(vae.params, vae.config, restored(z), **how), latents).float().clamp(-1, 1)


def keys_of(key: Tensor, n: int) -> Tensor:
    """A key for each of n samples, [n, 2]: what is given, or split from one key."""
    return key if key.ndim == 2 else random.split(key, n)


def shape(pipe: Pipeline, height: int, width: int, frames: int | None = None) -> tuple[int, ...]:
    """The latents' shape (C, (T,) Y, X) of so many pixels; a ValueError names the nearest that fit."""
    c, vae = pipe.transformer.config, pipe.vae and pipe.vae.config
    *time, rows, columns = recipes.of(pipe.kind).patch(c)
    factor, within = (vae.factor if vae else 1), getattr(vae, "frames", 1)
    units = factor * rows, factor * columns
    if height % units[0] or width % units[1] or min(height, width) < 1:
        near = " x ".join(str(max(round(n / u), 1) * u) for n, u in zip((height, width), units))
        raise ValueError(f"{height} x {width} pixels: height and width must be multiples of {units[0]} and {units[1]}, "
                         f"such as {near}")
    sides = height // factor, width // factor
    if not time:
        return c.channels, *sides
    frames = 1 if frames is None else frames
    if frames < 1 or (frames - 1) % within:
        near = max(round((frames - 1) / within), 0) * within + 1
        raise ValueError(f"{frames} frames: there must be {within}k + 1, such as {near}")
    return c.channels, (frames - 1) // within + 1, *sides


# sampling


@dataclass(frozen=True)
class Plan:
    """How latents of one shape are made; it keeps what it compiled."""

    table: Table
    scale: float  # of classifier-free guidance; 1: none
    guidance: float | None  # where it is an input of the model
    call: hoist.Partial | teacache.Parts  # (params, x, time, cond, uncond, scale) -> velocity
    reuse: float = 0.0  # threshold of teacache; 0: all is computed


def plan(pipe: Pipeline, size: Sequence[int], *, steps: int | None = None, guidance: float | None = None,
         true_guidance: float = 1.0, shift: float | None = None, mu: float | None = None, solver: str | None = None,
         strength: float | None = None, reuse: float = 0.0, backend: jit.Backend = "eager") -> Plan:
    """How to sample latents of a size [..., (T,) Y, X]; what is not given is as the pipeline has it.

    guidance: classifier-free, or the model's input, then true_guidance is classifier-free. shift or mu: of the times,
    in place of the scheduler's. solver: another sampler of flows. strength: the share of steps when latents are given.
    reuse: threshold of teacache. Compiled without it, what depends on conditions only is computed once a sample() and
    held for its steps (see hoist): text, image and pooled maps, Wan's keys and values of them; and rotary angles.
    """
    teacache.check(reuse)
    recipe, said, c = recipes.of(pipe.kind), defaults(pipe), pipe.transformer.config
    if recipe.embedded and not c.guidance and guidance:
        raise ValueError(f"guidance is {guidance}, but this model has none: leave it out")
    given = said["guidance"] if guidance is None else guidance
    tokens = prod(n // p for n, p in zip(size[-len(recipe.patch(c)):], recipe.patch(c)))
    table = _table(pipe, said["steps"] if steps is None else steps, tokens, strength, shift, mu, solver)

    def call(p: Tree, x: Tensor, time: Tensor, cond: Tree, uncond: Tree | None, scale: float) -> Tensor:
        predict = lambda x, time, cond: pipe.transformer.family.predict(p, c, x, time, cond)
        return predict(x, time, cond) if uncond is None else sampler.guided(predict, x, time, cond, uncond, scale)

    wrap = (lambda fn: fn) if backend == "eager" else partial(jit.jit, backend=backend, buckets=8)
    run = teacache.parts(call, wrap) if reuse else hoist.partial_eval(call, (1, 2), backend, buckets=8)
    scales = (true_guidance, given if c.guidance else None) if recipe.embedded else (given, None)
    return Plan(table, *scales, run, reuse)


def _table(pipe: Pipeline, steps: int, tokens: int, strength: float | None, shift: float | None, mu: float | None,
           solver: str | None) -> Table:
    recipe, said = recipes.of(pipe.kind), pipe.scheduler
    make = sampler.from_config(said)
    own, dynamic = make.args[0], said.get("use_dynamic_shifting", False)
    name = solver or own
    if name not in SHIFTS:
        raise ValueError(f"there is no sampler {name!r} of flows; there are {', '.join(SHIFTS)}")
    if dynamic and shift is None and mu is None:
        mu = diffusion.resolution_mu(tokens, *(said.get(k, v) for k, v in RESOLUTION.items()))
    more: dict[str, Any] = {"start": 0 if strength is None else sampler.begin(steps, strength, recipe.up)}
    more |= recipe.options(said if name == own else {}, steps) if name in (own, "flow_euler") else {}
    if name == own and shift is None and (dynamic or mu is None):
        return make(steps, **more, **({} if mu is None else {"mu": mu}))
    if shift is None:
        shift = said.get(SHIFTS[own], 1.0) if mu is None else exp(mu)
    fixed = {SHIFTS[name]: shift}
    if name == own:
        return make(steps, **more, **fixed, **({"use_dynamic_shifting": False} if dynamic else {}))
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"} if SHIFTS[name] == "flow_shift" else {}
    return sampler.table(name, steps, **more, **fixed, **flow)


@torch.no_grad()
def sample(pipe: Pipeline, cond: Tree, uncond: Tree | None, noise: Tensor | Sequence[int], *, key: Tensor | None = None,
           start: tuple[Tensor, float] | None = None, made: Plan | None = None,
           tell: Callable[[int, int], None] | None = None, count: dict[str, int] | None = None, **how: Any) -> Tensor:
    """Latents from noise [B, C, (T,) Y, X], or from a shape and a key, float32.

    cond, uncond: what the transformer reads besides (texts, conditions, image_latents); what uncond lacks it has from
    cond. key: [2], or [B, 2] with one for each sample. start: (latents, strength) to begin with. made: a plan, else how
    says what plan() takes. tell gets (steps done, of how many). count: a dict that gets how many calls of the model
    were computed and reused.
    """
    if not isinstance(noise, Tensor):
        if key is None:
            raise ValueError("give noise, or its shape and a key (mmfunc.random.key)")
        key = keys_of(key, noise[0])
        noise = torch.stack([random.normal(random.fold_in(k, "noise"), tuple(noise[1:])) for k in key])
    if made is None:
        made = plan(pipe, noise.shape, strength=start and start[1], **how)
    part = _loaded(pipe.transformer, "transformer", pipe)
    noise = noise.float().to(tree.leaves(part.params)[0].device)
    if made.guidance is not None:
        cond = cond | {"guidance": noise.new_full((len(noise),), made.guidance)}
    if made.scale > 1 and uncond is None:
        raise ValueError(f"guidance {made.scale} needs the features of a negative prompt, such as texts(pipe, [''])")
    uncond = cond | uncond if made.scale > 1 else None
    n, state, kept = len(made.table), teacache.init(), None

    def predict(x: Tensor, time: Tensor) -> Tensor:
        nonlocal state, kept
        args, done = (part.params, x, time, cond, uncond, made.scale), state["computed"] + state["reused"] + 1
        if made.reuse:
            y, state = teacache.step(made.call, made.reuse, state, args, compute=done == n)
        else:
            kept = kept or made.call.known(*args)  # of this call's conditions, for all its steps
            y, state = made.call.rest(kept, x, time), state | {"computed": done}
        if tell:
            tell(done, n)
        return y

    with jit.flags():
        z = sampler.sample(predict, made.table, noise, latents=start and start[0], key=key)
    if count is not None:
        count |= {k: state[k] for k in ("computed", "reused")}
    return z
