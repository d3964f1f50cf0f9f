"""DoRA: a LoRA that gives a frozen layer's weight its direction, and a trained magnitude for each output.

    W' = m * (W + D) / ||W + D||,  D = alpha / rank * up @ down

The norm goes over all input axes of an output and is constant in the backward pass; m starts as ||W||, so that a new
layer changes nothing. Source: Liu et al., DoRA (arXiv 2402.09353), sections 4.1 and 4.3; files call m `dora_scale`, as
LyCORIS does. At another strength t than 1 the weight is W + t (W' - W), as ComfyUI has it.

Dropouts act on the up-factor's input as in any LoRA, while the norm is that of the whole D; module dropout gives a
sample the frozen layer, magnitude included.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from library.models.lora_targets import LoraTarget
from library.weights.loras.modules import magnitude_shape
from networks.lora_args import LoraArgs
from networks.lora_layers import LoraLayer, RandomContext
from networks.lora_math import compute_dtype
from networks.norms import row_squares

_TINY = 1e-12


class DoraLayer(LoraLayer):
    """The trained factors and magnitudes for one target. Keys: `LoraLayer`'s and `dora_scale` (out, 1[, 1, 1])."""

    def __init__(
        self, target: LoraTarget, base: nn.Module, rank: int, alpha: float, args: LoraArgs, context: RandomContext
    ) -> None:
        super().__init__(target, base, rank, alpha, args, context)
        self._base_squares: Tensor | None = None
        self.dora_scale = nn.Parameter(torch.zeros(magnitude_shape(target)))
        self.match_magnitudes()

    def attach(self) -> None:
        """Take the place of the frozen module's forward; its weight may not change from now on."""
        self._base_squares = None
        super().attach()

    def match_magnitudes(self) -> None:
        """Make the magnitudes those of W + D, so that the layer computes what a plain LoRA of its factors does."""
        with torch.no_grad():
            self.dora_scale.copy_(self._norms().reshape(self.dora_scale.shape))

    def delta(self) -> Tensor:
        """What the DoRA adds to the frozen weight at the present multiplier: float32, in the weight's own shape."""
        with torch.no_grad():
            weight: Tensor = self.base.weight.float()
            product = self.lora_up.weight.float().flatten(1) @ self.lora_down.weight.float().flatten(1)
            both = weight + (product * self.scale).view(weight.shape).to(weight.device)
            gains = self._gains().to(weight.device).view(-1, *(1,) * (weight.dim() - 1))
            return (both * gains - weight) * self.multiplier

    def _norms(self) -> Tensor:
        """||W + D|| of each output (out,), float32, without gradient and without making D."""
        weight, down = self.base.weight, self.lora_down.weight
        with torch.no_grad(), torch.autocast(down.device.type, enabled=False):
            weight = weight.to(down.device, torch.float32).flatten(1)
            if self._base_squares is None or self._base_squares.device != down.device:
                self._base_squares = weight.square().sum(1)
            squares = row_squares(weight, down, self.lora_up.weight, self.scale, self._base_squares)
            return squares.sqrt().clamp(min=_TINY)

    def _gains(self) -> Tensor:
        """m / ||W + D|| (out,), float32."""
        return self.dora_scale.flatten().float() / self._norms()

    def _linear(self, x: Tensor, base_forward: Callable[..., Tensor]) -> Tensor:
        down, up, _ = self._factors()
        out = base_forward(x)
        hidden = functional.linear(x, down.to(compute_dtype(x)))
        mask, kept = self._mask(tuple(hidden.shape), x.device)
        if mask is not None:
            hidden = hidden * mask.to(hidden.dtype)
        gains = self._gains()
        added = functional.linear(hidden, self._weighed(up, gains, kept).to(hidden.dtype))
        return self._joined(out, added, gains)

    def _conv(self, x: Tensor, base_forward: Callable[..., Tensor]) -> Tensor:
        base: Any = self.base
        down, up, _ = self._factors()
        out = base_forward(x)
        hidden = functional.conv2d(x, down.to(compute_dtype(x)), None, base.stride, base.padding, base.dilation)
        mask, kept = self._mask(tuple(hidden.shape), x.device)
        if mask is not None:
            hidden = hidden * mask.to(hidden.dtype)
        gains = self._gains()
        added = functional.conv2d(hidden, self._weighed(up, gains, kept)[:, :, None, None].to(hidden.dtype))
        return self._joined(out, added, gains)

    def _weighed(self, up: Tensor, gains: Tensor, kept: float) -> Tensor:
        """The up-factor (out, r) with the scale and the gain of each output."""
        return up.flatten(1).float() * (gains * (self.multiplier * self.scale / kept))[:, None]

    def _joined(self, out: Tensor, added: Tensor, gains: Tensor) -> Tensor:
        """The frozen layer's result, moved by what its weight is scaled by and by what the LoRA adds.

        Only the change is multiplied, so that a gain near 1 isn't rounded away in 16 bits; the bias isn't scaled.
        """
        change = (gains - 1) * self.multiplier
        bias = self.base.bias
        shift = torch.zeros_like(change) if bias is None else -change * bias.to(change.dtype)
        if self._is_conv:
            change, shift = change[:, None, None], shift[:, None, None]
        moved = torch.addcmul(shift.to(out.dtype), out, change.to(out.dtype)) + added.to(out.dtype)
        kept = self._kept_samples(out)
        return out + (moved if kept is None else moved * kept)

    def _kept_samples(self, out: Tensor) -> Tensor | None:
        """Zeros and ones that broadcast over the batch's rows: whether module dropout spares a sample."""
        limit = self._args.module_dropout
        if not self.training or not limit:
            return None
        rows = self._rows_per_sample(out.shape[0])
        kept = np.repeat([draw.random() >= limit for draw in self._draws()], rows)
        return torch.from_numpy(kept).to(out.device, out.dtype).view(-1, *(1,) * (out.dim() - 1))
