"""What a fine-tuned checkpoint changed of its base, weight by weight: the two models side by side, each in its own
layout and dtype. Only one weight of each is read at a time; what becomes of a difference is for others to say.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from library.errors import UserError
from library.models.lora_targets import LoraTarget
from library.models.tensors import Reader, Source
from library.weights.checkpoints.opened import BaseModel

_KERNELS = {"linear": (), "1x1": (1, 1), "3x3": (3, 3)}


def weight_shape(target: LoraTarget) -> tuple[int, ...]:
    """The shape of a module's weight."""
    return (target.out_features, target.in_features, *_KERNELS[target.kernel])


@dataclass(frozen=True)
class Difference:
    """Two models of one family.

    Attributes:
        load: the dtype that weights are rounded to before they are subtracted; None takes them as they are stored.
    """

    org: BaseModel
    tuned: BaseModel
    load: torch.dtype | None = None

    @cached_property
    def targets(self) -> tuple[LoraTarget, ...]:
        """The modules of which both models have the weight."""
        return tuple(target for target in self.org.targets if self._pair(target) is not None)

    @cached_property
    def missing(self) -> tuple[str, ...]:
        """The names of modules that one of the models lacks."""
        held = {target.name for target in self.targets}
        named = (target.name for model in (self.org, self.tuned) for target in model.targets)
        return tuple(dict.fromkeys(name for name in named if name not in held))

    def check_shapes(self, chosen: Sequence[LoraTarget]) -> None:
        """Look at the shapes in the headers of both.

        Raises:
            UserError: a weight is of another size in each.
        """
        for target in chosen:
            one, other = self._both(target)
            if _plain(one.shape) != _plain(other.shape):
                wrong = f"{other.name} is {list(other.shape)}, that of {one.path} is {list(one.shape)}"
                raise UserError.single(str(other.path), wrong, "give a model that was trained from the first")

    def of(self, target: LoraTarget, reader: Reader, device: torch.device) -> Tensor:
        """Tuned - original of one weight: float32, in `weight_shape`, on the device."""
        one, other = (self._read(source, reader, device) for source in self._both(target))
        return other.sub_(one).view(weight_shape(target))

    def _read(self, source: Source, reader: Reader, device: torch.device) -> Tensor:
        values = reader.read(source).flatten()
        if self.load is not None:
            values = values.to(self.load)
        return values.to(device=device, dtype=torch.float32, copy=True)

    def _pair(self, target: LoraTarget) -> tuple[Source, Source] | None:
        try:
            return self.org.weight_of(target), self.tuned.weight_of(target)
        except KeyError:
            return None

    def _both(self, target: LoraTarget) -> tuple[Source, Source]:
        pair = self._pair(target)
        if pair is None:
            raise KeyError(target.name)
        return pair


def _plain(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape in which a 1x1 kernel counts as none."""
    return shape[:2] if shape[2:] == (1, 1) else shape
