"""Flags of the run itself: how long, from where, and what the loss is."""

from typing import Literal

from library.options.flags import Group, honoured, refused

_LATER = "not supported yet; leave it out"
_RESUME = "--resume goes on exactly where the state was saved"
_L2 = "only l2 is supported yet"


class Training(Group):
    """Training"""

    max_train_steps: int = honoured(1600, "optimizer steps", ge=1)
    max_train_epochs: int | None = honoured(
        None, "epochs; takes the place of --max_train_steps", ge=1, zero_is_off=True
    )
    seed: int | None = honoured(None, "seed of every random draw (default: a new one, which is shown)", ge=0)
    gradient_accumulation_steps: int = honoured(1, "batches per optimizer step", ge=1)
    resume: str | None = honoured(None, "state folder to go on from, or `latest` in --output_dir", metavar="DIR|latest")
    resume_schedule: Literal["keep", "stretch"] | None = honoured(
        None, "on --resume with another total of steps: keep the old learning rate curve, or stretch it"
    )
    initial_epoch: int | None = refused(None, "epoch to start from", _RESUME)
    initial_step: int | None = refused(None, "step to start from", _RESUME)
    skip_until_initial_step: bool = refused(False, "skip data up to the initial step", _RESUME)


class Loss(Group):
    """Noise and loss"""

    noise_offset: float | None = honoured(None, "add noise that is constant over a channel, times this", ge=0)
    min_snr_gamma: float | None = honoured(None, "weigh timesteps by min(SNR, gamma) / SNR; 5 is usual", ge=0)
    prior_loss_weight: float = honoured(1.0, "weight of regularization pictures", ge=0)
    min_timestep: int | None = honoured(None, "lowest timestep that is drawn (default: 0)", ge=0, lt=1000)
    max_timestep: int | None = honoured(None, "timesteps that are drawn lie below this (default: 1000)", ge=1, le=1000)
    loss_type: Literal["l1", "l2", "huber", "smooth_l1"] = honoured(
        "l2", "distance between prediction and target", refuse={"l1": _L2, "huber": _L2, "smooth_l1": _L2}
    )
    huber_schedule: Literal["constant", "exponential", "snr"] = refused(
        "snr", "how the huber loss depends on the timestep", _L2, needs="loss_type"
    )
    huber_c: float = refused(0.1, "parameter of the huber loss", _L2, needs="loss_type")
    huber_scale: float = refused(1.0, "scale of the huber loss", _L2, needs="loss_type")
    noise_offset_random_strength: bool = refused(
        False, "draw the strength of --noise_offset", _LATER, needs="noise_offset"
    )
    adaptive_noise_scale: float | None = refused(None, "add the latents' mean to --noise_offset", _LATER)
    multires_noise_iterations: int | None = refused(None, "pyramid noise", "not supported yet; use --noise_offset")
    multires_noise_discount: float = refused(
        0.3, "strength of pyramid noise", "not supported yet; use --noise_offset", needs="multires_noise_iterations"
    )
    ip_noise_gamma: float | None = refused(None, "perturb the input", _LATER)
    ip_noise_gamma_random_strength: bool = refused(False, "draw --ip_noise_gamma", _LATER, needs="ip_noise_gamma")
    zero_terminal_snr: bool = honoured(
        False,
        "rescale the noise schedule so that it ends in pure noise; on by itself where the base model says that it was "
        "trained so",
    )
    scale_v_pred_loss_like_noise_pred: bool = refused(
        False, "weigh the loss of a v-prediction like that of a noise prediction", _LATER
    )
    v_pred_like_loss: float | None = refused(None, "add a v-prediction-like loss", _LATER)
    debiased_estimation_loss: bool = refused(
        False, "weigh timesteps by 1/sqrt(SNR)", "not supported yet; use --min_snr_gamma"
    )
