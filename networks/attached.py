"""What every layer of a network of ours does with the one frozen module it belongs to: it takes the place of that
module's `forward`, and gives it back. Shared by the layers of all networks; what they compute is their own.

The frozen module keeps its class, weights and state dict; only its `forward` attribute is replaced.
"""

from collections.abc import Callable

from torch import Tensor, nn

from library.models.fp8 import StoredConv2d, StoredLinear
from library.models.lora_targets import LoraTarget

_PLAIN = (nn.Linear, nn.Conv2d, StoredLinear, StoredConv2d)
"""Frozen modules whose kernels may be called in their place."""


class AttachedLayer(nn.Module):
    """Base of layers on a frozen Linear or Conv2d; that module is no child, so its weights are in no state of ours."""

    def __init__(self, target: LoraTarget, base: nn.Module) -> None:
        """Raises ValueError if `base` isn't the kind or size of module that the target table says."""
        super().__init__()
        self.target = target
        self.multiplier = 1.0
        self._base = (base,)
        self._base_forward: Callable[..., Tensor] | None = None
        expected = (target.out_features, target.in_features, *target.shapes(1)[0][2:])
        if not isinstance(base, nn.Linear | nn.Conv2d) or tuple(base.weight.shape) != expected:
            raise ValueError(f"{target.name}: {type(base).__name__} is not a module of shape {expected}")
        self._is_conv = isinstance(base, nn.Conv2d)

    @property
    def base(self) -> nn.Module:
        """The frozen module."""
        return self._base[0]

    def attach(self) -> None:
        """Take the place of the frozen module's forward."""
        self._base_forward = self.base.forward
        self._forward_was_plain = "forward" not in self.base.__dict__ and type(self.base) in _PLAIN
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

    def _is_frozen_plain(self) -> bool:
        """Whether the frozen module is torch's own and nothing of it trains, so that its kernel may be called here."""
        return self._forward_was_plain and not self.base.weight.requires_grad


def loaded(taken: int, present: int, held: int, file: object) -> str:
    """What a network says when it has taken over modules of a file: how many of its own, and how many it left out."""
    left_out = held - taken
    more = f", {left_out} of its modules are not in this network" if left_out else ""
    return f"{taken} of {present} modules loaded from {file}{more}"
