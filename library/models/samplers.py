"""The samplers that previews may use, by the names of `--sample_sampler`. Torch-free until `scheduler` is called."""

import importlib
import importlib.util
import warnings
from dataclasses import dataclass
from typing import Any

from library.errors import UserError, nearest


@dataclass(frozen=True)
class Sampler:
    """A scheduler class of diffusers by module and name, and its settings besides the model's noise schedule.

    `zero_snr`: it rescales betas itself; `spaced`: it can be told which timesteps to take.
    """

    module: str
    name: str
    settings: tuple[tuple[str, object], ...] = ()
    zero_snr: bool = False
    spaced: bool = True
    needs: str | None = None


_LAST_TRACE = 2.0**-24
_STARTING = (("clip_sample", False), ("set_alpha_to_one", False), ("steps_offset", 1))
_EULER = Sampler("scheduling_euler_discrete", "EulerDiscreteScheduler", zero_snr=True)
_EULER_A = Sampler("scheduling_euler_ancestral_discrete", "EulerAncestralDiscreteScheduler", zero_snr=True)
_LMS = Sampler("scheduling_lms_discrete", "LMSDiscreteScheduler", needs="scipy")
_DPM_2 = Sampler("scheduling_k_dpm_2_discrete", "KDPM2DiscreteScheduler")
_DPM_2_A = Sampler("scheduling_k_dpm_2_ancestral_discrete", "KDPM2AncestralDiscreteScheduler")
_MULTISTEP = ("scheduling_dpmsolver_multistep", "DPMSolverMultistepScheduler")
_SINGLESTEP = ("scheduling_dpmsolver_singlestep", "DPMSolverSinglestepScheduler")
_FIRST_ORDER = (("algorithm_type", "dpmsolver"), ("final_sigmas_type", "sigma_min"))

SAMPLERS = {
    "ddim": Sampler("scheduling_ddim", "DDIMScheduler", _STARTING, zero_snr=True),
    "pndm": Sampler(
        "scheduling_pndm",
        "PNDMScheduler",
        (("skip_prk_steps", True), ("set_alpha_to_one", False), ("steps_offset", 1)),
    ),
    "lms": _LMS,
    "euler": _EULER,
    "euler_a": _EULER_A,
    "heun": Sampler("scheduling_heun_discrete", "HeunDiscreteScheduler"),
    "dpm_2": _DPM_2,
    "dpm_2_a": _DPM_2_A,
    "dpmsolver": Sampler(*_MULTISTEP, _FIRST_ORDER, zero_snr=True),
    "dpmsolver++": Sampler(*_MULTISTEP, (("algorithm_type", "dpmsolver++"),), zero_snr=True),
    "dpmsingle": Sampler(*_SINGLESTEP, (("lower_order_final", True),), spaced=False),
    "k_lms": _LMS,
    "k_euler": _EULER,
    "k_euler_a": _EULER_A,
    "k_dpm_2": _DPM_2,
    "k_dpm_2_a": _DPM_2_A,
}


def check(name: str, where: str = "--sample_sampler") -> Sampler:
    """The sampler of this name.

    Raises:
        UserError: there is none, or it needs a package that is absent.
    """
    sampler = SAMPLERS.get(name)
    if sampler is None:
        advice = nearest(name, SAMPLERS) or f"choose from {', '.join(SAMPLERS)}"
        raise UserError.single(where, f"{name!r} is no sampler", advice)
    if sampler.needs and importlib.util.find_spec(sampler.needs) is None:
        advice = f"pip install {sampler.needs}, or use euler"
        raise UserError.single(where, f"the sampler {name} needs the package {sampler.needs}", advice)
    return sampler


def scheduler(name: str, noise_schedule: dict[str, Any], prediction_type: str, *, zero_snr: bool = False) -> Any:
    """A diffusers scheduler over the model's own noise schedule.

    A model that predicts noise is sampled over the plain schedule whatever `zero_snr` says: out of pure noise it could
    tell nothing of the picture. Samplers that know no such schedule get its betas, with a last trace of the picture.

    Args:
        noise_schedule: a scheduler config; only its betas count.
        zero_snr: sample over the schedule rescaled to zero terminal SNR, with trailing timesteps.

    Raises:
        UserError: as `check`.
    """
    sampler = check(name)
    kept = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "trained_betas")
    settings = {key: noise_schedule[key] for key in kept if key in noise_schedule}
    settings |= dict(sampler.settings) | {"prediction_type": prediction_type}
    module = importlib.import_module(f"diffusers.schedulers.{sampler.module}")
    if zero_snr and prediction_type == "v_prediction":
        settings |= {"rescale_betas_zero_snr": True} if sampler.zero_snr else {"trained_betas": _rescaled(settings)}
        if sampler.spaced:
            settings["timestep_spacing"] = "trailing"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return getattr(module, sampler.name)(**settings)


def _rescaled(noise_schedule: dict[str, Any]) -> list[float]:
    """The betas with zero terminal SNR, but for a last trace of the picture: without it, ratios would be infinite."""
    from library.models.schedule import alphas_cumprod

    products = alphas_cumprod({**noise_schedule, "rescale_betas_zero_snr": True}).clamp(min=_LAST_TRACE)
    before = products.roll(1)
    before[0] = 1.0
    return (1 - products / before).tolist()
