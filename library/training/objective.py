"""From clean latents to a loss: noise, timesteps, target and weights of the denoising objective.

Every draw belongs to one sample, keyed by (seed, epoch, global micro-batch, position in it), so it is the same
whatever the number of processes and whatever was done before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from library.rng import rng


@dataclass(frozen=True)
class Coordinates:
    """Where a micro-batch stands: epochs count from 1, `index` counts an epoch's global micro-batches from 0.

    `noise` is the random stream that its noise comes from.
    """

    seed: int
    epoch: int
    index: int
    positions: tuple[int, ...]
    noise: Literal["noise", "validation"] = "noise"


@dataclass(frozen=True)
class NoiseSettings:
    """`--noise_offset`, `--min_timestep` (inclusive), `--max_timestep` (exclusive)."""

    noise_offset: float = 0.0
    min_timestep: int = 0
    max_timestep: int = 1000


def draw_noise(shape: Sequence[int], at: Coordinates, settings: NoiseSettings) -> torch.Tensor:
    """Gaussian noise (b, c, h, w), float32 on the CPU, plus one offset per sample and channel if asked for.

    Source of the offset: N. Guttenberg, "Diffusion with Offset Noise" (2023).
    """
    noise = np.empty((len(at.positions), *shape[1:]), dtype=np.float32)
    for row, position in zip(noise, at.positions, strict=True):
        generator = rng(at.seed, at.noise, at.epoch, at.index, position)
        row[...] = generator.standard_normal(row.shape, dtype=np.float32)
        if settings.noise_offset:
            offset = generator.standard_normal((row.shape[0], 1, 1), dtype=np.float32)
            row += np.float32(settings.noise_offset) * offset
    return torch.from_numpy(noise)


def draw_timesteps(at: Coordinates, settings: NoiseSettings) -> torch.Tensor:
    """Timesteps (b,), int64 on the CPU, uniform in [min_timestep, max_timestep)."""
    low, high = settings.min_timestep, settings.max_timestep
    draws = [int(rng(at.seed, "timestep", at.epoch, at.index, p).integers(low, high)) for p in at.positions]
    return torch.tensor(draws, dtype=torch.int64)


class Objective:
    """The denoising loss of one noise schedule.

    Args:
        alphas_cumprod: (1000,), float64, the schedule's cumulative products.
        prediction_type: what the U-Net predicts.
        min_snr_gamma: caps the weight of easy timesteps (Hang et al. 2023, "Efficient Diffusion Training via Min-SNR
            Weighting Strategy"): min(SNR, g) / SNR for epsilon, min(SNR, g) / (SNR + 1) for v-prediction.
    """

    def __init__(
        self, alphas_cumprod: torch.Tensor, prediction_type: str, min_snr_gamma: float | None, device: torch.device
    ) -> None:
        if prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"no objective for prediction type {prediction_type!r}")
        table = alphas_cumprod.double()
        self._predicts_v = prediction_type == "v_prediction"
        self._signal = table.sqrt().float().to(device)
        self._noise = (1.0 - table).sqrt().float().to(device)
        snr = table / (1.0 - table)
        weights = torch.ones_like(snr)
        if min_snr_gamma:
            capped = snr.clamp(max=min_snr_gamma)
            weights = capped / (snr + 1.0) if self._predicts_v else (min_snr_gamma / snr).clamp(max=1.0)
        self.weights = weights.float().to(device)

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
        """Weighted mean squared error of each sample, (b,), float32.

        `masks` (b, 1, h, w) multiply the errors; the mean still divides by all elements, as in sd-scripts.
        """
        errors = torch.nn.functional.mse_loss(prediction.float(), target.float(), reduction="none")
        if masks is not None:
            errors = errors * masks
        return errors.mean(dim=(1, 2, 3)) * self.weights[timesteps]
