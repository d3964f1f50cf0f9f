"""Frozen weights kept in 8 bits: a Linear or Conv2d stores float8 and computes in the dtype of what it is given.

The weight is cast in the forward and once more in the backward, and each copy is let go at once, so that beside the
stored weights at most one layer's exists in 16 bits. Nothing is scaled: the numbers are those that a plain cast gives,
as sd-scripts has them. Only frozen weights: nothing here makes a gradient for one.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

STORED = torch.float8_e4m3fn
"""Four bits of exponent, three of fraction, no infinity: up to 448, and down to 2**-9 in steps of 2**-9."""


class _LinearByStored(torch.autograd.Function):
    """x (..., in) by a stored weight (out, in); a gradient for `x` only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return functional.linear(x, weight.to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return torch.matmul(gradient, weight.to(gradient.dtype)), None, None


class _ConvByStored(torch.autograd.Function):
    """x (b, in, h, w) by a stored kernel; a gradient for `x` only. `how` is (stride, padding, dilation, groups)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, how: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.size, ctx.how = x.shape, how
        return functional.conv2d(x, weight.to(x.dtype), bias, *how)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        cast = weight.to(gradient.dtype)
        return torch.nn.grad.conv2d_input(ctx.size, cast, gradient, *ctx.how), None, None, None


class StoredLinear(nn.Linear):
    """A Linear whose weight is stored in 8 bits."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the dtype of `x`, or of autocast where it is on."""
        x, bias = _cast(x, self.bias)
        return _LinearByStored.apply(x, self.weight, bias)


class StoredConv2d(nn.Conv2d):
    """A Conv2d whose kernel is stored in 8 bits."""

    def forward(self, x: Tensor) -> Tensor:
        """(b, in, h, w) -> (b, out, h', w') in the dtype of `x`, or of autocast where it is on."""
        x, bias = _cast(x, self.bias)
        return _ConvByStored.apply(x, self.weight, bias, (self.stride, self.padding, self.dilation, self.groups))


_STORED_CLASSES: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: StoredLinear, nn.Conv2d: StoredConv2d}


def store(module: nn.Module) -> int:
    """Store the weights of every frozen Linear and Conv2d inside `module` in 8 bits, one after the other.

    Biases, norms and embeddings stay as they are, and so does a weight with a number that float8 can't hold. Modules
    keep their identity and the names in their state dict; their class becomes `StoredLinear` or `StoredConv2d`.

    Returns:
        Bytes saved.
    """
    saved = 0
    for inner in module.modules():
        kind = _STORED_CLASSES.get(type(inner))
        if kind is None or inner.weight.requires_grad or getattr(inner, "padding_mode", "zeros") != "zeros":
            continue
        weight = inner.weight.data
        if float(weight.abs().amax()) > torch.finfo(STORED).max:
            continue
        saved += weight.numel() * (weight.element_size() - STORED.itemsize)
        inner.weight.data = weight.to(STORED)
        inner.__class__ = kind
    return saved


def _cast(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both in the dtype to compute in."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return x, None if bias is None else bias.to(x.dtype)
