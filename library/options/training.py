"""Flags of the run itself: how long, from where, and what the loss is."""

from typing import Literal

from library.options.flags import Group, equivalent, honoured


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
    initial_epoch: int | None = honoured(
        None, "epoch to start counting from, such as that of weights from --network_weights", ge=1
    )
    initial_step: int | None = honoured(None, "step to start counting from; wins over --initial_epoch", ge=0)
    skip_until_initial_step: bool = equivalent(
        False, "skip data up to the initial step", "data before the initial step is always skipped, without reading it"
    )
    stop_text_encoder_training: int | float = honoured(
        0,
        "stop training the text encoders after so many steps, or after a share such as 80%; 0 is never, -1 leaves them "
        "out",
        metavar="N|N%",
        ge=-1,
    )
    early_stopping_patience: int | None = honoured(
        None, "stop after so many validations in a row that were no better than the best one", ge=1
    )
    ignore_memory_check: bool = honoured(False, "start although the predicted memory is more than what is available")


class Loss(Group):
    """Noise and loss"""

    noise_offset: float | None = honoured(None, "add noise that is constant over a channel, times this", ge=0)
    min_snr_gamma: float | None = honoured(None, "weigh timesteps by min(SNR, gamma) / SNR; 5 is usual", ge=0)
    prior_loss_weight: float = honoured(1.0, "weight of regularization pictures", ge=0)
    min_timestep: int | None = honoured(None, "lowest timestep that is drawn (default: 0)", ge=0, lt=1000)
    max_timestep: int | None = honoured(None, "timesteps that are drawn lie below this (default: 1000)", ge=1, le=1000)
    loss_type: Literal["l1", "l2", "huber", "smooth_l1"] = honoured("l2", "distance between prediction and target")
    huber_schedule: Literal["constant", "exponential", "snr"] = honoured(
        "snr", "how the parameter of huber and smooth_l1 depends on the timestep", needs="loss_type"
    )
    huber_c: float = honoured(0.1, "parameter of huber and smooth_l1, reached at high noise", gt=0, needs="loss_type")
    huber_scale: float = honoured(
        1.0, "factor on that parameter (not for --huber_schedule snr)", gt=0, needs="loss_type"
    )
    noise_offset_random_strength: bool = honoured(
        False, "draw the strength of --noise_offset anew for each sample, from 0 to it", needs="noise_offset"
    )
    adaptive_noise_scale: float | None = honoured(
        None, "add this times the absolute mean of each latent channel to --noise_offset, which it needs"
    )
    multires_noise_iterations: int | None = honoured(
        None, "pyramid noise: add noise of so many lower resolutions; 6 to 10 is usual", ge=1, zero_is_off=True
    )
    multires_noise_discount: float = honoured(
        0.3, "strength of each further resolution of pyramid noise", gt=0, le=1, needs="multires_noise_iterations"
    )
    ip_noise_gamma: float | None = honoured(
        None, "input perturbation: more noise in the input than in the target; 0.1 is usual", ge=0
    )
    ip_noise_gamma_random_strength: bool = honoured(
        False, "draw the strength of --ip_noise_gamma anew for each sample, from 0 to it", needs="ip_noise_gamma"
    )
    zero_terminal_snr: bool = honoured(
        False,
        "rescale the noise schedule so that it ends in pure noise; on by itself where the base model says that it was "
        "trained so",
    )
    legacy_ztsnr_weights: bool = honoured(
        False, "with zero terminal SNR, weigh losses by the SNR before the rescaling, as sd-scripts does"
    )
    scale_v_pred_loss_like_noise_pred: bool = honoured(
        False, "weigh the loss of a v-prediction like that of a noise prediction"
    )
    v_pred_like_loss: float | None = honoured(
        None, "add this share of the loss that a v-prediction would have, for models that predict noise", ge=0
    )
    debiased_estimation_loss: bool = honoured(False, "weigh timesteps by 1/sqrt(SNR), v-predictions by 1/(SNR + 1)")
    masked_loss_normalize: bool = honoured(
        False, "divide masked losses by the mask's area instead of the whole picture's"
    )
