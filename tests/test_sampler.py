"""Samplers: diffusers' schedulers step by step; the loop compiled, whole and one step for all; guidance, starting from
an image, configs both ways."""

import importlib
import json
from functools import partial
from math import cos, pi

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.flux.pipeline_flux_img2img import FluxImg2ImgPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import StableDiffusionImg2ImgPipeline

from mmfunc import random, sampler
from mmfunc.jit import jit
from mmfunc.schedulers import SCHEDULERS

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
V, SAMPLE = {"prediction_type": "v_prediction"}, {"prediction_type": "sample"}
LEADING, TRAILING = {"timestep_spacing": "leading", "steps_offset": 1}, {"timestep_spacing": "trailing"}
ZERO = V | TRAILING | {"rescale_betas_zero_snr": True}
DYNAMIC = {"use_dynamic_shifting": True}
KARRAS, GEOMETRIC = {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}

CASES = [  # sampler, options of the config, options of a call
    *(("flow_euler", o, {}) for o in ({}, {"shift": 3.0}, {"shift": 17.0}, KARRAS, GEOMETRIC,
                                      {"stochastic_sampling": True}, {"shift": 2.0, "shift_terminal": 0.1})),
    ("flow_euler", DYNAMIC, {"mu": 1.15}), ("flow_euler", DYNAMIC | {"time_shift_type": "linear"}, {"mu": 2.0}),
    ("flow_euler", DYNAMIC, {"mu": 0.7, "sigmas": "flux"}), ("flow_euler", {"shift": 7.0}, {"sigmas": "hunyuan"}),
    ("flow_heun", {}, {}), ("flow_heun", {"shift": 3.0}, {}),
    *(("unipc", FLOW | o, {}) for o in ({"flow_shift": 3.0}, {"flow_shift": 5.0}, {"solver_type": "bh1"},
                                        {"solver_order": 1}, {"solver_order": 3}, {"disable_corrector": [0, 1, 4]})),
    ("unipc", FLOW | DYNAMIC, {"mu": 1.0}), ("unipc", FLOW | {"flow_shift": 2.0}, {"sigmas": "flux"}),
    ("unipc", FLOW | {"shift_terminal": 0.02}, {}),
    *(("unipc", o, {}) for o in ({}, SD, SD | V, SD | SAMPLE, SD | LEADING, SD | KARRAS, COSINE | KARRAS,
                                 SD | GEOMETRIC, SD | {"solver_order": 3, "solver_type": "bh1"}, ZERO,
                                 SD | {"final_sigmas_type": "sigma_min", "lower_order_final": False})),
    *(("dpm", FLOW | o, {}) for o in ({}, {"flow_shift": 3.0}, {"flow_shift": 3.0, "solver_type": "heun"})),
    ("dpm", FLOW | DYNAMIC, {"mu": 1.0}),
    *(("dpm", SD | o, {}) for o in ({}, V, SAMPLE, LEADING, TRAILING, KARRAS, GEOMETRIC, {"solver_order": 1},
                                    {"solver_order": 3}, {"solver_order": 3, "final_sigmas_type": "sigma_min"},
                                    {"solver_type": "heun"}, {"algorithm_type": "sde-dpmsolver++"}, ZERO,
                                    {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
                                    {"final_sigmas_type": "sigma_min"}, {"euler_at_final": True})),
    ("dpm", COSINE | KARRAS, {}),
    *(("euler", o, {}) for o in ({}, SD | LEADING, SD | V, SD | SAMPLE, SD | KARRAS, SD | TRAILING, SD | GEOMETRIC,
                                 ZERO, SD | {"final_sigmas_type": "sigma_min"})),
    *(("euler_ancestral", o, {}) for o in ({}, SD | LEADING, ZERO)),
    *(("heun", o, {}) for o in ({}, SD | LEADING, V, SAMPLE | {"clip_sample": True}, KARRAS)),
    *(("ddim", o, {}) for o in ({}, SD | {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
                                {"clip_sample_range": 0.5} | V, SAMPLE | TRAILING, {"timestep_spacing": "linspace"},
                                ZERO | {"clip_sample": False}, COSINE)),
    ("ddim", SD, {"eta": 1.0}), ("ddim", SD | V | TRAILING | {"clip_sample": False}, {"eta": 0.3}),
    *(("ddpm", o, {}) for o in ({}, {"clip_sample": False}, V, SAMPLE | LEADING, {"variance_type": "learned_range"},
                                {"variance_type": "fixed_large"}, {"variance_type": "fixed_small_log"} | TRAILING)),
    *(("pndm", {"skip_prk_steps": True} | o, {}) for o in ({}, SD | {"steps_offset": 1}, V,
                                                           TRAILING | {"set_alpha_to_one": True})),
    *((n, o, {}) for n in ("cogvideox_ddim", "cogvideox_dpm")
      for o in ({}, ZERO, V | {"set_alpha_to_one": False}, SAMPLE | {"timestep_spacing": "linspace"})),
]


def model(x, time, learned=False):
    """A smooth function in place of a network."""
    place = torch.linspace(0, 3, x[0].numel()).view(x.shape[1:])
    time = time.view(-1, *[1] * (x.ndim - 1)).float()
    out = torch.tanh(0.7 * x + torch.cos(place + 3 * time)) + 0.3 * torch.sin(5 * place)
    return torch.cat([out, torch.cos(x + place)], 1) if learned else out


def options(name, steps, call):
    """The options of a call for ours and for theirs."""
    grid = {"flux": np.linspace(1.0, 1 / steps, steps), "hunyuan": np.linspace(1.0, 0.0, steps + 1)[:-1]}
    ours = {k: grid.get(v, v) if k == "sigmas" else v for k, v in call.items()}
    theirs = {k: v for k, v in ours.items() if k != "eta"}
    return ours, theirs if "sigmas" in theirs else theirs | {"num_inference_steps": steps}


def theirs(monkeypatch, name, config, call, steps, noise, fresh, start=0, latents=None):
    """diffusers' scheduler run with the same model and noise: x before the first step and after each."""
    made = getattr(diffusers, SCHEDULERS[name].hub)
    given = iter(fresh)
    monkeypatch.setattr(importlib.import_module(made.__module__), "randn_tensor", lambda *a, **k: next(given),
                        raising=False)
    s = made(**config)
    s.set_timesteps(**options(name, steps, call)[1])
    if name == "unipc" and s.config.solver_order == 3:
        s.sigmas = s.sigmas.double()  # theirs solves for its factors in float32, to 1e-5 at this order
    flow = name.startswith("flow") or config.get("use_flow_sigmas")
    t = s.timesteps[start * s.order :]
    if hasattr(s, "set_begin_index"):
        s.set_begin_index(start * s.order)
    if latents is None:
        x = noise * getattr(s, "init_noise_sigma", 1.0)
    elif hasattr(s, "add_noise"):
        x = s.add_noise(latents, noise, t[:1].repeat(len(noise)))
    else:
        x = s.scale_noise(latents, t[:1] if name == "flow_euler" else t[0], noise)
    found, old = [x], None
    for i, now in enumerate(t):
        seen = s.scale_model_input(x, now) if hasattr(s, "scale_model_input") else x
        out = model(seen, (now / 1000 if flow else now).expand(len(x)), config.get("variance_type") == "learned_range")
        if name == "cogvideox_dpm":
            if old is not None and now >= 1000 // steps:
                next(given)  # theirs draws twice and uses the second
                fresh_twice = fresh[i]
                given = iter([fresh_twice, fresh_twice, *fresh[i + 1 :]])
            x, old = s.step(out, old, now, t[i - 1] if i else None, x, return_dict=False)
        else:
            x = s.step(out, now, x, **({"eta": call["eta"]} if "eta" in call else {}), return_dict=False)[0]
        found.append(x)
    return s, found


def ours(table, config, x, fresh):
    """The same run with ours."""
    state, found = x, [x["x"]]
    for i in range(len(table)):
        out = model(*sampler.model_input(table, state, i), config.get("variance_type") == "learned_range")
        state = sampler.step(table, state, i, out, noise=fresh[i])
        found.append(state["x"])
    return found


def close(a, b, tolerance=1e-5):
    worst = max(((x - y).abs().max() / y.abs().max()).item() for x, y in zip(a, b, strict=True))
    assert worst < tolerance, worst


def noises(n):
    g = torch.Generator().manual_seed(5)
    return torch.randn(2, 4, 3, 5, generator=g), [torch.randn(2, 4, 3, 5, generator=g) for _ in range(n)]


@pytest.mark.parametrize("steps", [4, 20, 50])
@pytest.mark.parametrize(("name", "config", "call"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_equal_to_diffusers_step_by_step(monkeypatch, name, config, call, steps):
    noise, fresh = noises(2 * steps)
    s, want = theirs(monkeypatch, name, config, call, steps, noise, fresh)
    table = sampler.table(name, steps, **config, **options(name, steps, call)[0])
    assert len(table) == len(s.timesteps) == len(want) - 1
    torch.testing.assert_close(table.timesteps, s.timesteps.float(), rtol=1e-5, atol=1e-4)
    # from a sigma of 4096 theirs loses digits in x + (x - data) / sigma * (next - sigma)
    tolerance = 5e-5 if config is ZERO and name.startswith("euler") else 1e-5
    close(ours(table, config, sampler.init(table, noise), fresh), want, tolerance)


STARTS = [("flow_euler", {"shift": 3.0}), ("flow_heun", {"shift": 3.0}), ("unipc", FLOW | {"flow_shift": 3.0}),
          ("unipc", SD), ("dpm", SD), ("dpm", SD | {"solver_order": 3}), ("euler", SD | LEADING),
          ("euler_ancestral", SD), ("heun", SD), ("ddim", SD | {"clip_sample": False}), ("ddpm", SD)]


@pytest.mark.parametrize("strength", [0.3, 0.55, 1.0])
@pytest.mark.parametrize(("name", "config"), STARTS, ids=lambda v: v if isinstance(v, str) else "")
def test_begins_with_an_image_as_diffusers_does(monkeypatch, name, config, strength):
    steps = 20
    noise, fresh = noises(2 * steps)
    latents = fresh.pop().tanh()
    first = sampler.begin(steps, strength)
    s, want = theirs(monkeypatch, name, config, {}, steps, noise, fresh, first, latents)
    table = sampler.table(name, steps, start=first, **config)
    x = sampler.start(table, 0, latents, noise)
    assert len(table) == len(want) - 1
    close(ours(table, config, sampler.init(table, x) | {"x": x}, fresh), want)
    if name == "flow_euler":
        close([sampler.sample(model, table, noise, latents=latents)], want[-1:])
    whole = sampler.table(name, steps, **config)  # the same noise at the same step of a table that begins early
    row = first * s.order
    close([sampler.start(whole, row, latents, noise), sampler.start(whole, torch.tensor(row), latents, noise)], [x, x])


def test_begin_is_get_timesteps():
    for up, pipeline in ((True, StableDiffusionImg2ImgPipeline), (False, FluxImg2ImgPipeline)):
        s = diffusers.FlowMatchEulerDiscreteScheduler()
        for steps in (1, 7, 20, 50):
            s.set_timesteps(steps)
            for strength in (0.31, 0.55, 0.7, 0.999, 1.0):
                left = pipeline.get_timesteps(type("", (), {"scheduler": s})(), steps, strength, "cpu")[0]
                assert steps - sampler.begin(steps, strength, up) == len(left)


COMPILED = [("flow_euler", {"shift": 3.0}), ("flow_heun", {}), ("unipc", FLOW | {"flow_shift": 5.0}), ("dpm", SD | V),
            ("euler_ancestral", SD | LEADING), ("ddim", {}),
            ("ddpm", {"variance_type": "learned_range"}), ("pndm", SD), ("cogvideox_dpm", ZERO)]


@pytest.mark.parametrize(("name", "config"), COMPILED, ids=lambda v: v if isinstance(v, str) else "")
def test_compiled_whole_and_one_step_for_all(name, config):
    noise, _ = noises(0)
    predict = partial(model, learned=config.get("variance_type") == "learned_range")
    table, key = sampler.table(name, 4, **config), random.key(3)
    want = sampler.sample(predict, table, noise, key=key)
    whole = jit(lambda noise, key: sampler.sample(predict, table, noise, key=key), backend="aot_eager")
    assert torch.equal(whole(noise, key), want)
    one = jit(lambda state, i, key: (sampler.advance(predict, table, state, i, key=key),), backend="aot_eager",
              donate=True)
    state = {k: v.clone() for k, v in sampler.init(table, noise).items()}
    for i in range(len(table)):
        state = one(state, torch.tensor(i), key)[0]
    assert torch.equal(sampler.finish(table, state), want) and len(one.entries) == 1
    if sampler.stochastic(table):
        assert not torch.equal(sampler.sample(predict, table, noise, key=random.key(4)), want)


def test_keys_of_samples_do_not_know_the_batch():
    table, keys = sampler.table("euler_ancestral", 5), random.split(random.key(1), 3)
    noise = torch.stack([random.normal(k, (4, 3, 5)) for k in keys])
    flat = lambda x, time: torch.tanh(x)  # does not see its place in the batch
    together = sampler.sample(flat, table, noise, key=keys)
    alone = [sampler.sample(flat, table, noise[i : i + 1], key=keys[i : i + 1]) for i in range(3)]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(alone[0], sampler.sample(flat, table, noise[:1], key=keys[0]))
    drawn = [sampler.step(table, {"x": noise}, i, noise * 0, key=k)["x"] - sampler.step(table, {"x": noise}, i, noise * 0,
             noise=noise * 0)["x"] for k in (keys, keys[0]) for i in (0, 1)]
    drawn = torch.stack([d.flatten() for d in drawn])
    assert (torch.corrcoef(drawn) - torch.eye(4)).abs().max() < 0.5  # every step has noise of its own


def test_half_precision_keeps_a_float32_state():
    table, (noise, _) = sampler.table("unipc", 20, **FLOW), noises(0)
    seen = []
    half = sampler.sample(lambda x, t: seen.append(x.dtype) or model(x.float(), t).to(x.dtype), table, noise.bfloat16())
    assert half.dtype == torch.bfloat16 and set(seen) == {torch.bfloat16}
    close([half.float()], [sampler.sample(model, table, noise.bfloat16().float())], 0.05)


def test_times_of_a_flow_give_back_diffusers_timesteps():
    for steps in (4, 30, 50):
        table = sampler.table("unipc", steps, **FLOW, flow_shift=5.0)
        s = diffusers.UniPCMultistepScheduler(**FLOW, flow_shift=5.0)
        s.set_timesteps(steps)
        times = [sampler.model_input(table, sampler.init(table, torch.zeros(1, 2)), i)[1] for i in range(steps)]
        torch.testing.assert_close(1000 * torch.cat(times), s.timesteps.float(), rtol=1.2e-7, atol=0)


def test_guidance_in_one_call_and_in_two():
    noise, (cond, uncond) = noises(2)
    calls = []

    def predict(x, time, cond):
        calls.append(len(x))
        return model(x + cond["text"][0] * cond["more"]["gain"][:, None, None, None], time)

    cond, uncond = ({"text": [t], "more": {"gain": torch.tensor([0.5, 2.0]) * k}} for t, k in ((cond, 1), (uncond, 3)))
    time = torch.tensor([0.3, 0.8])
    a, b = predict(noise, time, cond), predict(noise, time, uncond)
    want = b + 5.0 * (a - b)
    calls.clear()
    for two, sizes in ((False, [4]), (True, [2, 2])):
        close([sampler.guided(predict, noise, time, cond, uncond, 5.0, two_calls=two)], [want])
        assert calls == sizes
        close([sampler.guided(predict, noise, time, cond, uncond, 5.0, 0.7, two)], [rescale_noise_cfg(want, a, 0.7)])
        calls.clear()


def test_dynamic_scale_is_cogvideox():
    for steps, t in ((50, 999), (50, 399), (50, 19), (20, 0)):
        want = 1 + 6.0 * ((1 - cos(pi * ((steps - t) / steps) ** 5.0)) / 2)
        assert abs(sampler.dynamic_scale(6.0, torch.tensor(float(t)), steps).item() - want) < 1e-5


def test_tokens_shift_as_flux_does():
    for tokens in (256, 1024, 4096, 7000):
        a = sampler.table("flow_euler", 8, **DYNAMIC, tokens=tokens)
        b = sampler.table("flow_euler", 8, **DYNAMIC, mu=calculate_shift(tokens))
        assert torch.allclose(a.values, b.values, rtol=1e-6)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_configs_both_ways(name, tmp_path):
    changed = {"num_train_timesteps": 500} | ({"prediction_type": "v_prediction"} if name[:4] != "flow" else {})
    hub = getattr(diffusers, SCHEDULERS[name].hub)
    theirs = hub(**changed | ({"skip_prk_steps": True} if name == "pndm" else {}))
    config = json.loads(theirs.to_json_string())
    told = sampler.to_config(name, **changed)
    assert told == config
    (tmp_path / "scheduler_config.json").write_text(json.dumps(told))
    assert json.loads(hub.from_pretrained(tmp_path).to_json_string()) == config
    a, b = sampler.from_config(config)(8), sampler.table(name, 8, **changed)
    assert torch.equal(a.values, b.values) and a.columns == b.columns and a.name == name
    assert SCHEDULERS[name].options | SCHEDULERS[name].unsaid == {k: v for k, v in hub().config.items() if k[0] != "_"}


def test_a_config_saved_for_another_scheduler():
    """SDXL's: entries of PNDM and DDIM that Euler does not read."""
    config = {"_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.19.0", "clip_sample": False,
              "interpolation_type": "linear", "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
              "trained_betas": None, "timestep_spacing": "leading", "sample_max_value": 1.0} | SD
    made = sampler.from_config(config)(30)
    assert torch.equal(made.values, sampler.table("euler", 30, **SD, **LEADING).values)


@pytest.mark.parametrize(("call", "says"), [
    (lambda: sampler.table("ddimm", 10), "no sampler 'ddimm'; there are flow_euler, flow_heun, unipc"),
    (lambda: sampler.table("ddim", 10, karras=True), "ddim has no option karras; it has num_train_timesteps"),
    (lambda: sampler.table("ddim", 10, prediction_type="flow"), "prediction_type is 'flow'; known are 'epsilon'"),
    (lambda: sampler.table("dpm", 10, thresholding=True), "thresholding is True; known are False"),
    (lambda: sampler.table("ddim", 1001), "0 <= start < steps <= 1000"),
    (lambda: sampler.table("ddim", 10, start=10), "start 10 of 10 steps"),
    (lambda: sampler.table("flow_euler", 10, **DYNAMIC), "give mu="),
    (lambda: sampler.table("unipc", 10, **V, use_flow_sigmas=True), "go together"),
    (lambda: sampler.table("ddim", 10, **ZERO | {"prediction_type": "epsilon"}), "zero terminal SNR"),
    (lambda: sampler.table("unipc", 20, **SD, lower_order_final=False), "no finite factor"),
    (lambda: sampler.from_config({"_class_name": "LCMScheduler"}), "'LCMScheduler' is not known; there are FlowMatch"),
    (lambda: sampler.from_config({"_class_name": "DDIMScheduler", "bogus": 1}), "entries bogus are not known"),
    (lambda: sampler.from_config({"_class_name": "PNDMScheduler"})(9), "skip_prk_steps is False; known are True"),
    (lambda: sampler.table("euler", 9, **KARRAS, **GEOMETRIC), "use_karras_sigmas and use_exponential_sigmas are both"),
    (lambda: sampler.begin(20, 0.0), "strength is 0.0"),
    (lambda: sampler.sample(model, sampler.table("ddpm", 4), torch.zeros(1, 2, 2)), "ddpm draws noise: give key="),
])
def test_errors_say_what_is_allowed(call, says):
    with pytest.raises(ValueError) as e:
        call()
    assert says in str(e.value)
