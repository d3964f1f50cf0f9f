"""One OFT on one frozen Linear or Conv2d: the outputs of the frozen weight are turned, block by block.

    Q_k = B_k - B_k^T,  R_k = (I + Q_k)(I - Q_k)^-1,  W'_k = (I + m (R_k - I))^T W_k

for the k-th block of out / blocks rows of the weight W (out, in[, 3, 3]); B is trained and starts as 0, m is the
multiplier. The bias isn't turned. All Q together are shrunk to a Frobenius norm of at most alpha * out. Source: Qiu et
al., OFT (arXiv 2306.07280), with the conventions of sd-scripts' files.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from library.models.lora_targets import LoraTarget
from networks.attached import AttachedLayer
from networks.lora_math import compute_dtype

_TINY = 1e-8


class OftLayer(AttachedLayer):
    """The trained blocks for one target. Keys: `oft_blocks` (blocks, side, side) and `alpha` (0-d float32)."""

    alpha: Tensor

    def __init__(self, target: LoraTarget, base: nn.Module, blocks: int, alpha: float) -> None:
        """Raises ValueError if `base` isn't what the target table says, or `blocks` doesn't divide its outputs."""
        super().__init__(target, base)
        if target.out_features % blocks:
            raise ValueError(f"{target.name}: {blocks} blocks don't divide {target.out_features} outputs")
        self.blocks = blocks
        side = target.out_features // blocks
        self.oft_blocks = nn.Parameter(torch.zeros(blocks, side, side))
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        self._read_alpha()
        self.register_load_state_dict_post_hook(lambda layer, _: layer._read_alpha())

    def _read_alpha(self) -> None:
        self.alpha_value = float(self.alpha)
        self.constraint = self.alpha_value * self.target.out_features

    def rotation(self) -> Tensor:
        """R (blocks, side, side) at multiplier 1, float32 or wider: orthogonal matrices.

        I - Q of a skew-symmetric Q is never singular, so the device isn't waited for to tell.
        """
        with torch.autocast(self.oft_blocks.device.type, enabled=False):
            wide = self.oft_blocks if self.oft_blocks.dtype == torch.float64 else self.oft_blocks.float()
            skew = wide - wide.mT
            norm = torch.linalg.vector_norm(skew)
            skew = skew * ((norm.clamp(max=self.constraint) + _TINY) / (norm + _TINY))
            one = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
            return torch.linalg.solve_ex(one - skew, one + skew).result

    def turn(self) -> Tensor:
        """I + multiplier * (R - I)."""
        rotation = self.rotation()
        if self.multiplier == 1:
            return rotation
        one = torch.eye(rotation.shape[-1], dtype=rotation.dtype, device=rotation.device)
        return torch.lerp(one.expand_as(rotation), rotation, self.multiplier)

    def weight(self) -> Tensor:
        """The turned weight at the present multiplier: float32 or wider, in the weight's own shape."""
        return turned(self.base.weight.detach(), self.turn().detach())

    def norms(self) -> tuple[Tensor, Tensor]:
        """||W' - W|| and ||W'|| at multiplier 1, 0-d."""
        with torch.no_grad():
            rotation = self.rotation()
            one = torch.eye(rotation.shape[-1], dtype=rotation.dtype, device=rotation.device)
            moved, whole = turned(self.base.weight, rotation - one), turned(self.base.weight, rotation)
            return torch.linalg.vector_norm(moved), torch.linalg.vector_norm(whole)

    def forward(self, x: Tensor) -> Tensor:
        """The frozen module, turned: Linear (..., in) -> (..., out), Conv2d (b, in, h, w) -> (b, out, h', w')."""
        base_forward = self._base_forward
        if base_forward is None:
            raise RuntimeError(f"{self.target.name} is not attached")
        if self.multiplier == 0:
            return base_forward(x)
        base = self.base
        dtype = compute_dtype(x)
        bias = None if base.bias is None else base.bias.to(dtype)
        if self._is_frozen_plain():
            window = (base.stride, base.padding, base.dilation, base.groups) if self._is_conv else None
            return FrozenTurned.apply(x.to(dtype), base.weight, bias, self.turn(), window)
        out = base_forward(x)
        channel = 1 if self._is_conv else -1
        if bias is None:
            return self._turn_outputs(out, channel)
        bias = bias.view(-1, *(1,) * (out.dim() - 2)) if self._is_conv else bias
        return self._turn_outputs(out - bias, channel) + bias

    def _turn_outputs(self, out: Tensor, channel: int) -> Tensor:
        """The same on results, where the weight isn't at hand: `channel` is the dimension of the outputs."""
        last = out.movedim(channel, -1)
        parts = last.reshape(-1, self.blocks, last.shape[-1] // self.blocks)
        rotated = torch.einsum("bkn,knm->bkm", parts, self.turn().to(out.dtype))
        return rotated.reshape(last.shape).movedim(-1, channel)


def turned(weight: Tensor, turn: Tensor) -> Tensor:
    """W' of a weight (out, ...) stored in any dtype and matrices (blocks, side, side), in the matrices' dtype."""
    with torch.autocast(weight.device.type, enabled=False):
        rows = weight.to(turn.dtype).reshape(turn.shape[0], turn.shape[1], -1)
        return torch.bmm(turn.mT, rows).view(weight.shape)


class FrozenTurned(torch.autograd.Function):
    """A frozen Linear or Conv2d with its weight turned, differentiable for `x` and `turn` only.

    It saves `x`, the weight as it is stored and the small matrices; the turned weight is made again in the backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, turn: Tensor, window: Any) -> Tensor:
        """`window`: None for a Linear, (stride, padding, dilation, groups) of a Conv2d."""
        ctx.save_for_backward(x, weight, turn)
        ctx.window = window
        rotated = turned(weight, turn).to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            if window is None:
                return functional.linear(x, rotated, bias)
            return functional.conv2d(x, rotated, bias, *window)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in the order of `forward`'s arguments."""
        x, weight, turn = ctx.saved_tensors
        x_gradient = turn_gradient = None
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                rotated = turned(weight, turn).to(x.dtype)
                if ctx.window is None:
                    x_gradient = gradient @ rotated
                else:
                    x_gradient = nn.grad.conv2d_input(x.shape, rotated, gradient, *ctx.window)
            if ctx.needs_input_grad[3]:
                if ctx.window is None:
                    of_weight = gradient.flatten(0, -2).t() @ x.flatten(0, -2)
                else:
                    of_weight = nn.grad.conv2d_weight(x, weight.shape, gradient, *ctx.window)
                size = turn.shape[:2]
                rows = weight.to(turn.dtype).reshape(*size, -1)
                turn_gradient = torch.bmm(rows, of_weight.to(turn.dtype).reshape(*size, -1).mT)
        return x_gradient, None, None, turn_gradient, None
