"""Objectives and distributions of times: diffusers' trainers and schedulers with given numbers, IDDPM's bound by its
definition in float64, and what each distribution must be."""

import math

import diffusers
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from diffusers.schedulers.scheduling_ddim_cogvideox import CogVideoXDDIMScheduler
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
    compute_snr,
)
from torch.distributions import Normal, kl_divergence

from mmfunc import diffusion, random
from mmfunc.diffusion import Times
from mmfunc.jit import jit

STEPS = torch.tensor([0, 1, 437, 998, 999])
SCHEDULES = [("linear", 1e-4, 0.02), ("scaled_linear", 0.00085, 0.012), ("squaredcos_cap_v2", 1e-4, 0.02)]


def normals(*shape, seed=0, n=2):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g) for _ in range(n)]


def test_blend_is_scale_noise():
    latents, noise = normals(3, 4, 2, 5)
    s = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    t = s.timesteps[[3, 500, 998]]
    x, velocity = diffusion.blend(latents, noise, t / 1000)
    torch.testing.assert_close(x, s.scale_noise(latents, t, noise), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x - t.view(3, 1, 1, 1) / 1000 * velocity, latents, rtol=1e-5, atol=1e-6)


def test_half_precision_is_blended_in_float32():
    latents, noise = (v.bfloat16() for v in normals(2, 4, 3))
    x, velocity = diffusion.blend(latents, noise, torch.tensor([0.1, 0.9]))
    wide = diffusion.blend(latents.float(), noise.float(), torch.tensor([0.1, 0.9]))
    assert x.dtype == torch.bfloat16 and torch.equal(x, wide[0].bfloat16()) and torch.equal(velocity, wide[1])


def test_mean_error_of_shards_adds_up():
    a, b = normals(6, 2, 3)
    weight = torch.tensor([1.0, 0, 2, 0.5, 1, 3])
    each = torch.nn.functional.mse_loss(a, b, reduction="none").mean((1, 2))
    torch.testing.assert_close(diffusion.mean_error(a, b, {}), torch.nn.functional.mse_loss(a, b))
    whole = diffusion.mean_error(a, b, {"weight": weight})
    torch.testing.assert_close(whole, (each * weight).sum() / weight.sum())
    parts = [diffusion.mean_error(a[r], b[r], {"weight": weight[r], "num_items_in_batch": weight.sum()})
             for r in (slice(0, 2), slice(2, 6))]
    torch.testing.assert_close(sum(parts), whole)
    half = diffusion.mean_error(a.bfloat16(), b.bfloat16(), {})
    assert half.dtype == torch.float32 and half.ndim == 0


def test_a_loss_mask_leaves_out_what_it_masks():
    a, b = normals(2, 4, 5, 3)
    mask = torch.ones(2, 1, 5, 1)
    mask[:, :, 0] = 0  # the first frame is given
    want = torch.nn.functional.mse_loss(a[:, :, 1:], b[:, :, 1:])
    torch.testing.assert_close(diffusion.mean_error(a, b, {"loss_mask": mask}), want)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(("kind", "start", "end"), SCHEDULES)
def test_schedules_are_diffusers(kind, start, end, zero):
    ref = diffusers.DDIMScheduler(beta_schedule=kind, beta_start=start, beta_end=end, rescale_betas_zero_snr=zero)
    s = diffusion.schedule(kind, 1000, start, end, zero_snr=zero)
    torch.testing.assert_close(s["alphas_cumprod"], ref.alphas_cumprod, rtol=1e-5, atol=1e-9)
    assert zero or torch.equal(s["alphas_cumprod"], ref.alphas_cumprod)
    latents, noise = normals(5, 4, 2, 3)
    target = {k: diffusion.target(s, k, latents, noise, STEPS) for k in diffusion.KINDS}
    x = diffusion.noised(s, latents, noise, STEPS)
    torch.testing.assert_close(x, ref.add_noise(latents, noise, STEPS), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(target["v_prediction"], ref.get_velocity(latents, noise, STEPS), rtol=1e-5, atol=1e-5)
    assert target["epsilon"] is noise and target["sample"] is latents
    rows = slice(0, 3)  # away from the end, where epsilon says little about the latents
    for k, v in target.items():
        found = diffusion.recovered(s, k, v[rows], x[rows], STEPS[rows])
        torch.testing.assert_close(found, latents[rows], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(diffusion.snr(s, STEPS), compute_snr(ref, STEPS), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("zero", [False, True])
def test_the_schedule_of_cogvideox(zero):
    ref = CogVideoXDDIMScheduler(rescale_betas_zero_snr=zero, snr_shift_scale=3.0)
    s = diffusion.schedule("scaled_linear", 1000, 0.00085, 0.012, zero_snr=zero, snr_shift=3.0)
    torch.testing.assert_close(s["alphas_cumprod"], ref.alphas_cumprod.float(), rtol=1e-6, atol=1e-9)
    # CogVideoX weighs the error of the latents with 1 / (1 - alphas_cumprod): the error of v
    latents, noise, error = normals(5, 4, 2, 3, n=3)
    x, v = diffusion.noised(s, latents, noise, STEPS), diffusion.target(s, "v_prediction", latents, noise, STEPS)
    data = diffusion.recovered(s, "v_prediction", v + error, x, STEPS)
    theirs = (data - latents).square().mean((1, 2, 3)) / (1 - s["alphas_cumprod"][STEPS])
    keep = slice(1, None)  # step 0: the latents' float32 rounding over 1 - alpha = 3e-4
    torch.testing.assert_close(theirs[keep], error.square().mean((1, 2, 3))[keep], rtol=1e-3, atol=1e-6)


def test_zero_terminal_snr():
    betas = torch.linspace(1e-4, 0.02, 1000)
    want = (1 - rescale_zero_terminal_snr(betas)).cumprod(0)
    found = diffusion.schedule(zero_snr=True)
    torch.testing.assert_close(found["alphas_cumprod"], want, rtol=1e-5, atol=1e-9)
    assert found["alphas_cumprod"][-1] == 0 and found["signal"][-1] == 0 and found["sigma"][-1] == 1


def test_min_snr_is_the_trainers_formula():
    s, ref = diffusion.schedule(), diffusers.DDPMScheduler()
    step = torch.arange(0, 1000, 37)
    ratio = compute_snr(ref, step)
    least = torch.stack([ratio, 5.0 * torch.ones_like(ratio)], 1).min(1).values
    for kind, want in (("epsilon", least / ratio), ("v_prediction", least / (ratio + 1)), ("sample", least)):
        torch.testing.assert_close(diffusion.min_snr(s, kind, step), want, rtol=1e-4, atol=0)
    zero = diffusion.schedule(zero_snr=True)
    ends = [diffusion.min_snr(zero, kind, torch.tensor([999])).item() for kind in diffusion.KINDS]
    assert ends == [1.0, 0.0, 0.0]


def test_offset_noise():
    noise, other = normals(2, 3, 4, 5)
    channel = normals(2, 3, n=1)[0]
    assert torch.equal(diffusion.offset_noise(noise, 0.02, channel), noise + 0.02 * channel[:, :, None, None])
    assert torch.equal(diffusion.offset_noise(noise, 0.1, other), noise + 0.1 * other)


def bound(betas, output, latents, x, step):
    """The bound's term by its definition: divergence of two normals, or the likelihood of a bin of 8-bit pixels."""
    alphas = (1 - betas).cumprod(0)
    before = torch.cat([alphas.new_ones(1), alphas[:-1]])
    variance = betas * (1 - before) / (1 - alphas)
    found = []
    for i, t in enumerate(step.tolist()):
        epsilon, between = output[i].double().chunk(2)
        low, high = variance[max(t, 1)].log(), betas[t].log()
        share = (between + 1) / 2
        std = (share * high + (1 - share) * low).exp().sqrt()
        data = (x[i].double() - (1 - alphas[t]).sqrt() * epsilon) / alphas[t].sqrt()
        kept = (1 - before[t]) * (1 - betas[t]).sqrt() / (1 - alphas[t]) * x[i].double()
        true, mean = (kept + betas[t] * before[t].sqrt() / (1 - alphas[t]) * d for d in (latents[i].double(), data))
        if t:
            nats = kl_divergence(Normal(true, variance[t].sqrt()), Normal(mean, std))
        else:
            cdf = lambda v: 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))
            upper, lower = (cdf((latents[i] - mean + d) / std) for d in (1 / 255, -1 / 255))
            upper, lower = upper.where(latents[i] < 0.999, 1.0), lower.where(latents[i] > -0.999, 0.0)
            nats = -(upper - lower).clamp(min=1e-12).log()
        found.append(nats.mean() / math.log(2))
    return torch.stack(found).float()


@pytest.mark.parametrize(("kind", "start", "end"), SCHEDULES)
def test_the_variational_bound(kind, start, end):
    s = diffusion.schedule(kind, 1000, start, end)
    latents, noise, wrong = normals(6, 3, 4, 4, n=3)
    latents = (latents * 0.6).clamp(-1, 1)
    step = torch.tensor([0, 0, 1, 437, 900, 999])
    x = diffusion.noised(s, latents, noise, step)
    output = torch.cat([noise + 0.1 * wrong, wrong.tanh()], 1).requires_grad_()
    betas = {"linear": torch.linspace(start, end, 1000, dtype=torch.float64),
             "scaled_linear": torch.linspace(start**0.5, end**0.5, 1000, dtype=torch.float64) ** 2,
             }.get(kind, diffusers.DDPMScheduler(beta_schedule=kind).betas.double())
    found = diffusion.variational_bound(s, output, latents, x, step)
    torch.testing.assert_close(found, bound(betas, output.detach(), latents, x, step), rtol=2e-4, atol=1e-5)
    slope = torch.autograd.grad(found.sum(), output)[0]
    assert not slope[:, :3].any() and slope[:, 3:].abs().amin(0).max() > 0


def test_a_perfect_prediction_has_no_divergence():
    s = diffusion.schedule()
    latents, noise = normals(3, 2, 4)
    step = torch.tensor([5, 300, 999])
    x = diffusion.noised(s, latents, noise, step)
    exact = torch.cat([noise, -torch.ones_like(noise)], 1)
    assert diffusion.variational_bound(s, exact, latents, x, step).abs().max() < 1e-4


def test_densities_of_sd3_with_the_same_numbers():
    n, seed = 64, lambda: torch.Generator().manual_seed(2)
    u = torch.rand(n, generator=seed())
    for kind in ("uniform", "mode"):
        want = compute_density_for_timestep_sampling(kind, n, mode_scale=1.29, generator=seed())
        torch.testing.assert_close(diffusion.times(Times(kind), u), want, rtol=1e-5, atol=1e-6)
    want = compute_density_for_timestep_sampling("logit_normal", n, logit_mean=0.3, logit_std=0.8, generator=seed())
    z = torch.normal(mean=0.3, std=0.8, size=(n,), generator=seed())
    u = torch.special.ndtr((z.double() - 0.3) / 0.8)
    torch.testing.assert_close(diffusion.times(Times("logit_normal", 0.3, 0.8), u), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", diffusion.WEIGHTS)
def test_weights_of_sd3(kind):
    sigmas = torch.linspace(0.01, 1, 50)
    torch.testing.assert_close(diffusion.WEIGHTS[kind](sigmas), compute_loss_weighting_for_sd3(kind, sigmas))


def test_cosmap_has_the_density_of_its_weight():
    edges = torch.linspace(0, 1, 11, dtype=torch.float64)
    t = diffusion.times(Times("cosmap"), (torch.arange(100000) + 0.5) / 100000)
    share = torch.histogram(t.double(), edges).hist / len(t)
    fine = torch.linspace(0, 1, 10001, dtype=torch.float64)
    want = torch.trapezoid(diffusion.WEIGHTS["cosmap"](fine)[:-1].view(10, 1000), dx=1e-4)
    torch.testing.assert_close(share, want, rtol=5e-3, atol=0)


@pytest.mark.parametrize("kind", diffusion.TIMES)
def test_times_are_in_range_and_finite(kind):
    u = torch.tensor([0.0, 2.0**-24, 0.5, 1 - 2.0**-24])
    for shift in (1.0, 5.0):
        t = diffusion.times(Times(kind, shift=shift), u)
        assert t.dtype == torch.float32 and t.min() >= 0 and t.max() <= 1
    assert abs(diffusion.times(Times(kind, shift=3.0), u[2:3]).item() - 0.75) < 1e-6  # all have their median at 1/2


def test_shifts():
    t = torch.linspace(0, 1, 1001)[1:]
    s = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    torch.testing.assert_close(diffusion.shifted(t, 5.0).flip(0), s.sigmas, rtol=1e-5, atol=1e-7)
    mu = diffusion.resolution_mu(1024)
    s = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    torch.testing.assert_close(diffusion.shifted(t, math.exp(mu)), s.time_shift(mu, 1.0, t), rtol=1e-5, atol=1e-7)
    assert [diffusion.resolution_mu(n) for n in (256, 4096)] == [0.5, 1.15]
    each = diffusion.times(Times(), torch.full((2,), 0.5), torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(each, torch.tensor([0.5, 0.75]))
    assert [diffusion.size_shift(512, 512), diffusion.size_shift(256, 256, 51)] == [1.0, 0.5 * 15**0.5]


def test_bell_is_wans_training_weight():
    """Their table over the 1,000 shifted sigmas, from its definition."""
    sigma = torch.linspace(1, 0, 1001)[:-1]
    t = 5 * sigma / (1 + 4 * sigma)
    y = torch.exp(-2 * ((1000 * t - 500) / 1000) ** 2)
    y = y - y.min()
    torch.testing.assert_close(diffusion.bell(t), y * 1000 / y.sum(), rtol=1e-4, atol=1e-5)


def test_a_sample_draws_its_own_time():
    keys = random.split(random.key(7), 8)
    c = Times("logit_normal", shift=3.0)
    together = diffusion.draw(c, keys)
    assert torch.equal(together, torch.stack([diffusion.draw(c, k) for k in keys])) and len(together.unique()) == 8
    parts = diffusion.draw(Times(), keys, 0, 8)
    assert torch.equal((parts * 8).floor(), torch.arange(8.0))  # one in each eighth
    assert torch.equal(parts, torch.stack([diffusion.draw(Times(), k, i, 8) for i, k in enumerate(keys)]))
    assert torch.equal(parts[3:5], diffusion.draw(Times(), keys[3:5], 3, 8))  # a rank's share of the batch
    assert torch.equal(diffusion.steps_of(parts, 8), torch.arange(8))
    assert diffusion.steps_of(torch.tensor([0.0, 1.0]), 1000).tolist() == [0, 999]


def test_uniform_and_logit_normal_are_distributed_so():
    keys = random.split(random.key(1), 400)
    t = torch.sort(diffusion.draw(Times("logit_normal", -0.2, 1.4), keys)).values.double()
    place = Normal(-0.2, 1.4).cdf(torch.logit(t))
    assert (place - (torch.arange(400) + 0.5) / 400).abs().max() < 1.63 / 20  # Kolmogorov-Smirnov, 1 %


def test_a_loss_compiles_once():
    s = diffusion.schedule(zero_snr=True)

    def loss(latents, noise, step):
        x, v = diffusion.noised(s, latents, noise, step), diffusion.target(s, "v_prediction", latents, noise, step)
        return diffusion.mean_error(x.tanh(), v, {"weight": diffusion.min_snr(s, "v_prediction", step)})

    one = jit(loss, backend="aot_eager")
    for seed in (0, 1):
        latents, noise = normals(5, 4, 2, 3, seed=seed)
        step = (STEPS + seed) % 1000
        torch.testing.assert_close(one(latents, noise, step), loss(latents, noise, step))
    assert len(one.entries) == 1


@pytest.mark.parametrize(("call", "says"), [
    (lambda: diffusion.schedule("cosine"), "beta schedule 'cosine' is not known; there are linear, scaled_linear"),
    (lambda: diffusion.target({}, "velocity", None, None, None), "'velocity' is not known; there are epsilon"),
    (lambda: diffusion.min_snr({}, "flow", None), "prediction type 'flow' is not known"),
    (lambda: diffusion.times(Times("lognorm"), torch.rand(2)), "'lognorm' is not known; there are uniform, logit_normal"),
    (lambda: diffusion.draw(Times(), random.key(0), 3), "place 3 of None"),
    (lambda: diffusion.draw(Times(), random.key(0), 8, 8), "place 8 of 8"),
])
def test_errors_say_what_is_known(call, says):
    with pytest.raises(ValueError) as e:
        call()
    assert says in str(e.value)
