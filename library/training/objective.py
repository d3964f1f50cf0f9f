"""From noise and timesteps to a loss: noisy latents, targets, distances and weights of the denoising objective.

Everything that depends on a timestep is a table that is made once; a step only looks up in it, on the device. What is
drawn: training.noise.
"""

from dataclasses import dataclass, fields
from typing import Literal

import torch

from library.options.training import Loss

_SNR_LIMITS = (1e-4, 1000.0)
"""What a signal-to-noise ratio is taken to be at least and at most, where a weight divides by it."""
_LEAST_AREA = 1e-12


@dataclass(frozen=True)
class LossSettings:
    """The flags of these names; 0 or None is off."""

    loss_type: Literal["l1", "l2", "huber", "smooth_l1"] = "l2"
    huber_schedule: Literal["constant", "exponential", "snr"] = "snr"
    huber_c: float = 0.1
    huber_scale: float = 1.0
    min_snr_gamma: float | None = None
    scale_v_pred_loss_like_noise_pred: bool = False
    v_pred_like_loss: float | None = None
    debiased_estimation_loss: bool = False
    masked_loss_normalize: bool = False
    legacy_ztsnr_weights: bool = False

    @classmethod
    def of(cls, loss: Loss) -> "LossSettings":
        """What the flags say."""
        return cls(**{field.name: getattr(loss, field.name) for field in fields(cls)})


class Objective:
    """The denoising loss of one noise schedule.

    Args:
        alphas_cumprod: (T,), float64, the schedule's cumulative products; its last may be 0.
        prediction_type: what the U-Net predicts, "epsilon" or "v_prediction".
        alphas_before: (T,), float64, the products before they were rescaled to zero terminal SNR, which
            `--legacy_ztsnr_weights` weighs by; None where nothing was rescaled.

    Attributes:
        weights: (T,), float32 on the device, the factor of a sample's loss at each timestep.

    Raises:
        ValueError: there is no objective for this prediction type.
    """

    def __init__(
        self,
        alphas_cumprod: torch.Tensor,
        prediction_type: str,
        settings: LossSettings,
        device: torch.device,
        *,
        alphas_before: torch.Tensor | None = None,
    ) -> None:
        if prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"no objective for prediction type {prediction_type!r}")
        table = alphas_cumprod.double().cpu()
        weighed_by = table
        if settings.legacy_ztsnr_weights and alphas_before is not None:
            weighed_by = alphas_before.double().cpu()
        self.settings = settings
        self._predicts_v = prediction_type == "v_prediction"
        self._signal = table.sqrt().float().to(device)
        self._noise = (1.0 - table).sqrt().float().to(device)
        self.weights = weight_table(weighed_by, self._predicts_v, settings).float().to(device)
        self._thresholds = huber_table(table, settings).float().to(device)

    def _scales(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._signal[timesteps].view(-1, 1, 1, 1), self._noise[timesteps].view(-1, 1, 1, 1)

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """sqrt(abar_t) x + sqrt(1 - abar_t) n, (b, c, h, w)."""
        signal, sigma = self._scales(timesteps)
        return signal * latents + sigma * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the U-Net should predict: the noise, or v = sqrt(abar) n - sqrt(1 - abar) x (Salimans & Ho 2022)."""
        if not self._predicts_v:
            return noise
        signal, sigma = self._scales(timesteps)
        return signal * noise - sigma * latents

    def losses(
        self,
        prediction: torch.Tensor,
        target: torch.Tensor,
        timesteps: torch.Tensor,
        masks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The weighted mean distance of each sample, (b,), float32.

        `masks` (b, 1, h, w) multiply the distances. Their mean divides by all elements, as in sd-scripts, or with
        `masked_loss_normalize` by a sample's masked area; a mask of nothing gives 0.
        """
        distances = self._distances(prediction.float(), target.float(), timesteps)
        if masks is None:
            return distances.mean(dim=(1, 2, 3)) * self.weights[timesteps]
        means = (distances * masks).mean(dim=(1, 2, 3))
        if self.settings.masked_loss_normalize:
            means = means / masks.float().mean(dim=(1, 2, 3)).clamp(min=_LEAST_AREA)
        return means * self.weights[timesteps]

    def _distances(self, prediction: torch.Tensor, target: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Per element. Pseudo-Huber (Charbonnier et al. 1997): 2 c (sqrt(d^2 + c^2) - c), smooth L1 without the c,
        written so that nothing cancels where d is small."""
        if self.settings.loss_type == "l2":
            return torch.nn.functional.mse_loss(prediction, target, reduction="none")
        if self.settings.loss_type == "l1":
            return torch.nn.functional.l1_loss(prediction, target, reduction="none")
        threshold = self._thresholds[timesteps].view(-1, 1, 1, 1)
        square = (prediction - target).square()
        bent = 2.0 * square / ((square + threshold.square()).sqrt() + threshold)
        return bent * threshold if self.settings.loss_type == "huber" else bent


def weight_table(alphas_cumprod: torch.Tensor, predicts_v: bool, settings: LossSettings) -> torch.Tensor:
    """The product of all weightings that are on, at each timestep: (T,) float64, finite at SNR 0 as well.

    With S the SNR up to 1000, and from 1e-4 where it is divided by: min-SNR (Hang et al. 2023, "Efficient Diffusion
    Training via Min-SNR Weighting Strategy") is min(1, g / SNR) for epsilon, min(SNR, g) / (SNR + 1) for v; a v-loss
    like that of noise is S / (S + 1); a share k of a loss like that of v adds k (S + 1) / S; debiased estimation (Yu et
    al. 2024, "Unmasking Bias in Diffusion Model Training") is 1 / sqrt(S) for epsilon, 1 / (S + 1) for v.
    """
    snr = alphas_cumprod / (1.0 - alphas_cumprod)
    low, high = _SNR_LIMITS
    capped, limited = snr.clamp(max=high), snr.clamp(low, high)
    weights = torch.ones_like(snr)
    gamma = settings.min_snr_gamma
    if gamma:
        weights = snr.clamp(max=gamma) / (snr + 1.0) if predicts_v else (gamma / snr).clamp(max=1.0)
    if settings.scale_v_pred_loss_like_noise_pred:
        weights = weights * capped / (capped + 1.0)
    if settings.v_pred_like_loss:
        weights = weights * (1.0 + settings.v_pred_like_loss * (limited + 1.0) / limited)
    if settings.debiased_estimation_loss:
        weights = weights * (1.0 / (capped + 1.0) if predicts_v else limited.rsqrt())
    return weights


def huber_table(alphas_cumprod: torch.Tensor, settings: LossSettings) -> torch.Tensor:
    """The parameter c of huber and smooth_l1 at each timestep: (T,) float64.

    `constant` is c s, `exponential` c^(t / T) s, with the scale s; `snr` is (1 - c) / (1 + sigma)^2 + c without it,
    where sigma = sqrt((1 - abar) / abar), from 1 without noise to c without signal.
    """
    steps = len(alphas_cumprod)
    if settings.huber_schedule == "constant":
        return torch.full((steps,), settings.huber_c * settings.huber_scale, dtype=torch.float64)
    if settings.huber_schedule == "exponential":
        times = torch.arange(steps, dtype=torch.float64) / steps
        return settings.huber_c**times * settings.huber_scale
    share = alphas_cumprod / (alphas_cumprod.sqrt() + (1.0 - alphas_cumprod).sqrt()).square()
    return (1.0 - settings.huber_c) * share + settings.huber_c
