"""What is drawn for a denoising step: noise in all its kinds, and timesteps. What becomes of them: training.objective.

Every draw belongs to one sample, keyed by (seed, epoch, global micro-batch, position in it), so it is the same whatever
the number of processes and whatever was done before. Each kind of noise has a generator of its own, so that asking for
one changes no other. sd-scripts draws strengths and pyramid sizes once for a batch and divides by the batch's
deviation; here they are a sample's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from library.options.training import Loss
from library.rng import rng
from library.to_device import to_device
from library.training.coordinates import Coordinates

_Floats = NDArray[np.float32]
_Kind = Literal["offset", "pyramid", "perturbation"]


@dataclass(frozen=True)
class NoiseSettings:
    """The flags of these names; 0 is off. Timesteps lie in [min_timestep, max_timestep)."""

    noise_offset: float = 0.0
    min_timestep: int = 0
    max_timestep: int = 1000
    noise_offset_random_strength: bool = False
    adaptive_noise_scale: float = 0.0
    multires_noise_iterations: int = 0
    multires_noise_discount: float = 0.3
    ip_noise_gamma: float = 0.0
    ip_noise_gamma_random_strength: bool = False

    @classmethod
    def of(cls, loss: Loss, steps: int = 1000) -> "NoiseSettings":
        """What the flags say, for a noise schedule of so many timesteps."""
        return cls(
            noise_offset=loss.noise_offset or 0.0,
            min_timestep=loss.min_timestep or 0,
            max_timestep=min(loss.max_timestep or steps, steps),
            noise_offset_random_strength=loss.noise_offset_random_strength,
            adaptive_noise_scale=loss.adaptive_noise_scale or 0.0,
            multires_noise_iterations=loss.multires_noise_iterations or 0,
            multires_noise_discount=loss.multires_noise_discount,
            ip_noise_gamma=loss.ip_noise_gamma or 0.0,
            ip_noise_gamma_random_strength=loss.ip_noise_gamma_random_strength,
        )


@dataclass(frozen=True)
class Adaptive:
    """An offset whose strength depends on latents, so that only `finish` can add it.

    Attributes:
        draws: (b, c, 1, 1), standard normal.
        strength: (b, 1, 1, 1), what the latents' share is added to.
        scale: of the absolute mean of a latent channel.
        divide: the noise is divided by its deviation afterwards.
    """

    draws: torch.Tensor
    strength: torch.Tensor
    scale: float
    divide: bool


@dataclass(frozen=True)
class DrawnNoise:
    """Noise of a micro-batch, float32.

    Attributes:
        target: (b, c, h, w), the noise that counts for the target; without its offset while `adaptive` isn't None.
        perturbation: (b, c, h, w), what is added to it in the input only.
    """

    target: torch.Tensor
    perturbation: torch.Tensor | None = None
    adaptive: Adaptive | None = None

    @property
    def input(self) -> torch.Tensor:
        """What is added to latents: `target` itself where nothing perturbs the input."""
        return self.target if self.perturbation is None else self.target + self.perturbation


def draw_noise(shape: Sequence[int], at: Coordinates, settings: NoiseSettings) -> DrawnNoise:
    """Noise for latents of the shape (b, c, h, w), on the CPU; `finish` makes it ready for them.

    Sources: offset noise N. Guttenberg, "Diffusion with Offset Noise" (2023); pyramid noise J. Whitaker, "Multi-
    Resolution Noise for Diffusion Model Training" (2023); input perturbation Ning et al. 2023, "Input Perturbation
    Reduces Exposure Bias in Diffusion Models".
    """
    one = (shape[1], shape[2], shape[3])
    noise = np.empty((len(at.positions), *one), dtype=np.float32)
    for row, position in zip(noise, at.positions, strict=True):
        row[...] = rng(at.seed, at.noise, at.epoch, at.index, position).standard_normal(one, dtype=np.float32)
    adaptive, divide = None, settings.multires_noise_iterations > 0
    if settings.noise_offset:
        size = (one[0], 1, 1)
        offsets, strength = _scaled(size, at, "offset", settings.noise_offset, settings.noise_offset_random_strength)
        if settings.adaptive_noise_scale:
            adaptive = Adaptive(
                torch.from_numpy(offsets), torch.from_numpy(strength), settings.adaptive_noise_scale, divide
            )
        else:
            noise += strength * offsets
    if divide:
        for row, position in zip(noise, at.positions, strict=True):
            row += _pyramid(one, _generator(at, position, "pyramid"), settings)
            if adaptive is None:
                row /= np.float32(row.std(ddof=1, dtype=np.float64))
    perturbation = None
    if settings.ip_noise_gamma:
        draws, strength = _scaled(
            one, at, "perturbation", settings.ip_noise_gamma, settings.ip_noise_gamma_random_strength
        )
        perturbation = torch.from_numpy(strength * draws)
    return DrawnNoise(torch.from_numpy(noise), perturbation, adaptive)


def finish(drawn: DrawnNoise, latents: torch.Tensor) -> DrawnNoise:
    """The noise on the device of the latents (b, c, h, w), which are scaled already, with nothing left to adapt.

    An adaptive offset has the strength max(0, offset + scale * |mean of the latent channel|). The device isn't waited
    for.
    """
    device = latents.device
    target = to_device(drawn.target, device)
    if drawn.adaptive is not None:
        extra = drawn.adaptive.scale * latents.float().mean(dim=(2, 3), keepdim=True).abs()
        strength = (to_device(drawn.adaptive.strength, device) + extra).clamp(min=0.0)
        target = target + strength * to_device(drawn.adaptive.draws, device)
        if drawn.adaptive.divide:
            target = target / target.std(dim=(1, 2, 3), keepdim=True)
    perturbation = drawn.perturbation
    return DrawnNoise(target, None if perturbation is None else to_device(perturbation, device))


def draw_timesteps(at: Coordinates, settings: NoiseSettings) -> torch.Tensor:
    """Timesteps (b,), int64 on the CPU, uniform in [min_timestep, max_timestep)."""
    low, high = settings.min_timestep, settings.max_timestep
    draws = [int(rng(at.seed, "timestep", at.epoch, at.index, p).integers(low, high)) for p in at.positions]
    return torch.tensor(draws, dtype=torch.int64)


def _generator(at: Coordinates, position: int, kind: _Kind) -> np.random.Generator:
    return rng(at.seed, at.noise, at.epoch, at.index, position, kind)


def _scaled(
    shape: tuple[int, int, int], at: Coordinates, kind: _Kind, strength: float, varies: bool
) -> tuple[_Floats, _Floats]:
    """Normal draws (b, *shape) and the strength of each sample (b, 1, 1, 1): the given one, or uniform from 0 to it."""
    draws = np.empty((len(at.positions), *shape), dtype=np.float32)
    strengths = np.full((len(at.positions), 1, 1, 1), strength, dtype=np.float32)
    for number, position in enumerate(at.positions):
        generator = _generator(at, position, kind)
        draws[number] = generator.standard_normal(shape, dtype=np.float32)
        if varies:
            strengths[number] *= np.float32(generator.uniform())
    return draws, strengths


def _pyramid(shape: tuple[int, int, int], generator: np.random.Generator, settings: NoiseSettings) -> _Floats:
    """The sum of ever coarser noise, blown up bilinearly and weaker by the discount from level to level.

    The first level is as fine as the noise itself; the last is the one with a side of 1.
    """
    channels, height, width = shape
    total = np.zeros(shape, dtype=np.float32)
    for level in range(settings.multires_noise_iterations):
        shrunk = generator.uniform(2.0, 4.0) ** level
        sides = max(1, int(height / shrunk)), max(1, int(width / shrunk))
        coarse = torch.from_numpy(generator.standard_normal((1, channels, *sides), dtype=np.float32))
        fine = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
        total += np.float32(settings.multires_noise_discount**level) * fine[0].numpy()
        if 1 in sides:
            break
    return total
