"""The arithmetic of a LoRA beside a frozen layer, written for few kernels and little memory. It keeps no state.

    y = base(x) + scale * (mask * (x @ down^T)) @ up^T

Beside the frozen layer's own kernel a Linear has two: one product with `down`, and one that multiplies by `up` and the
scale and adds to the base's result in place. Adapters are fp32; if the frozen layer computes in another dtype the two
small factors are cast, never `x`. A frozen weight that is stored in another dtype (float8) is cast when it is used, in
the forward and again in the backward, so that the copy lives no longer than the product. `mask` is a tensor of zeros
and ones that dropouts draw (None without them).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a layer called with `x` computes: that of autocast where it is on, else that of `x`."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


class FrozenLinearWithLora(torch.autograd.Function):
    """A frozen Linear and its LoRA as one differentiable step: gradients for `x`, `down` and `up` only.

    It saves `x` and the rank-wide `x @ down^T`, not the result, and its backward adds the LoRA's share of the gradient
    to the base's in place, where autograd would make a second full-size gradient and add the two.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: float,
        mask: Tensor | None,
    ) -> Tensor:
        """x (..., in), weight (out, in) as it is stored, down (r, in), up (out, r), mask broadcast to (..., r); result
        (..., out). All but the weight and the factors are in the dtype of `x`."""
        rows = x.reshape(-1, x.shape[-1])
        small_down, small_up = down.to(x.dtype), up.to(x.dtype)
        hidden = torch.mm(rows, small_down.t())
        if mask is not None:
            hidden.view(*x.shape[:-1], -1).mul_(mask)
        out = functional.linear(rows, weight.to(x.dtype), bias)
        out.addmm_(hidden, small_up.t(), alpha=scale)
        ctx.save_for_backward(rows if ctx.needs_input_grad[3] else None, hidden, weight, small_down, small_up, mask)
        ctx.scale = scale
        ctx.dtypes = down.dtype, up.dtype
        ctx.lead = x.shape[:-1]
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in the order of `forward`'s arguments; those of `down` and `up` in their own dtypes."""
        if torch.is_autocast_enabled(gradient.device.type):
            with torch.autocast(gradient.device.type, enabled=False):
                return _linear_backward(ctx, gradient)
        return _linear_backward(ctx, gradient)


def _linear_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    rows, hidden, weight, down, up, mask = ctx.saved_tensors
    gradient = gradient.reshape(-1, gradient.shape[-1])
    hidden_gradient = torch.mm(gradient, up).mul_(ctx.scale)
    if mask is not None:
        hidden_gradient.view(*ctx.lead, -1).mul_(mask)
    x_gradient = down_gradient = up_gradient = None
    if ctx.needs_input_grad[0]:
        x_gradient = torch.mm(gradient, weight.to(gradient.dtype)).addmm_(hidden_gradient, down).view(*ctx.lead, -1)
    if ctx.needs_input_grad[3]:
        down_gradient = torch.mm(hidden_gradient.t(), rows).to(ctx.dtypes[0])
    if ctx.needs_input_grad[4]:
        up_gradient = torch.mm(hidden.t(), gradient).mul_(ctx.scale).t().to(ctx.dtypes[1])
    return x_gradient, None, None, down_gradient, up_gradient, None, None


def is_channels_last(image: Tensor) -> bool:
    """Whether a (b, c, h, w) tensor is laid out channels last and can't be read as plain contiguous."""
    return not image.is_contiguous() and image.is_contiguous(memory_format=torch.channels_last)


def add_pointwise(base: Tensor, hidden: Tensor, up: Tensor, scale: float, *, in_place: bool) -> Tensor:
    """base (b, out, h, w) + scale * up (out, r) applied to every pixel of hidden (b, r, h, w), in one kernel.

    `in_place` writes into `base`, which nobody else may hold.
    """
    if is_channels_last(base):
        flat = base.permute(0, 2, 3, 1).reshape(-1, base.shape[1])
        pixels = hidden.permute(0, 2, 3, 1).reshape(-1, hidden.shape[1])
        add = flat.addmm_ if in_place else flat.addmm
        joined = add(pixels, up.t(), alpha=scale)
        batch, channels, height, width = base.shape
        return joined.view(batch, height, width, channels).permute(0, 3, 1, 2)
    flat = base.flatten(2)
    columns = hidden.flatten(2)
    factor = up.unsqueeze(0).expand(base.shape[0], -1, -1)
    add = flat.baddbmm_ if in_place else flat.baddbmm
    return add(factor, columns, alpha=scale).view(base.shape)
