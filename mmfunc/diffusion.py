"""Objectives of diffusion models and distributions of their times, as pure functions.

Two families. Rectified flow: a time t in [0, 1], x = (1 - t) latents + t noise, the target is the velocity. Discrete
diffusion: a step in 0 .. T-1 and a Schedule of tables over the steps, made once on the host.

Times come from uniform numbers u in [0, 1): the inverse distribution function makes every distribution stratifiable.
They are drawn on the host, one key a sample, so a sample's time depends on its key only.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmfunc import random

Schedule = dict[str, Tensor]  # tables over steps, float32 [T]; see schedule()

KINDS = "epsilon", "v_prediction", "sample"
BETAS = "linear", "scaled_linear", "squaredcos_cap_v2"


def _wide(v: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ..., 1], float32."""
    return v.float().view(-1, *[1] * (like.ndim - 1))


def _known(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{what} {value!r} is not known; there are {', '.join(known)}")


def blend(latents: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Rectified flow (Liu et al. 2022): (x at t, the velocity noise - latents). latents, noise [B, ...], t [B]."""
    t = _wide(t, latents)
    x = (1 - t) * latents.float() + t * noise.float()
    return x.to(latents.dtype), noise.float() - latents.float()


def mean_error(prediction: Tensor, target: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Mean square error of each sample, averaged over samples. prediction, target [B, ...] -> 0-d float32.

    batch may have weight [B], loss_mask (broadcast to the prediction; each sample's mean is over what it keeps), and
    num_items_in_batch (0-d), by which the sum is divided in place of the sum of weights.
    """
    error = (prediction.float() - target.float()).square()
    mask = batch.get("loss_mask")
    if mask is None:
        each = error.flatten(1).mean(1)
    else:
        mask = mask.float().expand_as(error)
        each = (error * mask).flatten(1).sum(1) / mask.flatten(1).sum(1).clamp(min=1)
    weight = batch["weight"].float() if "weight" in batch else torch.ones_like(each)
    count = batch["num_items_in_batch"] if "num_items_in_batch" in batch else weight.sum()
    return (each * weight).sum() / count


def _betas(kind: str, steps: int, start: float, end: float, dtype: torch.dtype) -> Tensor:
    _known("beta schedule", kind, BETAS)
    if kind == "linear":
        return torch.linspace(start, end, steps, dtype=dtype)
    if kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, steps, dtype=dtype) ** 2
    bar = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
    return torch.tensor([min(1 - after / now, 0.999) for now, after in zip(bar, bar[1:])], dtype=dtype)


def _zero_terminal(alphas: Tensor) -> Tensor:
    """Cumulative products of alphas, shifted and scaled so that the last signal is zero and the first one stays."""
    root = alphas.sqrt()
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2


def schedule(kind: str = "linear", steps: int = 1000, start: float = 1e-4, end: float = 0.02, *,
             zero_snr: bool = False, snr_shift: float | None = None) -> Schedule:
    """Tables of a discrete diffusion over its steps, float32 [T].

    alphas_cumprod; signal and sigma, so that x = signal latents + sigma noise; of the posterior of x one step back
    (Ho et al. 2020): posterior_data, posterior_x, and the logarithms of its variance (low, as Nichol & Dhariwal 2021
    clip it) and of beta (high). zero_snr: Lin et al. 2023. snr_shift: CogVideoX divides the SNR by it, in float64.
    """
    def alphas(dtype: torch.dtype) -> Tensor:
        a = (1 - _betas(kind, steps, start, end, dtype)).cumprod(0)
        a = a if snr_shift is None else a / (snr_shift + (1 - snr_shift) * a)
        return _zero_terminal(a) if zero_snr else a

    a, wide = alphas(torch.float64 if snr_shift else torch.float32), alphas(torch.float64)
    before = torch.cat([wide.new_ones(1), wide[:-1]])
    beta = 1 - wide / before
    variance = beta * (1 - before) / (1 - wide)
    tables = {
        "alphas_cumprod": a,
        "signal": a.sqrt(),
        "sigma": (1 - a).sqrt(),
        "posterior_data": beta * before.sqrt() / (1 - wide),
        "posterior_x": (1 - before) * (1 - beta).sqrt() / (1 - wide),
        "low": torch.cat([variance[1:2], variance[1:]]).log(),
        "high": beta.log(),
    }
    return {k: v.float() for k, v in tables.items()}


def noised(s: Schedule, latents: Tensor, noise: Tensor, step: Tensor) -> Tensor:
    """x at a step. latents, noise [B, ...], step int [B]."""
    signal, sigma = _wide(s["signal"][step], latents), _wide(s["sigma"][step], latents)
    return (signal * latents.float() + sigma * noise.float()).to(latents.dtype)


def target(s: Schedule, kind: str, latents: Tensor, noise: Tensor, step: Tensor) -> Tensor:
    """What a model of this kind predicts: epsilon, v_prediction (Salimans & Ho 2022) or sample. [B, ...]."""
    _known("prediction type", kind, KINDS)
    if kind == "v_prediction":
        signal, sigma = _wide(s["signal"][step], latents), _wide(s["sigma"][step], latents)
        return signal * noise.float() - sigma * latents.float()
    return noise if kind == "epsilon" else latents


def recovered(s: Schedule, kind: str, prediction: Tensor, x: Tensor, step: Tensor) -> Tensor:
    """The latents that a prediction at x implies, float32 [B, ...]; epsilon has none at zero SNR."""
    _known("prediction type", kind, KINDS)
    signal, sigma = _wide(s["signal"][step], x), _wide(s["sigma"][step], x)
    if kind == "v_prediction":
        return signal * x.float() - sigma * prediction.float()
    return (x.float() - sigma * prediction.float()) / signal if kind == "epsilon" else prediction.float()


def snr(s: Schedule, step: Tensor) -> Tensor:
    """Signal to noise ratio, float32 [B]."""
    return (s["signal"][step] / s["sigma"][step]) ** 2


def min_snr(s: Schedule, kind: str, step: Tensor, gamma: float = 5.0) -> Tensor:
    """Weights of samples, min(SNR, gamma) on the error of the latents (Hang et al. 2023). step [B] -> [B]."""
    _known("prediction type", kind, KINDS)
    ratio = snr(s, step)
    if kind == "epsilon":
        return gamma / ratio.clamp(min=gamma)  # min(SNR, gamma) / SNR, also at zero SNR
    return ratio.clamp(max=gamma) / (ratio + 1) if kind == "v_prediction" else ratio.clamp(max=gamma)


def offset_noise(noise: Tensor, strength: float, extra: Tensor) -> Tensor:
    """noise + strength * extra: one number a channel, extra [B, C] (noise offset), or of noise's shape (input
    perturbation, for the model's input only)."""
    return noise + strength * extra.view(*extra.shape, *[1] * (noise.ndim - extra.ndim))


def variational_bound(s: Schedule, output: Tensor, latents: Tensor, x: Tensor, step: Tensor) -> Tensor:
    """The bound's term of each sample in bits per element, for a learned variance (Nichol & Dhariwal 2021). [B].

    output [B, 2C, ...]: epsilon, and the variance as a number in [-1, 1] between the posterior's and beta. Its
    gradient reaches the variance only. The hybrid loss of a sample is its mean square error of epsilon plus this; with
    the mean over steps in place of their sum no factor is needed at T = 1000 (theirs is T / 1000).
    """
    epsilon, between = output.float().chunk(2, 1)
    data = recovered(s, "epsilon", epsilon.detach(), x, step)
    low, high = _wide(s["low"][step], x), _wide(s["high"][step], x)
    a, b = _wide(s["posterior_data"][step], x), _wide(s["posterior_x"][step], x)
    latents, x = latents.float(), x.float()
    log_variance = low + (between + 1) / 2 * (high - low)
    mean, true = a * data + b * x, a * latents + b * x
    divergence = (log_variance - low + (low - log_variance).exp() + (true - mean) ** 2 * (-log_variance).exp() - 1) / 2
    last = -_log_likelihood(latents, mean, log_variance / 2)
    bits = torch.where(_wide(step, x) == 0, last, divergence) / math.log(2)
    return bits.flatten(1).mean(1)


def _log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Of x in bins of 2 / 255 on [-1, 1] under a normal, with the tanh fit of its distribution function."""
    def below(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    upper = below((x - mean + 1 / 255) * (-log_std).exp())
    lower = below((x - mean - 1 / 255) * (-log_std).exp())
    inside = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return inside.clamp(min=1e-12).log()


@dataclass(frozen=True)
class Times:
    """A distribution of times in [0, 1]; the shift moves it towards noise."""

    kind: str = "uniform"
    mean: float = 0.0  # of logit_normal
    std: float = 1.0  # of logit_normal
    scale: float = 1.29  # of mode
    shift: float = 1.0


# u [B] -> t [B], all from Esser et al. 2024 (SD3)
TIMES: dict[str, Callable[[Times, Tensor], Tensor]] = {
    "uniform": lambda c, u: u,
    "logit_normal": lambda c, u: torch.sigmoid(c.mean + c.std * torch.special.ndtri(u)),
    "mode": lambda c, u: 1 - u - c.scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u),
    "cosmap": lambda c, u: 1 - 1 / (torch.tan(math.pi / 2 * u) + 1),
}

WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {  # of a flow's error at t, as SD3's trainer names them
    "none": torch.ones_like,
    "sigma_sqrt": lambda t: t**-2.0,
    "cosmap": lambda t: 2 / (math.pi * (1 - 2 * t + 2 * t**2)),
}


def times(c: Times, u: Tensor, shift: float | Tensor | None = None) -> Tensor:
    """Times from uniform numbers u in [0, 1), of any shape; shift overrides c's, also one a sample."""
    _known("distribution of times", c.kind, tuple(TIMES))
    return shifted(TIMES[c.kind](c, u.double()), c.shift if shift is None else shift).float()


def draw(c: Times, key: Tensor, place: int | None = None, of: int | None = None,
         shift: float | Tensor | None = None) -> Tensor:
    """The time of a sample from its key int32 [2] (0-d), or of several from keys [B, 2] ([B]).

    place, of: sample number place among the global batch's `of` takes its own 1/of-th of the distribution; of keys
    [B, 2] the first sample has this place.
    """
    rows = key[None] if key.ndim == 1 else key
    u = random.uniform(rows, ())
    if (place, of) != (None, None):
        if place is None or of is None or not 0 <= place <= of - len(rows):
            raise ValueError(f"place {place} of {of} for {len(rows)} keys; it must be 0 <= place <= of - {len(rows)}")
        u = stratified(u, torch.arange(place, place + len(rows), device=u.device), of)
    return times(c, u[0] if key.ndim == 1 else u, shift)


def stratified(u: Tensor, i: int | Tensor, n: int) -> Tensor:
    """The i-th of n equal parts of [0, 1) takes u: (i + u) / n."""
    return ((i + u.double()) / n).float()


def steps_of(t: Tensor, steps: int) -> Tensor:
    """The discrete steps of times in [0, 1]: int64, below steps."""
    return (t * steps).long().clamp(max=steps - 1)


def shifted(t: Tensor, s: float | Tensor) -> Tensor:
    """Times moved towards noise: s t / (1 + (s - 1) t). Wan's flow_shift, SD3's sqrt of a ratio of sizes."""
    return s * t / (1 + (s - 1) * t)


def resolution_mu(tokens: int, base: int = 256, most: int = 4096, low: float = 0.5, high: float = 1.15) -> float:
    """FLUX's mu, linear in the number of tokens; the shift is exp(mu)."""
    return low + (high - low) * (tokens - base) / (most - base)


def size_shift(height: int, width: int, frames: int = 1, scale: float = 1.0) -> float:
    """Open-Sora 1.2's shift: scale * sqrt(pixels / 512**2) * sqrt(latent frames), 5 latents for 17 frames."""
    return scale * math.sqrt(height * width / 512**2) * math.sqrt(max(frames // 17 * 5, 1))


def bell(t: Tensor, shift: float = 5.0, steps: int = 1000) -> Tensor:
    """Wan's training weight ("bsmntw"): a Gaussian around t = 1/2, zero at t = 1, of mean 1 over the shifted grid."""
    height = lambda t: torch.exp(-2 * (t - 0.5) ** 2)
    grid = height(shifted(torch.arange(1, steps + 1, dtype=torch.float64) / steps, shift))
    return (height(t) - grid.min().item()) / (grid.mean() - grid.min()).item()
