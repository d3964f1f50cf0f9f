"""One micro-batch: latents and conditioning -> noise -> prediction -> the loss of each sample.

The training loop and the validation both look at batches through this; when, and what for, is theirs.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from library.conditioning import Conditioning
from library.console import error
from library.data.caches.latents import NAN_ADVICE, NAN_LATENTS
from library.data.loader import Batch
from library.errors import Problem, UserError
from library.options.specs import PRESERVE
from library.to_device import to_device
from library.training.coordinates import Coordinates
from library.training.distributed import Processes
from library.training.noise import NoiseSettings, draw_noise, draw_timesteps, finish
from library.training.objective import Objective
from library.training.trainable import Trainable

_LOGVAR_LIMITS = (-30.0, 20.0)
"""Between these the VAEs of diffusers keep the logarithm of a variance."""


class Denoiser(Protocol):
    """What is needed of a model."""

    latent_scale: float

    def encode_images(self, pixels: torch.Tensor, *, moments: bool = False) -> torch.Tensor: ...
    def predict(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning, sizes: torch.Tensor
    ) -> torch.Tensor: ...


Encode = Callable[[Sequence[str]], Conditioning]
"""Captions -> their conditioning: the text encoders themselves where they train, else what keeps their outputs."""


class Denoising:
    """What turns batches into losses: model, text conditioning, objective, and the network on the model."""

    def __init__(
        self,
        model: Denoiser,
        encode: Encode,
        trainable: Trainable,
        objective: Objective,
        noise: NoiseSettings,
        processes: Processes,
    ) -> None:
        self.model, self.encode, self.trainable = model, encode, trainable
        self.objective, self.noise, self.processes = objective, noise, processes

    def losses(self, batch: Batch, at: Coordinates, timesteps: torch.Tensor | None = None) -> torch.Tensor:
        """Losses (b,) float32 of a batch that isn't empty; weights of samples (`loss_weights`) are not in them.

        Args:
            at: where the draws of noise come from.
            timesteps: (b,) int64 on the CPU; drawn where none are given.
        """
        device = self.processes.device
        latents = self._latents(batch)
        noise = finish(draw_noise(latents.shape, at, self.noise), latents)
        timesteps = to_device(draw_timesteps(at, self.noise) if timesteps is None else timesteps, device)
        noisy = self.objective.add_noise(latents, noise.input, timesteps)
        target = self.objective.target(latents, noise.target, timesteps)
        preserved = [i for i, attributes in enumerate(batch.custom_attributes) if attributes.get(PRESERVE)]
        if preserved:
            rows = to_device(torch.tensor(preserved), device)
            kept = self._without_network(batch, noisy[rows], timesteps[rows], preserved)
            target = target.index_copy(0, rows, kept)
        self.trainable.set_multiplier(batch.multiplier)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trainable.trains_text_encoder):
            conditioning = self.encode(batch.captions)
        prediction = self.model.predict(noisy, timesteps, conditioning, batch.sizes)
        masks = None if batch.masks is None else to_device(batch.masks, device)
        return self.objective.losses(prediction, target, timesteps, masks)

    def _without_network(
        self, batch: Batch, noisy: torch.Tensor, timesteps: torch.Tensor, chosen: Sequence[int]
    ) -> torch.Tensor:
        """What the base model predicts for the chosen samples: the network's strength is 0, in text encoders too."""
        self.trainable.set_multiplier(0.0)
        with torch.no_grad():
            conditioning = self.encode([batch.captions[i] for i in chosen])
            return self.model.predict(noisy, timesteps, conditioning, batch.sizes[list(chosen)])

    def _latents(self, batch: Batch) -> torch.Tensor:
        """Scaled latents (b, c, h, w), float32, on the device: the mean of the VAE's distribution, or a draw."""
        latents, logvar = batch.latents, batch.logvar
        if latents is None:
            if batch.pixels is None:
                raise ValueError("a batch holds neither latents nor pixels")
            latents = self.model.encode_images(batch.pixels, moments=batch.posterior is not None)
            finite = torch.isfinite(latents).flatten(1).all(dim=1).tolist()
            self._tell_broken([name for name, fine in zip(batch.names, finite, strict=True) if not fine])
            if batch.posterior is not None:
                latents, logvar = latents.chunk(2, dim=1)
        latents = to_device(latents, self.processes.device).float()
        if logvar is not None and batch.posterior is not None:
            logvar, draws = (to_device(one, latents.device).to(latents) for one in (logvar, batch.posterior))
            latents = latents + torch.exp(0.5 * logvar.clamp(*_LOGVAR_LIMITS)) * draws
        return latents * self.model.latent_scale

    def _tell_broken(self, names: Sequence[str]) -> None:
        """Pictures without usable latents end the run: at once, or with several processes by a loss that is no number,
        which all of them see together."""
        problems = [Problem(name, NAN_LATENTS, NAN_ADVICE) for name in names]
        if problems and self.processes.count == 1:
            raise UserError(problems)
        for problem in problems:
            error(str(problem))
