"""Draws previews with the very modules that are trained."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from library.models.model import Model
from library.training.denoising import Encode
from library.training.prompts import Prompt

if TYPE_CHECKING:
    from PIL.Image import Image


class ModelPainter:
    """Pictures from a model as it stands now; where a prompt names no size, the size that the model was trained for."""

    def __init__(self, model: Model, encode: Encode, *, offload: bool = False) -> None:
        """`encode` gives the prompts' conditioning; with `offload`, only the part that works is on the device."""
        self._model, self._encode, self._offload = model, encode, offload
        self.default_size = model.native_side

    def paint(self, prompt: Prompt, seeds: Sequence[int]) -> "Iterator[Image]":
        """One RGB picture after the other; the prompt is encoded once. A seed gives the same starting noise on every
        device, and the same picture whatever the other seeds."""
        side = self.default_size
        draw = self._model.pipeline(prompt.sample_sampler or "ddim", self._encode, offload=self._offload)
        text = draw.text_of(prompt.prompt, prompt.negative_prompt, prompt.scale)
        for seed in seeds:
            result = draw(
                prompt.prompt,
                prompt.negative_prompt,
                width=self._floor(prompt.width or side),
                height=self._floor(prompt.height or side),
                num_inference_steps=prompt.sample_steps,
                guidance_scale=prompt.scale,
                generator=torch.Generator("cpu").manual_seed(seed),
                conditioning=text,
            )
            yield result.images[0]

    def _floor(self, size: int) -> int:
        """Down to a multiple of the VAE's factor, but not below 64, as sd-scripts does."""
        return max(64, size - size % self._model.vae_factor)
