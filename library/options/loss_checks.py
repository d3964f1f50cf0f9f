"""What must hold between the flags of noise and loss, with each other and with what the base model predicts."""

from collections.abc import Iterator

from library.errors import Problem
from library.options.registry import Options

_BENT = ("huber", "smooth_l1")
_HUBER_FLAGS = ("huber_schedule", "huber_c", "huber_scale")
_SNR_WEIGHTS = (
    "min_snr_gamma",
    "scale_v_pred_loss_like_noise_pred",
    "v_pred_like_loss",
    "debiased_estimation_loss",
)


def problems(options: Options) -> Iterator[Problem]:
    """What is wrong whatever the base model is."""
    loss = options.loss
    if loss.adaptive_noise_scale and not loss.noise_offset:
        wrong = "is added to --noise_offset, which is off"
        yield Problem(options.where("adaptive_noise_scale"), wrong, "add --noise_offset, such as 0.05")
    low, high = loss.min_timestep or 0, loss.max_timestep or 1000
    if low >= high:
        name = "min_timestep" if loss.min_timestep is not None else "max_timestep"
        yield Problem(options.where(name), f"no timestep lies from {low} to below {high}")


def notices(options: Options) -> Iterator[str]:
    """Lines about flags that do nothing beside the others."""
    loss, given = options.loss, options.explicit
    if loss.loss_type == "l1":
        for name in _HUBER_FLAGS:
            if name in given:
                yield f"{options.where(name)}: has no effect with --loss_type l1"
    if loss.loss_type in _BENT and loss.huber_schedule == "snr" and loss.huber_scale != 1:
        yield (
            f"{options.where('huber_scale')}: has no effect with --huber_schedule snr, only with constant and "
            "exponential"
        )
    if loss.legacy_ztsnr_weights and not _weighs_by_snr(options):
        yield (
            f"{options.where('legacy_ztsnr_weights')}: has no effect without a weighting such as --min_snr_gamma or "
            "--debiased_estimation_loss"
        )


def objective_problems(options: Options, prediction_type: str | None) -> Iterator[Problem]:
    """What doesn't go with the base model's prediction type, "epsilon" or "v_prediction"; None, if it has yet to be
    probed, goes with everything."""
    loss = options.loss
    if loss.scale_v_pred_loss_like_noise_pred and prediction_type == "epsilon":
        yield Problem(
            options.where("scale_v_pred_loss_like_noise_pred"),
            "is for base models that predict velocity (v), and this one predicts noise",
            "leave it out",
        )
    if loss.v_pred_like_loss and prediction_type == "v_prediction":
        yield Problem(
            options.where("v_pred_like_loss"),
            "is for base models that predict noise, and this one predicts velocity (v)",
            "leave it out",
        )


def objective_notices(options: Options, *, zero_terminal_snr: bool, masks: bool) -> Iterator[str]:
    """Lines about flags that find nothing to work on: a rescaled noise schedule, or pictures with masks."""
    loss = options.loss
    if loss.legacy_ztsnr_weights and not zero_terminal_snr and _weighs_by_snr(options):
        yield f"{options.where('legacy_ztsnr_weights')}: has no effect, the noise schedule is not of zero terminal SNR"
    if loss.masked_loss_normalize and not masks:
        yield f"{options.where('masked_loss_normalize')}: has no effect, no picture has a mask"


def _weighs_by_snr(options: Options) -> bool:
    return any(options.value(name) for name in _SNR_WEIGHTS)
