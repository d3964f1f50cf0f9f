"""One LoRA on one frozen Linear or Conv2d: its factors, its dropouts, and how it takes the place of `forward`.

The frozen module keeps its class, weights and state dict; only its `forward` attribute is replaced, and put back by
`detach`. Which modules get a layer, and what files look like, is decided by networks.lora.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from library.models.lora_targets import LoraTarget
from library.rng import rng
from networks.lora_args import LoraArgs
from networks.lora_math import FrozenLinearWithLora, add_pointwise, compute_dtype, is_channels_last


@dataclass
class RandomContext:
    """Where in the run the next forward stands; shared by all layers of one network and moved on by its trainer."""

    seed: int = 0
    epoch: int = 0
    index: int = 0
    positions: tuple[int, ...] = field(default=())


class LoraLayer(nn.Module):
    """The trained factors for one target. Keys: `lora_down.weight`, `lora_up.weight`, `alpha` (0-d float32).

    Result = base(x) + multiplier * alpha / rank * up(dropout(down(x))). Down starts as kaiming uniform with a =
    sqrt(5), that is uniform within 1/sqrt(fan in), as a function of (seed, name); up starts as zeros.
    """

    alpha: Tensor

    def __init__(
        self, target: LoraTarget, base: nn.Module, rank: int, alpha: float, args: LoraArgs, context: RandomContext
    ) -> None:
        """Raises ValueError if `base` isn't the kind or size of module that the target table says."""
        super().__init__()
        self.target = target
        self.rank = rank
        self.multiplier = 1.0
        self._args = args
        self._context = context
        self._base = (base,)
        self._base_forward: Callable[..., Tensor] | None = None
        expected = (target.out_features, target.in_features, *target.shapes(1)[0][2:])
        if not isinstance(base, nn.Linear | nn.Conv2d) or tuple(base.weight.shape) != expected:
            raise ValueError(f"{target.name}: {type(base).__name__} is not a module of shape {expected}")
        self._is_conv = isinstance(base, nn.Conv2d)
        self.lora_down, self.lora_up = nn.Module(), nn.Module()
        down_shape, up_shape = target.shapes(rank)
        bound = float(np.prod(down_shape[1:])) ** -0.5
        draws = rng(args.seed, "init", target.name).random(down_shape, np.float32)
        self.lora_down.weight = nn.Parameter(torch.from_numpy((draws * 2 - 1) * np.float32(bound)))
        self.lora_up.weight = nn.Parameter(torch.zeros(up_shape))
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        self._read_alpha()
        self.register_load_state_dict_post_hook(lambda layer, _: layer._read_alpha())

    def _read_alpha(self) -> None:
        self.alpha_value = float(self.alpha)
        self.scale = self.alpha_value / self.rank

    @property
    def base(self) -> nn.Module:
        """The frozen module."""
        return self._base[0]

    def attach(self) -> None:
        """Take the place of the frozen module's forward."""
        self._base_forward = self.base.forward
        self._forward_was_plain = "forward" not in self.base.__dict__ and type(self.base) in (nn.Linear, nn.Conv2d)
        self._own_forward = self.forward
        self.base.forward = self._own_forward

    def detach(self) -> None:
        """Put the frozen module's forward back. Raises ValueError if another network lies on top of this one."""
        if self._base_forward is None:
            return
        if self.base.__dict__.get("forward") is not self._own_forward:
            raise ValueError(f"{self.target.name}: remove the network that was attached later first")
        if getattr(self._base_forward, "__func__", None) is type(self.base).forward:
            del self.base.forward
        else:
            self.base.forward = self._base_forward
        self._base_forward = None

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
        base, down, up = self.base, self.lora_down.weight, self.lora_up.weight
        mask, scale = self._mask((*x.shape[:-1], self.rank), x.device)
        dtype = compute_dtype(x)
        if self._is_frozen_plain():
            mask = None if mask is None else mask.to(dtype)
            bias = None if base.bias is None else base.bias.to(dtype)
            return FrozenLinearWithLora.apply(x.to(dtype), base.weight.to(dtype), bias, down, up, scale, mask)
        out = base_forward(x)
        hidden = functional.linear(x, down.to(dtype))
        if mask is not None:
            hidden = hidden * mask.to(hidden.dtype)
        rows = hidden.reshape(-1, self.rank)
        return torch.addmm(out.reshape(-1, out.shape[-1]), rows, up.to(out.dtype).t(), alpha=scale).view(out.shape)

    def _conv(self, x: Tensor, base_forward: Callable[..., Tensor]) -> Tensor:
        base, down, up = self.base, self.lora_down.weight, self.lora_up.weight
        plain = self._is_frozen_plain()
        dtype = compute_dtype(x)
        if plain and base.kernel_size == (1, 1) and base.stride == (1, 1) and is_channels_last(x):
            mask, scale = self._mask((x.shape[0], self.rank, *x.shape[2:]), x.device)
            if mask is not None:
                mask = mask.permute(0, 2, 3, 1).to(dtype)
            pixels = x.permute(0, 2, 3, 1).to(dtype)
            weight = base.weight.flatten(1).to(dtype)
            bias = None if base.bias is None else base.bias.to(dtype)
            out = FrozenLinearWithLora.apply(pixels, weight, bias, down.flatten(1), up.flatten(1), scale, mask)
            return out.permute(0, 3, 1, 2)
        out = base_forward(x)
        hidden = functional.conv2d(x, down.to(dtype), None, base.stride, base.padding, base.dilation)
        mask, scale = self._mask(tuple(hidden.shape), x.device)
        if mask is not None:
            hidden = hidden * mask.to(hidden.dtype)
        return add_pointwise(out, hidden, up.flatten(1).to(out.dtype), scale, in_place=plain)

    def _is_frozen_plain(self) -> bool:
        """Whether the frozen module is torch's own and nothing of it trains, so that its kernel may be called here."""
        return self._forward_was_plain and not self.base.weight.requires_grad

    def _mask(self, shape: tuple[int, ...], device: torch.device) -> tuple[Tensor | None, float]:
        """Zeros and ones broadcastable to `shape` (rank last for a Linear, second for a Conv2d), and the scale.

        dropout drops single numbers of `down(x)`, rank_dropout whole ranks of a sample (both scale up what is left),
        module_dropout the whole LoRA of a sample. Every sample of the micro-step has its own generator; a batch that
        holds k rows for each sample (chunks of a long prompt) has them one sample after the other.
        Raises RuntimeError if the trainer didn't say where in the run this forward stands.
        """
        args = self._args
        scale = self.multiplier * self.scale
        if not self.training or not (args.dropout or args.rank_dropout or args.module_dropout):
            return None, scale
        context = self._context
        samples = len(context.positions)
        if not samples or shape[0] % samples:
            raise RuntimeError(
                f"dropout needs set_random_context before each training step: batch {shape[0]}, {samples} positions"
            )
        rows = shape[0] // samples
        ones = (1,) * (len(shape) - 2)
        rank_shape = (1, self.rank, *ones) if self._is_conv else (1, *ones, self.rank)
        kept = []
        for position in context.positions:
            draw = rng(context.seed, "dropout", context.epoch, context.index, position, self.target.name)
            keep = np.full((rows, *rank_shape[1:]), np.float32(draw.random() >= args.module_dropout))
            if args.rank_dropout:
                keep = keep * (draw.random(rank_shape, np.float32) >= args.rank_dropout)
            if args.dropout:
                keep = keep * (draw.random((rows, *shape[1:]), np.float32) >= args.dropout)
            kept.append(keep.astype(np.float32))
        mask = torch.from_numpy(np.concatenate(kept)).to(device)
        return mask, scale / ((1 - args.dropout) * (1 - args.rank_dropout))
