"""Samplers as pure steps over a table: noise to latents, equal to diffusers' schedulers.

    t = table("unipc", 50, use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5.0)
    latents = sample(lambda x, time: forward(p, c, {"hidden_states": x, "timestep": time}), t, noise)

The time that a model gets is, for flows, sigma in [0, 1] (a family multiplies by 1000 itself); for discrete diffusions
the timestep of 0 to 999. table.timesteps has diffusers' timesteps for both. The state is float32, a dict of x and what
a multistep method remembers. The index of a step may be an int, then the step's numbers are constants, or a 0-d tensor
on the table's device, then one compiled `advance` serves all steps.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmfunc import random, tree
from mmfunc.schedulers import SCHEDULERS
from mmfunc.solvers import Table
from mmfunc.tree import Tree

Predict = Callable[[Tensor, Tensor], Tensor]  # (x [B, ...], time [B]) -> output [B, ...]
State = dict[str, Tensor]


def table(name: str, steps: int, *, start: int = 0, device: torch.device | str | None = None, **options: Any) -> Table:
    """The coefficients of a sampler, from step `start` of `steps` on, with the options of diffusers' scheduler.

    Not in its config are: mu or tokens, for use_dynamic_shifting; sigmas, a flow's own; eta, DDIM's share of noise.
    """
    scheduler = _scheduler(name)
    known = scheduler.options | dict.fromkeys(scheduler.more)
    odd = sorted(options.keys() - known.keys())
    if odd:
        raise ValueError(f"{name} has no option {', '.join(odd)}; it has {', '.join(known)}")
    chosen = known | options
    for option, allowed in scheduler.limits.items():
        if chosen[option] not in allowed:
            raise ValueError(f"{name}: {option} is {chosen[option]!r}; known are {', '.join(map(repr, allowed))}")
    most = chosen["num_train_timesteps"]
    if not 0 <= start < steps <= most:
        raise ValueError(f"{name}: start {start} of {steps} steps; it must be 0 <= start < steps <= {most}")
    with np.errstate(divide="ignore", invalid="ignore"):  # what is not finite is an error in the end
        made = scheduler.build(SimpleNamespace(name=name, **chosen), steps, start)
    return made if device is None else made.to(device)


def _scheduler(name: str) -> Any:
    if name not in SCHEDULERS:
        raise ValueError(f"there is no sampler {name!r}; there are {', '.join(SCHEDULERS)}")
    return SCHEDULERS[name]


def numbers(table: Table, i: int | Tensor) -> dict[str, Any]:
    """What step i needs, by column: numbers for an int i, 0-d tensors for a 0-d tensor."""
    if isinstance(i, Tensor):
        return dict(zip(table.columns, table.values.index_select(0, i.reshape(1))[0].unbind()))
    return dict(zip(table.columns, table.rows[i]))


def init(table: Table, noise: Tensor) -> State:
    """The state of pure noise, standard normal [B, ...]."""
    return _state(table, noise.float() * table.first)


def _state(table: Table, x: Tensor) -> State:
    return {slot: x if slot == "x" else torch.zeros_like(x) for slot in table.update}


def start(table: Table, i: int | Tensor, latents: Tensor, noise: Tensor) -> Tensor:
    """Latents with the noise of step i, float32: where image-to-image begins. A table that starts late has i = 0."""
    c = numbers(table, i)
    return c["signal"] * latents.float() + c["sigma"] * noise.float()


def begin(steps: int, strength: float, up: bool = True) -> int:
    """The step to begin with so that a share `strength` of the steps remains: table(..., start=begin(...)).

    diffusers rounds the number of steps left out up, but down (up=False) in its FLUX and SD3 pipelines.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength is {strength}; it must be above 0 and at most 1")
    return steps - min(int(steps * strength), steps) if up else int(max(steps - steps * strength, 0))


def model_input(table: Table, state: State, i: int | Tensor) -> tuple[Tensor, Tensor]:
    """(x as the model wants it, its time [B])."""
    c = numbers(table, i)
    x = state["x"] * c["input"] if "input" in c else state["x"]
    time = c["time"]
    return x, time.expand(len(x)) if isinstance(time, Tensor) else x.new_full((len(x),), time)


def step(table: Table, state: State, i: int | Tensor, output: Tensor, *, key: Tensor | None = None,
         noise: Tensor | None = None) -> State:
    """The state after step i, given the model's output at model_input(table, state, i).

    Stochastic samplers need noise of x's shape, or a key: [2], or [B, 2] with one for each sample.
    """
    c = numbers(table, i)
    things = state | {"output": output.float()}
    if stochastic(table):
        things["noise"] = _noise(table, state["x"], i, key) if noise is None else noise.float()
    if "low" in c:
        things["output"], between = things["output"].chunk(2, 1)
        share = (between + 1) / 2
        things["noise"] = things["noise"] * torch.exp(0.5 * (share * c["high"] + (1 - share) * c["low"]))
    data = sum(c[k] * things[k.removeprefix("data<")] for k in table.columns if k.startswith("data<"))
    things["data"] = data if table.clip is None else data.clamp(-table.clip, table.clip)
    return {slot: things[sources] if isinstance(sources, str) else sum(c[f"{slot}<{k}"] * things[k] for k in sources)
            for slot, sources in table.update.items()}


def stochastic(table: Table) -> bool:
    """Whether its steps draw noise."""
    return "x<noise" in table.columns


def _noise(table: Table, x: Tensor, i: int | Tensor, key: Tensor | None) -> Tensor:
    if key is None:
        raise ValueError(f"{table.name} draws noise: give key= (mmfunc.random.key) or noise=")
    i = i if isinstance(i, Tensor) else torch.tensor(i, device=key.device)
    if key.ndim == 1:
        return random.normal(random.fold_in(key, i), tuple(x.shape))
    return torch.stack([random.normal(random.fold_in(k, i), tuple(x.shape[1:])) for k in key.unbind()])


def finish(table: Table, state: State) -> Tensor:
    """The latents after the last step, float32."""
    return state["x"]


def advance(predict: Predict, table: Table, state: State, i: int | Tensor, *, key: Tensor | None = None,
            dtype: torch.dtype = torch.float32) -> State:
    """Step i with its call of the model, which gets x in dtype: what to compile to run the loop in Python."""
    x, time = model_input(table, state, i)
    return step(table, state, i, predict(x.to(dtype), time), key=key)


def sample(predict: Predict, table: Table, noise: Tensor, *, latents: Tensor | None = None,
           key: Tensor | None = None) -> Tensor:
    """Latents from noise [B, ...], in noise's dtype; the model gets x in that dtype too, the state is float32.

    latents: begin with these, noised to the table's first step. All of it can be compiled as one graph.
    """
    state = init(table, noise) if latents is None else _state(table, start(table, 0, latents, noise))
    for i in range(len(table)):
        state = advance(predict, table, state, i, key=key, dtype=noise.dtype)
    return finish(table, state).to(noise.dtype)


def guided(predict: Callable[[Tensor, Tensor, Tree], Tensor], x: Tensor, time: Tensor, cond: Tree, uncond: Tree,
           scale: float | Tensor, rescale: float = 0.0, two_calls: bool = False) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2021): uncond + scale (cond - uncond), float32 [B, ...].

    cond, uncond: trees of tensors whose first dimension is the batch; predict(x, time, cond). One call with both
    batches, or two. rescale: see rescaled.
    """
    if two_calls:
        with_it, without = predict(x, time, cond), predict(x, time, uncond)
    else:
        both = tree.map(lambda a, b: torch.cat([a, b]), cond, uncond)
        with_it, without = predict(torch.cat([x, x]), torch.cat([time, time]), both).chunk(2)
    with_it, without = with_it.float(), without.float()
    out = without + scale * (with_it - without)
    return rescaled(out, with_it, rescale) if rescale else out


def rescaled(out: Tensor, cond: Tensor, share: float) -> Tensor:
    """Guided output with, to a share, the conditional one's standard deviation (Lin et al. 2023). [B, ...]."""
    dims = tuple(range(1, out.ndim))
    return share * out * (cond.std(dims, keepdim=True) / out.std(dims, keepdim=True)) + (1 - share) * out


def dynamic_scale(scale: float, timestep: Tensor, steps: int) -> Tensor:
    """CogVideoX's guidance scale at a timestep (0-d): 1 + scale (1 - cos(pi ((steps - timestep) / steps)**5)) / 2."""
    return 1 + scale * (1 - torch.cos(torch.pi * ((steps - timestep.double()) / steps) ** 5)).float() / 2


def from_config(config: dict) -> Callable[..., Table]:
    """scheduler_config.json -> steps (and table's other options) -> Table; entries of other schedulers are ignored,
    as diffusers ignores them."""
    known = {s.hub: name for name, s in SCHEDULERS.items()}
    if config.get("_class_name") not in known:
        raise ValueError(f"scheduler {config.get('_class_name')!r} is not known; there are {', '.join(known)}")
    name = known[config["_class_name"]]
    scheduler = SCHEDULERS[name]
    somewhere = {k for s in SCHEDULERS.values() for k in s.options}
    odd = sorted(k for k in config.keys() - somewhere if not k.startswith("_"))
    if odd:
        raise ValueError(f"{config['_class_name']}: entries {', '.join(odd)} are not known to any scheduler here")
    stated = scheduler.unsaid | {k: v for k, v in config.items() if k in scheduler.options}
    return partial(table, name, **stated)


def to_config(name: str, **options: Any) -> dict:
    """The scheduler_config.json of a sampler, for from_pretrained."""
    scheduler = _scheduler(name)
    kept = {k: v for k, v in options.items() if k in scheduler.options}
    return {"_class_name": scheduler.hub, "_diffusers_version": "0.42.1"} | scheduler.options | kept
