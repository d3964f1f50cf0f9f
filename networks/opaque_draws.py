"""Random masks inside compiled blocks: one operation that a compiler sees as a whole and calls at each step.

What a layer draws depends on where the run stands, and is drawn by numpy. Traced, that breaks a block into dozens of
small graphs; as an operation of torch it is one node, whose result is new at each call. Layers are named by a tensor,
an input of the graph, so that blocks of one shape still share theirs.
"""

from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class Draws(Protocol):
    """A layer that draws masks."""

    def draw_mask(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Zeros and ones of `shape`, float32, for where the run stands now; the same at each call until it moves on."""
        ...


_LAYERS: WeakValueDictionary[int, Draws] = WeakValueDictionary()
_numbers = iter(range(2**63))


def handle(layer: Draws) -> Tensor:
    """What names the layer to `drawn` as long as it lives: a 0-d int64 tensor on the CPU."""
    number = next(_numbers)
    _LAYERS[number] = layer
    return torch.tensor(number)


def drawn(name: Tensor, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What the layer behind `name` draws, of `shape`, on the device of `like`; no gradient."""
    return _drawn(name, like.detach(), list(shape))


@torch.library.custom_op("lorasmith::drawn_mask", mutates_args=())
def _drawn(name: Tensor, like: Tensor, shape: list[int]) -> Tensor:
    return _LAYERS[int(name)].draw_mask(tuple(shape), like.device)


@_drawn.register_fake
def _(name: Tensor, like: Tensor, shape: list[int]) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)
