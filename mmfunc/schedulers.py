"""The samplers by name: which of diffusers' schedulers each is, and the options of its config with their defaults."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mmfunc import diffusion, multistep, solvers
from mmfunc.solvers import Table


@dataclass(frozen=True)
class Scheduler:
    """A solver under its published name."""

    hub: str
    build: Callable[..., Table]
    options: dict[str, Any]
    limits: dict[str, tuple] = field(default_factory=dict)  # values that are there, where not all are
    unsaid: dict[str, Any] = field(default_factory=dict)  # what a config means that does not say
    more: tuple[str, ...] = ()  # options that are not in its config


_TIME = {"num_train_timesteps": 1000}
_BETAS = _TIME | {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "trained_betas": None}
_SPACING = {"prediction_type": "epsilon", "timestep_spacing": "leading", "steps_offset": 0}
_THRESHOLD = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_CLIP = {"clip_sample": True, "clip_sample_range": 1.0}
_RESPACED = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_ZERO = {"rescale_betas_zero_snr": False}
_DISCRETE = _BETAS | _SPACING | _ZERO
_LINSPACE = _BETAS | _SPACING | {"timestep_spacing": "linspace"}
_FLOW = {"use_flow_sigmas": False, "flow_shift": 1.0, "use_dynamic_shifting": False, "time_shift_type": "exponential"}
_MULTISTEP = _LINSPACE | _THRESHOLD | _RESPACED | _FLOW | _ZERO | {
    "solver_order": 2, "lower_order_final": True, "final_sigmas_type": "zero"}

_LIMITS = {
    "beta_schedule": diffusion.BETAS, "trained_betas": (None,), "prediction_type": diffusion.KINDS,
    "timestep_spacing": ("linspace", "leading", "trailing"), "thresholding": (False,), "use_beta_sigmas": (False,),
    "final_sigmas_type": ("zero", "sigma_min"), "sigma_min": (None,), "sigma_max": (None,), "invert_sigmas": (False,),
    "interpolation_type": ("linear",), "timestep_type": ("discrete",), "predict_x0": (True,), "solver_p": (None,),
    "use_lu_lambdas": (False,), "lambda_min_clipped": (-float("inf"),), "skip_prk_steps": (True,),
    "time_shift_type": ("exponential", "linear"), "solver_order": (1, 2, 3),
}
_COGVIDEOX = _DISCRETE | _CLIP | {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
                                 "set_alpha_to_one": True, "sample_max_value": 1.0, "snr_shift_scale": 3.0}


def _scheduler(hub: str, build: Callable, options: dict, *more: str, unsaid: dict | None = None,
               **limits: tuple) -> Scheduler:
    limits = {k: v for k, v in (_LIMITS | limits).items() if k in options}
    return Scheduler(hub, build, options, limits, unsaid or {}, more)


_WITH_FLOW = (*diffusion.KINDS, "flow_prediction")

SCHEDULERS = {
    "flow_euler": _scheduler("FlowMatchEulerDiscreteScheduler", solvers.flow_euler, _TIME | _RESPACED | {
        "shift": 1.0, "use_dynamic_shifting": False, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
        "max_image_seq_len": 4096, "invert_sigmas": False, "shift_terminal": None, "time_shift_type": "exponential",
        "stochastic_sampling": False}, "mu", "tokens", "sigmas"),
    "flow_heun": _scheduler("FlowMatchHeunDiscreteScheduler", solvers.flow_heun, _TIME | {"shift": 1.0}),
    "unipc": _scheduler("UniPCMultistepScheduler", multistep.unipc, _MULTISTEP | {
        "predict_x0": True, "solver_type": "bh2", "disable_corrector": [], "solver_p": None, "sigma_min": None,
        "sigma_max": None, "shift_terminal": None}, "mu", "sigmas", solver_type=("bh1", "bh2"),
        prediction_type=_WITH_FLOW, time_shift_type=("exponential",)),
    "dpm": _scheduler("DPMSolverMultistepScheduler", multistep.dpm, _MULTISTEP | {
        "algorithm_type": "dpmsolver++", "solver_type": "midpoint", "euler_at_final": False, "use_lu_lambdas": False,
        "lambda_min_clipped": -float("inf"), "variance_type": None}, "mu", solver_type=("midpoint", "heun"),
        algorithm_type=("dpmsolver++", "sde-dpmsolver++"), variance_type=(None,), prediction_type=_WITH_FLOW,
        time_shift_type=("exponential",)),
    "euler": _scheduler("EulerDiscreteScheduler", solvers.euler, _LINSPACE | _RESPACED | _ZERO | {
        "interpolation_type": "linear", "sigma_min": None, "sigma_max": None, "timestep_type": "discrete",
        "final_sigmas_type": "zero"}),
    "euler_ancestral": _scheduler("EulerAncestralDiscreteScheduler", solvers.euler_ancestral, _LINSPACE | _ZERO),
    "heun": _scheduler("HeunDiscreteScheduler", solvers.heun, _LINSPACE | _RESPACED | _CLIP | {
        "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}),
    "ddim": _scheduler("DDIMScheduler", solvers.ddim, _DISCRETE | _CLIP | _THRESHOLD | {
        "set_alpha_to_one": True}, "eta"),
    "ddpm": _scheduler("DDPMScheduler", solvers.ddpm, _DISCRETE | _CLIP | _THRESHOLD | {
        "variance_type": "fixed_small"},
        variance_type=("fixed_small", "fixed_small_log", "fixed_large", "learned_range")),
    "pndm": _scheduler("PNDMScheduler", multistep.pndm, _BETAS | _SPACING | {
        "skip_prk_steps": True, "set_alpha_to_one": False}, unsaid={"skip_prk_steps": False},
        prediction_type=("epsilon", "v_prediction")),
    "cogvideox_ddim": _scheduler("CogVideoXDDIMScheduler", solvers.cogvideox_ddim, _COGVIDEOX),
    "cogvideox_dpm": _scheduler("CogVideoXDPMScheduler", multistep.cogvideox_dpm, _COGVIDEOX),
}
