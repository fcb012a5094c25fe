"""Solvers of diffusion's equations as tables of numbers, computed on the host in float64.

A step is linear in few things: the state (x and what a multistep method remembers), the data that the model's output
implies, the output itself, and fresh noise. So a solver is a table of coefficients, and nothing else differs between
them. Options are those of diffusers' schedulers, with the same names and defaults; the schedules of sigmas are rounded
to float32 where diffusers rounds them, since models are run on those.
"""

import math
from dataclasses import dataclass, replace
from types import SimpleNamespace as Options
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmfunc import diffusion

Numbers = np.ndarray
Update = dict[str, "str | dict[str, Numbers | float]"]  # slot: what it copies, or the factor of each thing it sums


@dataclass(frozen=True)
class Table:
    """A sampler with its steps fixed: row i of the values holds every number that step i needs."""

    name: str
    timesteps: Tensor  # float32 [n], as diffusers has them: 0 to 1000
    columns: tuple[str, ...]  # time, signal, sigma; "slot<source": factor of the source in the slot's new value
    values: Tensor  # float32 [n, columns]
    rows: tuple[tuple[float, ...], ...]  # the same as numbers: a step with a Python index needs no tensor
    update: dict[str, Any]  # slot of the state: the name that it copies, or the names of what it sums
    first: float = 1.0  # what the first noise is multiplied with
    clip: float | None = None  # bound of the data

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device | str) -> "Table":
        """The table on a device, for steps whose index is a tensor."""
        return replace(self, timesteps=self.timesteps.to(device), values=self.values.to(device))


def table(o: Options, timesteps: Numbers, times: Numbers, levels: tuple[Numbers, Numbers], update: Update,
           extra: dict[str, Numbers] | None = None, **how: Any) -> Table:
    """levels: factors of the latents and of the noise in x."""
    columns = {"time": times, "signal": levels[0], "sigma": levels[1]} | (extra or {})
    sums: dict[str, Any] = {}
    for slot, sources in update.items():
        if isinstance(sources, str):
            sums[slot] = sources
            continue
        kept = {k: v for k, v in sources.items() if np.any(v)}
        columns |= {f"{slot}<{k}": v for k, v in kept.items()}
        sums[slot] = tuple(kept)
    n = len(timesteps)
    values = np.stack([np.broadcast_to(np.asarray(v, np.float64), (n,)) for v in columns.values()], -1)
    if not np.isfinite(values).all():
        i, column = np.argwhere(~np.isfinite(values))[0]
        raise ValueError(f"{o.name}: step {i} has no finite factor {list(columns)[column]!r} under {vars(o)}; epsilon "
                         "cannot be predicted at zero terminal SNR, nor a last sigma of zero reached at high order")
    values = torch.from_numpy(values).float()
    return Table(o.name, torch.from_numpy(np.array(timesteps)).float(), tuple(columns), values,
                 tuple(map(tuple, values.tolist())), sums, **how)


def column(rows: list[dict[str, float]]) -> dict[str, Numbers]:
    """Factors of each step, by thing, as one array a thing."""
    names = dict.fromkeys(k for row in rows for k in row)
    return {k: np.array([row.get(k, 0.0) for row in rows]) for k in names}


def implied(kind: str, signal: Numbers, sigma: Numbers) -> Update:
    """The latents that an output implies: what they are of x and of the output."""
    power = signal**2 + sigma**2
    factors = {"epsilon": (1 / signal, -sigma / signal), "sample": (0.0, 1.0), "flow_prediction": (1.0, -sigma),
               "v_prediction": (signal / power, -sigma / np.sqrt(power))}
    return {"data": dict(zip(("x", "output"), factors[kind]))}


# schedules


def alphas_of(o: Options) -> Numbers:
    """Cumulative products of alphas, float32 [T]."""
    made = diffusion.schedule(o.beta_schedule, o.num_train_timesteps, o.beta_start, o.beta_end,
                              zero_snr=getattr(o, "rescale_betas_zero_snr", False),
                              snr_shift=getattr(o, "snr_shift_scale", None))
    return made["alphas_cumprod"].numpy()


def spaced(o: Options, steps: int, more: int = 0) -> Numbers:
    """Timesteps from high to low (Lin et al. 2023, table 2); multistep methods leave out the last of one more."""
    most, n = o.num_train_timesteps, steps + more
    if o.timestep_spacing == "linspace":
        return np.linspace(0, most - 1, n)[::-1][:steps]
    if o.timestep_spacing == "leading":
        return (np.arange(n) * (most // n))[::-1][:steps].astype(np.float64) + o.steps_offset
    return np.arange(most, 0, -most / steps).round() - 1


def _respaced(o: Options, low: float, high: float, steps: int) -> Numbers | None:
    """Sigmas from high to low after Karras et al. 2022, or in a geometric row, or None."""
    if o.use_karras_sigmas and o.use_exponential_sigmas:
        raise ValueError(f"{o.name}: use_karras_sigmas and use_exponential_sigmas are both set; choose one")
    if o.use_karras_sigmas:
        return np.linspace(high ** (1 / 7), low ** (1 / 7), steps) ** 7
    return np.exp(np.linspace(math.log(high), math.log(low), steps)) if o.use_exponential_sigmas else None


def ladder(o: Options, steps: int, multistep: bool) -> tuple[Numbers, Numbers]:
    """(timesteps [n], sigmas [n + 1] of noise over signal), both from noise to data."""
    alphas = alphas_of(o)
    if getattr(o, "rescale_betas_zero_snr", False):
        alphas[-1] = 2**-24  # as diffusers has it: the first sigma must be finite
    levels = np.sqrt((1 - alphas) / alphas)
    t = spaced(o, steps, int(multistep))
    t = t.round() if multistep else t.astype(np.float32)
    sigmas = np.interp(t, np.arange(len(levels)), levels)
    low, high = (levels[0], levels[-1]) if multistep else (sigmas[-1], sigmas[0])
    other = _respaced(o, float(low), float(high), steps) if hasattr(o, "use_karras_sigmas") else None
    if other is not None:
        sigmas, t = other, np.interp(np.log(other), np.log(levels), np.arange(len(levels)))
        rounded = o.use_karras_sigmas and (o.beta_schedule != "squaredcos_cap_v2" or o.name == "unipc")
        t = (t.round() if rounded else np.trunc(t)) if multistep else t
    last = levels[0] if getattr(o, "final_sigmas_type", "zero") == "sigma_min" else 0.0
    return t, np.append(sigmas, last).astype(np.float32).astype(np.float64)


def mu_of(o: Options) -> float:
    """The mu of a dynamic shift: given, or from the number of tokens."""
    if o.mu is None and getattr(o, "tokens", None) is None:
        raise ValueError("use_dynamic_shifting is set: give mu=, or tokens= (of the image) where the config knows how")
    if o.mu is not None:
        return o.mu
    return diffusion.resolution_mu(o.tokens, o.base_image_seq_len, o.max_image_seq_len, o.base_shift, o.max_shift)


def flow_shifted(o: Options, sigmas: Numbers, shift: float) -> Numbers:
    """Sigmas of a flow after its shift, and stretched to end at shift_terminal."""
    # in diffusers' order of operations: timesteps may be cut to whole numbers afterwards
    if o.use_dynamic_shifting:
        shift = mu_of(o) if o.time_shift_type == "linear" else math.exp(mu_of(o))
        sigmas = shift / (shift + (1 / sigmas - 1))
    else:
        sigmas = diffusion.shifted(sigmas, shift)
    end = getattr(o, "shift_terminal", None)
    return 1 - (1 - sigmas) / ((1 - sigmas[-1]) / (1 - end)) if end else sigmas


def _flow_sigmas(o: Options, steps: int) -> Numbers:
    """Sigmas of the flow-matching schedulers, [n]; without custom ones the lowest is shifted twice, as theirs is."""
    if o.sigmas is not None:
        sigmas = np.asarray(o.sigmas, np.float32).astype(np.float64)
    else:
        low = 1 / o.num_train_timesteps
        sigmas = np.linspace(1, low if o.use_dynamic_shifting else diffusion.shifted(low, o.shift), steps)
    return flow_shifted(o, sigmas, o.shift)


def closed(sigmas: Numbers) -> Numbers:
    """With the final zero, at float32's precision."""
    return np.append(sigmas, 0.0).astype(np.float32).astype(np.float64)


# solvers: (options, steps, the step to begin with) -> Table


def flow_euler(o: Options, steps: int, start: int) -> Table:
    """Euler's method along a flow; stochastic_sampling puts fresh noise on the data."""
    sigmas = _flow_sigmas(o, steps)
    other = _respaced(o, sigmas[-1], sigmas[0], steps)
    sigmas = closed(sigmas if other is None else other)[start:]
    s, after = sigmas[:-1], sigmas[1:]
    move: Update = {"x": {"x": 1.0, "output": after - s}}
    if o.stochastic_sampling:
        move = {"x": {"x": 1 - after, "output": -(1 - after) * s, "noise": after}}
    return table(o, s * o.num_train_timesteps, s, (1 - s, s), move)


def flow_heun(o: Options, steps: int, start: int) -> Table:
    """Heun's method along a flow: two calls a step, but one for the last."""
    o = Options(**vars(o), use_dynamic_shifting=False, sigmas=None)
    s, move = _heun(closed(_flow_sigmas(o, steps))[start:])
    return table(o, s * o.num_train_timesteps, s, (1 - s, s), implied("flow_prediction", 1 - s, s) | move)


def _heun(sigmas: Numbers) -> tuple[Numbers, Update]:
    """(sigma of each call, updates): odd calls correct the even ones before with the mean of two slopes."""
    twice = np.concatenate([sigmas[:1], sigmas[1:-1].repeat(2), sigmas[-1:]])
    s, even = twice[:-1], np.arange(len(twice) - 1) % 2 == 0
    width = np.where(even, twice[1:] - s, s - np.roll(twice, 1)[:-1])
    share = np.where(even, width, width / 2) / s
    return s, {"x": {"x": np.where(even, 1 + share, share), "data": -share, "slope": np.where(even, 0, width / 2),
                     "held": np.where(even, 0.0, 1.0)},
               "slope": {"x": 1 / s, "data": -1 / s}, "held": "x"}


def _scaled(o: Options, t: Numbers, s: Numbers, move: Update, peak: float, **how: Any) -> Table:
    """A table of the samplers whose x is latents + sigma noise, and whose model sees x / sqrt(sigma**2 + 1)."""
    first = math.sqrt(peak**2 + 1) if o.timestep_spacing == "leading" else peak
    return table(o, t, t, (np.ones_like(s), s), implied(o.prediction_type, np.ones_like(s), s) | move,
                  {"input": 1 / np.sqrt(s**2 + 1)}, first=first, **how)


def euler(o: Options, steps: int, start: int) -> Table:
    """Euler's method in sigma (Karras et al. 2022, algorithm 2 without churn)."""
    t, sigmas = ladder(o, steps, False)
    s, ratio = sigmas[start:-1], sigmas[start + 1 :] / sigmas[start:-1]
    return _scaled(o, t[start:], s, {"x": {"x": ratio, "data": 1 - ratio}}, sigmas.max())


def euler_ancestral(o: Options, steps: int, start: int) -> Table:
    """Euler's method to a lower sigma, and noise up to the next one."""
    t, sigmas = ladder(o, steps, False)
    s, after = sigmas[start:-1], sigmas[start + 1 :]
    up = np.sqrt(after**2 * (s**2 - after**2) / s**2)
    ratio = np.sqrt(after**2 - up**2) / s
    return _scaled(o, t[start:], s, {"x": {"x": ratio, "data": 1 - ratio, "noise": up}}, sigmas.max())


def heun(o: Options, steps: int, start: int) -> Table:
    """Heun's method in sigma: two calls a step, but one for the last."""
    t, sigmas = ladder(o, steps, False)
    s, move = _heun(sigmas[start:])
    t = t[start:].repeat(2)[1:]
    return _scaled(o, t, s, move, sigmas.max(), clip=o.clip_sample_range if o.clip_sample else None)


def points(o: Options, steps: int, start: int) -> tuple[Numbers, Numbers, Numbers, Numbers]:
    """(timesteps, alphas there, alphas one interval below, all of them) of the samplers on discrete steps."""
    alphas = alphas_of(o).astype(np.float64)
    t = spaced(o, steps).round().astype(np.int64)[start:]
    below = t - o.num_train_timesteps // steps
    final = 1.0 if getattr(o, "set_alpha_to_one", True) else alphas[0]
    return t, alphas[t], np.where(below >= 0, alphas[below], final), alphas


def _clip(o: Options) -> float | None:
    return o.clip_sample_range if o.clip_sample else None


def discrete(o: Options, t: Numbers, a: Numbers, move: Update, **how: Any) -> Table:
    """A table of the samplers on discrete steps, with the cumulative products of alphas there."""
    levels = np.sqrt(a), np.sqrt(1 - a)
    return table(o, t, t.astype(np.float64), levels, implied(o.prediction_type, *levels) | move, **how)


def ddim(o: Options, steps: int, start: int) -> Table:
    """DDIM (Song et al. 2021); eta = 0 is deterministic, 1 as noisy as DDPM. Epsilon is not clipped with the data."""
    t, a, p, _ = points(o, steps, start)
    std = (o.eta or 0.0) * np.sqrt((1 - p) / (1 - a) * (1 - a / p))
    toward, s = np.sqrt(1 - p - std**2), np.sqrt(1 - a)
    epsilon = {"epsilon": (0.0, 1.0), "sample": (1 / s, -np.sqrt(a) / s), "v_prediction": (s, np.sqrt(a))}
    x, output = epsilon[o.prediction_type]
    move = {"x": {"x": toward * x, "data": np.sqrt(p), "output": toward * output, "noise": std}}
    return discrete(o, t, a, move, clip=_clip(o))


def ddpm(o: Options, steps: int, start: int) -> Table:
    """Ancestral sampling (Ho et al. 2020); learned_range takes the variance from the output's second half."""
    t, a, _, alphas = points(o, steps, start)
    p = np.append(alphas[t[1:]], 1.0)
    beta = 1 - a / p
    variance = np.maximum((1 - p) / (1 - a) * beta, 1e-20)
    std = np.sqrt(beta if o.variance_type == "fixed_large" else variance)
    learned = o.variance_type == "learned_range"
    extra = {"low": np.log(variance), "high": np.log(beta)} if learned else {}
    noise = np.where(t > 0, 1.0 if learned else std, 0.0)
    move = {"x": {"x": np.sqrt(a / p) * (1 - p) / (1 - a), "data": np.sqrt(p) * beta / (1 - a), "noise": noise}}
    return discrete(o, t, a, move, clip=_clip(o), extra=extra)


def cogvideox_ddim(o: Options, steps: int, start: int) -> Table:
    """CogVideoX's DDIM."""
    t, a, p, _ = points(o, steps, start)
    ratio = np.sqrt((1 - p) / (1 - a))
    return discrete(o, t, a, {"x": {"x": ratio, "data": np.sqrt(p) - np.sqrt(a) * ratio}})
