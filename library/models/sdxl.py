"""The SDXL family: two text encoders side by side, a pooled output, and a U-Net that is told the picture's sizes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from library.conditioning import Conditioning
from library.models.model import Model
from library.models.prompts import at_end
from library.to_device import to_device

_LAYER = 2


class SDXL(Model):
    """Stable Diffusion XL and what descends from it."""

    def encode_prompts(self, captions: Sequence[str]) -> Conditioning:
        """States (b, n * 75 + 2, d1 + d2) of the `clip_skip`-th layer from the end (2 unless told) of both encoders,
        not normed, and the second one's pooled output (b, p): its projected last layer, normed, at the first end token
        of a caption's first row, whatever the clip skip and the weights."""
        layer = self.clip_skip or _LAYER
        first, _ = self._text_states(0, captions, layer, norm=False)
        second, rows = self._text_states(1, captions, layer, norm=False)
        project: Any = self.text_encoders[1].text_projection
        pooled = project(at_end(second.last, rows))
        return Conditioning(torch.cat([first.states, second.states], dim=-1), pooled)

    def _added(self, noisy: Tensor, conditioning: Conditioning, sizes: Tensor | None) -> dict[str, Any]:
        if conditioning.pooled is None:
            raise ValueError("SDXL's U-Net takes a pooled text output, and the conditioning holds none")
        if sizes is None:
            height, width = (side * self.vae_factor for side in noisy.shape[-2:])
            sizes = torch.tensor([[height, width, 0, 0, height, width]]).expand(len(noisy), -1)
        sizes = to_device(sizes.float(), self.device)
        pooled = conditioning.pooled.to(device=self.device, dtype=self.dtype)
        return {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}
