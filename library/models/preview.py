"""Pictures from prompts with the model that trains, adapters included: guidance over a diffusers sampler.

Not a diffusers pipeline object: those cost seconds of imports and assume one dtype. This one computes in float32
around `Model.predict` and encodes prompts as training does (clip skip, rows); its call has the same argument names.
Where the U-Net takes sizes, it is told that the picture was made at the size that is drawn, and not cropped.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from library.conditioning import Conditioning
from library.models.offload import set_aside

if TYPE_CHECKING:
    from library.models.model import Model


@dataclass(frozen=True)
class PreviewOutput:
    """What a pipeline returns."""

    images: list[Image.Image]


class PreviewPipeline:
    """`pipeline(prompt=..., negative_prompt=..., width=..., height=..., latents=...).images`.

    The U-Net and text encoder stay in the mode (train or eval) that the caller left them in. With `offload` the text
    encoders and the VAE are in RAM while the U-Net draws, and the U-Net and they while the VAE decodes.
    """

    def __init__(
        self,
        model: "Model",
        scheduler: Any,
        encode: Callable[[Sequence[str]], Conditioning],
        *,
        offload: bool = False,
    ) -> None:
        self.model, self.scheduler, self.encode, self.offload = model, scheduler, encode, offload

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | None = None,
        *,
        width: int,
        height: int,
        num_inference_steps: int = 30,
        guidance_scale: float = 7.5,
        latents: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        conditioning: Conditioning | None = None,
    ) -> PreviewOutput:
        """Draw one picture per prompt.

        Args:
            width, height: pixels, multiples of the VAE's factor.
            guidance_scale: 1 or less draws without guidance, at half the cost.
            latents: starting noise (b, c, h, w) of unit variance; drawn from `generator` where it is None.
            generator: a CPU generator, also for samplers that add noise on the way.
            conditioning: what `text_of` gave for the same prompts and guidance, where it is drawn from more than once.

        Raises:
            ValueError: a size that is no multiple of the VAE's factor.
        """
        model = self.model
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if width % model.vae_factor or height % model.vae_factor:
            raise ValueError(f"{width}x{height} is no multiple of {model.vae_factor}")
        if latents is None:
            channels = int(model.info.unet_config.get("in_channels", 4))
            shape = (len(prompts), channels, height // model.vae_factor, width // model.vae_factor)
            latents = torch.randn(shape, generator=generator)
        text = self.text_of(prompts, negative_prompt, guidance_scale) if conditioning is None else conditioning
        model.done_encoding()
        encoders: tuple[torch.nn.Module, ...] = model.text_encoders if self.offload else ()
        with set_aside(encoders, model.device):
            with set_aside([model.vae] if self.offload else [], model.device):
                drawn = self._sample(latents, text, num_inference_steps, guidance_scale, generator)
            with set_aside([model.unet] if self.offload else [], model.device):
                return PreviewOutput(self._pictures(drawn))

    @torch.no_grad()
    def text_of(self, prompt: str | Sequence[str], negative_prompt: str | None, guidance_scale: float) -> Conditioning:
        """The conditioning of prompts, and behind it, where there is guidance, that of as many negative ones."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        guided = guidance_scale > 1
        return self.encode([*prompts, *[negative_prompt or ""] * len(prompts) * guided])

    def _sample(
        self,
        noise: torch.Tensor,
        text: Conditioning,
        steps: int,
        scale: float,
        generator: torch.Generator | None,
    ) -> torch.Tensor:
        scheduler = self.scheduler
        scheduler.set_timesteps(steps, device=self.model.device)
        latents = noise.to(self.model.device, torch.float32) * scheduler.init_noise_sigma
        repeats = len(text) // len(latents)
        accepted = inspect.signature(scheduler.step).parameters
        extra = {"generator": generator} if "generator" in accepted else {}
        for timestep in scheduler.timesteps:
            inputs = scheduler.scale_model_input(torch.cat([latents] * repeats), timestep)
            times = timestep.reshape(1).expand(len(inputs))
            predicted = self.model.predict(inputs, times, text)
            if repeats == 2:
                wanted, unwanted = predicted.chunk(2)
                predicted = unwanted + scale * (wanted - unwanted)
            latents = scheduler.step(predicted, timestep, latents, return_dict=False, **extra)[0]
        return latents

    def _pictures(self, latents: torch.Tensor) -> list[Image.Image]:
        decoded = [self.model.decode(one[None]) for one in latents]
        arrays = [((one[0] + 1) * 127.5).round().clamp(0, 255).permute(1, 2, 0).cpu() for one in decoded]
        return [Image.fromarray(array.numpy().astype(np.uint8)) for array in arrays]
