"""Multistep solvers as tables (see solvers.py): they remember what earlier outputs implied.

The first steps have lower order, for want of a past, and the last ones for stability. Half logarithms of the SNR are
the time in which these methods are exact (Lu et al. 2022; Zhao et al. 2023).
"""

import math
from types import SimpleNamespace as Options

import numpy as np

from mmfunc import diffusion, solvers
from mmfunc.solvers import Numbers, Table, Update


def _schedule(o: Options, steps: int) -> tuple[Numbers, Numbers]:
    """(timesteps [n], sigmas [n + 1]) of a flow or of a discrete diffusion."""
    if o.use_flow_sigmas != (o.prediction_type == "flow_prediction"):
        raise ValueError(f"{o.name}: use_flow_sigmas={o.use_flow_sigmas} with prediction_type={o.prediction_type!r}; "
                         "flow_prediction and flow sigmas go together")
    if not o.use_flow_sigmas:
        if getattr(o, "sigmas", None) is not None or getattr(o, "shift_terminal", None):
            raise ValueError(f"{o.name}: sigmas and shift_terminal need use_flow_sigmas=True")
        return solvers.ladder(o, steps, True)
    if o.use_karras_sigmas or o.use_exponential_sigmas or o.final_sigmas_type != "zero":
        raise ValueError(f"{o.name}: flow sigmas are not combined with karras or exponential ones, and end at zero")
    sigmas = np.linspace(1, 1 / o.num_train_timesteps, steps + 1)
    if o.name == "dpm":
        shift = math.exp(solvers.mu_of(o)) if o.use_dynamic_shifting else o.flow_shift
        sigmas = diffusion.shifted(1 - sigmas, shift)[::-1][:-1]
    else:
        given = sigmas[:-1] if o.sigmas is None else np.asarray(o.sigmas, np.float64)
        sigmas = np.array(solvers.flow_shifted(o, given, o.flow_shift))
        sigmas[0] -= 1e-6 if abs(sigmas[0] - 1) < 1e-6 else 0.0  # pure noise would be infinitely far away
    return np.trunc(sigmas * o.num_train_timesteps), solvers.closed(sigmas)


def _prepared(o: Options, steps: int, start: int) -> tuple[Numbers, tuple[Numbers, Numbers], Numbers]:
    """(timesteps [n], factors of latents and noise [n + 1], half log SNR [n + 1]) from the step to begin with."""
    t, s = _schedule(o, steps)
    t, s = t[start:], s[start:]
    signal, sigma = (1 - s, s) if o.use_flow_sigmas else (1 / np.sqrt(s**2 + 1), s / np.sqrt(s**2 + 1))
    return t, (signal, sigma), np.log(signal) - np.log(sigma)


def _finished(o: Options, t: Numbers, levels: tuple[Numbers, Numbers], move: Update) -> Table:
    levels = levels[0][:-1], levels[1][:-1]
    times = t / o.num_train_timesteps if o.use_flow_sigmas else t
    return solvers.table(o, t, times, levels, solvers.implied(o.prediction_type, *levels) | move)


def dpm(o: Options, steps: int, start: int) -> Table:
    """DPM-Solver++ and its stochastic form, orders 1 to 3 (Lu et al. 2022)."""
    if o.algorithm_type == "sde-dpmsolver++" and o.solver_order > 2:
        raise ValueError(f"dpm: solver_order {o.solver_order} is not there for sde-dpmsolver++; 1 and 2 are")
    t, (signal, sigma), lam = _prepared(o, steps, start)
    n, few = len(t), steps < 15 and o.lower_order_final
    rows = []
    for i in range(n):
        left = n - i
        final = left == 1 and (o.euler_at_final or few or o.final_sigmas_type == "zero")
        order = 1 if final else min(o.solver_order, i + 1, 2 if left == 2 and few else 3)
        rows.append(_dpm_row(o, signal[i + 1], sigma[i + 1], sigma[i], lam, i, order))
    past = [f"m{k}" for k in range(1, o.solver_order)]
    return _finished(o, t, (signal, sigma), {"x": solvers.column(rows)} | dict(zip(past, ["data", *past])))


def _dpm_row(o: Options, signal: float, after: float, sigma: float, lam: Numbers, i: int, order: int) -> dict:
    h = lam[i + 1] - lam[i]
    rate = 2 if o.algorithm_type == "sde-dpmsolver++" else 1
    gain = -np.expm1(-rate * h)
    row = {"x": after / sigma * (np.exp(-h) if rate == 2 else 1.0), "data": signal * gain, "m1": 0.0, "m2": 0.0}
    if rate == 2:
        row["noise"] = after * np.sqrt(gain)
    if order == 1:
        return row
    slope = signal * (gain / 2 if o.solver_type == "midpoint" and order == 2 else 1 - gain / (rate * h))
    r0 = (lam[i] - lam[i - 1]) / h
    newer, older = slope, 0.0  # factors of the two divided differences
    if order == 3:
        r1 = (lam[i - 1] - lam[i - 2]) / h
        bend = -signal * ((h - gain) / h**2 - 0.5)
        newer, older = slope + (slope * r0 + bend) / (r0 + r1), -(slope * r0 + bend) / (r0 + r1)
        row |= {"m1": older / r1, "m2": -older / r1}
    return row | {"data": row["data"] + newer / r0, "m1": row["m1"] - newer / r0}


def unipc(o: Options, steps: int, start: int) -> Table:
    """UniPC (Zhao et al. 2023): each output first corrects the step that led to it, then predicts the next one."""
    t, (signal, sigma), lam = _prepared(o, steps, start)
    n, rows, corrected, order = len(t), [], [], 0
    past = [f"m{k}" for k in range(1, o.solver_order + 1)]
    for i in range(n):
        base = {"x": 1.0}
        if i and i + start - 1 not in o.disable_corrector:
            base = _unified(o, signal[i], sigma[i] / sigma[i - 1], lam, i - 1, order, ["last", *past, "data"])
        order = min(o.solver_order, n - i if o.lower_order_final else n, i + 1)
        row = _unified(o, signal[i + 1], sigma[i + 1] / sigma[i], lam, i, order, ["base", "data", *past, None])
        ratio = row.pop("base")
        rows.append({k: row.get(k, 0.0) + ratio * base.get(k, 0.0) for k in row | base})
        corrected.append(base)
    copies = dict(zip(past, ["data", *past]))
    return _finished(o, t, (signal, sigma), {"x": solvers.column(rows), "last": solvers.column(corrected)} | copies)


def _unified(o: Options, signal: float, ratio: float, lam: Numbers, i: int, order: int, names: list) -> dict:
    """Factors of a step from i to i + 1; names: of x at i, of the data at i, i - 1, ... and, if known, at i + 1."""
    h = lam[i] - lam[i + 1]
    growth = np.expm1(h)
    scale = h if o.solver_type == "bh1" else growth
    places = [(lam[i] - lam[i - j]) / h for j in range(1, order)] + [1.0]
    phi, factorial, right = growth / h - 1, 1, []
    for k in range(1, order + 1):
        right.append(phi * factorial / scale)
        factorial *= k + 1
        phi = phi / h - 1 / factorial
    known = order if names[-1] else order - 1
    powers = [[r**k for r in places[:known]] for k in range(known)]
    weights = np.linalg.solve(powers, right[:known]) if known > 1 else [0.5] * known
    row = {names[0]: ratio, names[1]: -signal * growth}
    for name, place, weight in zip([*names[2 : order + 1], names[-1]], places, weights):
        row[name] = -signal * scale * weight / place
        row[names[1]] -= row[name]
    return row


def cogvideox_dpm(o: Options, steps: int, start: int) -> Table:
    """CogVideoX's stochastic DPM-Solver++ of second order."""
    t, a, p, alphas = solvers.points(o, steps, start)
    lam = lambda alpha: np.log(alpha / (1 - alpha)) / 2
    h = lam(p) - lam(a)
    gain = -np.expm1(-2 * h) * np.sqrt(p)
    second = (np.arange(len(t)) > 0) & (t >= o.num_train_timesteps // steps)
    back = np.where(second, h / (lam(a) - lam(np.roll(a, 1))) / 2, 0.0)
    move: Update = {"x": {"x": np.sqrt((1 - p) / (1 - a)) * np.exp(-h), "data": gain * (1 + back), "old": -gain * back,
                          "noise": np.sqrt((1 - p) * -np.expm1(-2 * h))}, "old": "data"}
    return solvers.discrete(o, t, a, move)


def pndm(o: Options, steps: int, start: int) -> Table:
    """PNDM's linear multistep method (Liu et al. 2022) after a first step of Heun's kind, so one call more."""
    low, _, _, alphas = solvers.points(o, steps, start)
    width, final = o.num_train_timesteps // steps, 1.0 if o.set_alpha_to_one else alphas[0]
    rows = []
    for i, t in enumerate(np.concatenate([low[:2], low[1:]])):
        now, after = (t + width, t) if i == 1 else (t, t - width)
        a, p = alphas[now], alphas[after] if after >= 0 else final
        gain = (a - p) / (a * np.sqrt(1 - p) + np.sqrt(a * (1 - a) * p))
        velocity = o.prediction_type == "v_prediction"
        x, e = np.sqrt(p / a) + velocity * gain * np.sqrt(1 - a), gain * (np.sqrt(a) if velocity else 1.0)
        past = ([1], [0.5, 0.5], [1.5, -0.5], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24])
        held = {"held": x} if i == 1 else {"x": x}
        rows.append(held | {k: e * w for k, w in zip(("output", "e1", "e2", "e3"), past[min(i, 4)])})
    second = np.arange(len(rows)) == 1  # its output is used once and not remembered
    keep = lambda new, old: {new: np.where(second, 0.0, 1.0), old: np.where(second, 1.0, 0.0)}
    move = {"x": solvers.column(rows), "held": "x", "e1": keep("output", "e1"), "e2": keep("e1", "e2"),
            "e3": keep("e2", "e3")}
    t = np.concatenate([low[:2], low[1:]])
    return solvers.table(o, t, t.astype(np.float64), (np.sqrt(alphas[t]), np.sqrt(1 - alphas[t])), move)
