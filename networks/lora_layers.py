"""One LoRA on one frozen Linear or Conv2d: its factors, its dropouts, and what it computes in place of `forward`.

Which modules get a layer, and what files look like, is decided by networks.lora; how a layer takes the frozen module's
place, by networks.attached.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from library.models.lora_targets import LoraTarget
from library.rng import rng
from networks.attached import AttachedLayer
from networks.lora_args import LoraArgs
from networks.lora_math import FrozenLinearWithLora, add_pointwise, compute_dtype, is_channels_last
from networks.opaque_draws import drawn, handle


@dataclass
class RandomContext:
    """Where in the run the next forward stands; shared by all layers of one network and moved on by its trainer."""

    seed: int = 0
    epoch: int = 0
    index: int = 0
    positions: tuple[int, ...] = field(default=())


class LoraLayer(AttachedLayer):
    """The trained factors for one target. Keys: `lora_down.weight`, `lora_up.weight`, `alpha` (0-d float32).

    Result = base(x) + multiplier * alpha / rank * up(dropout(down(x))). Down starts as kaiming uniform with a =
    sqrt(5), that is uniform within 1/sqrt(fan in), as a function of (seed, name); up starts as zeros.
    """

    alpha: Tensor

    def __init__(
        self, target: LoraTarget, base: nn.Module, rank: int, alpha: float, args: LoraArgs, context: RandomContext
    ) -> None:
        """Raises ValueError if `base` isn't the kind or size of module that the target table says."""
        super().__init__(target, base)
        self.rank = rank
        self._args = args
        self._context = context
        self._handle = handle(self)
        self.lora_down, self.lora_up = nn.Module(), nn.Module()
        down_shape, up_shape = target.shapes(rank)
        self.lora_down.weight = nn.Parameter(torch.from_numpy(self._first_down(down_shape)))
        self.lora_up.weight = nn.Parameter(torch.zeros(up_shape))
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        self._read_alpha()
        self.register_load_state_dict_post_hook(lambda layer, _: layer._read_alpha())

    def _first_down(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """What `lora_down.weight` starts as, a function of (seed, name)."""
        bound = np.float32(float(np.prod(shape[1:])) ** -0.5)
        draws = rng(self._args.seed, "init", self.target.name).random(shape, np.float32)
        first: NDArray[np.float32] = (draws * 2 - 1) * bound
        return first

    def _factors(self) -> tuple[Tensor, Tensor, float]:
        """Down (k, in[, k, k]) and up (out, k[, 1, 1]) as this forward uses them, and what their product is scaled by
        beside alpha / rank. A layer that uses only some of its ranks overrides this."""
        return self.lora_down.weight, self.lora_up.weight, 1.0

    def _read_alpha(self) -> None:
        self.alpha_value = float(self.alpha)
        self.scale = self.alpha_value / self.rank

    def delta(self) -> Tensor:
        """What the LoRA adds to the frozen weight at the present multiplier: float32, in the weight's own shape."""
        down, up = self.lora_down.weight.detach().float(), self.lora_up.weight.detach().float()
        product = up.flatten(1) @ down.flatten(1)
        return (product * (self.multiplier * self.scale)).view(self.target.out_features, *down.shape[1:])

    def forward(self, x: Tensor) -> Tensor:
        """The frozen module with its LoRA: Linear (..., in) -> (..., out), Conv2d (b, in, h, w) -> (b, out, h', w')."""
        base_forward = self._base_forward
        if base_forward is None:
            raise RuntimeError(f"{self.target.name} is not attached")
        if self.multiplier == 0:
            return base_forward(x)
        if self._is_conv:
            return self._conv(x, base_forward)
        return self._linear(x, base_forward)

    def _linear(self, x: Tensor, base_forward: Callable[..., Tensor]) -> Tensor:
        base = self.base
        down, up, factor = self._factors()
        mask, kept = self._mask((*x.shape[:-1], down.shape[0]), x.device)
        scale = self.multiplier * self.scale * factor / kept
        dtype = compute_dtype(x)
        if self._is_frozen_plain():
            mask = None if mask is None else mask.to(dtype)
            bias = None if base.bias is None else base.bias.to(dtype)
            return FrozenLinearWithLora.apply(x.to(dtype), base.weight, bias, down, up, scale, mask)
        out = base_forward(x)
        hidden = functional.linear(x, down.to(dtype))
        if mask is not None:
            hidden = hidden * mask.to(hidden.dtype)
        rows = hidden.reshape(-1, down.shape[0])
        return torch.addmm(out.reshape(-1, out.shape[-1]), rows, up.to(out.dtype).t(), alpha=scale).view(out.shape)

    def _conv(self, x: Tensor, base_forward: Callable[..., Tensor]) -> Tensor:
        base = self.base
        down, up, factor = self._factors()
        plain = self._is_frozen_plain()
        dtype = compute_dtype(x)
        scale = self.multiplier * self.scale * factor
        if plain and base.kernel_size == (1, 1) and base.stride == (1, 1) and is_channels_last(x):
            mask, kept = self._mask((x.shape[0], down.shape[0], *x.shape[2:]), x.device)
            if mask is not None:
                mask = mask.permute(0, 2, 3, 1).to(dtype)
            pixels = x.permute(0, 2, 3, 1).to(dtype)
            weight = base.weight.flatten(1)
            bias = None if base.bias is None else base.bias.to(dtype)
            out = FrozenLinearWithLora.apply(pixels, weight, bias, down.flatten(1), up.flatten(1), scale / kept, mask)
            return out.permute(0, 3, 1, 2)
        out = base_forward(x)
        hidden = functional.conv2d(x, down.to(dtype), None, base.stride, base.padding, base.dilation)
        mask, kept = self._mask(tuple(hidden.shape), x.device)
        if mask is not None:
            hidden = hidden * mask.to(hidden.dtype)
        return add_pointwise(out, hidden, up.flatten(1).to(out.dtype), scale / kept, in_place=plain)

    def _mask(self, shape: tuple[int, ...], device: torch.device) -> tuple[Tensor | None, float]:
        """Zeros and ones broadcastable to `shape` (rank last for a Linear, second for a Conv2d), and by what the scale
        is divided, so that the expected value stays.

        dropout drops single numbers of `down(x)`, rank_dropout whole ranks of a sample (both scale up what is left),
        module_dropout the whole LoRA of a sample. Every sample of the micro-step has its own generator; a batch that
        holds k rows for each sample (chunks of a long prompt) has them one sample after the other.
        Raises RuntimeError if the trainer didn't say where in the run this forward stands.
        """
        args = self._args
        if not self.training or not (args.dropout or args.rank_dropout or args.module_dropout):
            return None, 1.0
        kept = (1 - args.dropout) * (1 - args.rank_dropout)
        if torch.compiler.is_compiling():
            return drawn(self._handle, self.alpha, shape), kept
        return self.draw_mask(shape, device), kept

    def draw_mask(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """The mask alone, float32. Raises RuntimeError if the trainer didn't say where in the run this forward is."""
        args = self._args
        rows = self._rows_per_sample(shape[0])
        ones = (1,) * (len(shape) - 2)
        rank_shape = (1, shape[1], *ones) if self._is_conv else (1, *ones, shape[-1])
        kept = []
        for draw in self._draws():
            keep = np.full((rows, *rank_shape[1:]), np.float32(draw.random() >= args.module_dropout))
            if args.rank_dropout:
                keep = keep * (draw.random(rank_shape, np.float32) >= args.rank_dropout)
            if args.dropout:
                keep = keep * (draw.random((rows, *shape[1:]), np.float32) >= args.dropout)
            kept.append(keep.astype(np.float32))
        return torch.from_numpy(np.concatenate(kept)).to(device)

    def _rows_per_sample(self, batch: int) -> int:
        """Rows of a batch for each sample. Raises RuntimeError as `_mask` does."""
        samples = len(self._context.positions)
        if not samples or batch % samples:
            raise RuntimeError(
                f"dropout needs set_random_context before each training step: batch {batch}, {samples} positions"
            )
        return batch // samples

    def _draws(self) -> Iterator[np.random.Generator]:
        """A fresh generator for each sample of the micro-batch; the first number is for the whole module."""
        at = self._context
        for position in at.positions:
            yield rng(at.seed, "dropout", at.epoch, at.index, position, self.target.name)
