"""Keeping in main memory what a GPU doesn't need just now: for the length of a `with`, or until it is used again.

Values come back bit for bit, into the same parameters and tensors. On a CPU everything is in main memory already, and
nothing here does anything.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from library.models.memory import give_back

_RAM = torch.device("cpu")


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """The tensors of an optimizer's state, but for those that bitsandbytes pages to main memory by itself."""
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor) and not getattr(value, "is_paged", False):
                yield value


@contextmanager
def set_aside(things: Iterable[nn.Module | Tensor | None], device: torch.device) -> Iterator[None]:
    """Inside of this, the tensors of these modules, and these tensors, are in main memory; they come back to `device`
    in the end, also after an error. What wasn't on `device` stays where it is."""
    if device.type == "cpu":
        yield
        return
    moved = [tensor for tensor in _distinct(things) if tensor.device.type == device.type]
    homes = [tensor.device for tensor in moved]
    for tensor in moved:
        tensor.data = tensor.data.to(_RAM)
    give_back(device)
    try:
        yield
    finally:
        for tensor, home in zip(moved, homes, strict=True):
            tensor.data = tensor.data.to(home)


class KeptInRam:
    """Frozen modules that live in main memory and have a copy on the device only from `bring` to `drop`.

    As they are frozen, the copy is thrown away, not copied back.
    """

    def __init__(self, modules: Sequence[nn.Module], device: torch.device) -> None:
        """Moves the modules to main memory, into pages that are copied to a GPU fastest."""
        self.device = device
        self._tensors = [] if device.type == "cpu" else list(_distinct(modules))
        self._kept = [_locked(tensor.data.to(_RAM)) for tensor in self._tensors]
        self._here = True
        self.drop()

    @property
    def here(self) -> bool:
        """Whether there is a copy on the device now."""
        return self._here

    def bring(self) -> None:
        """Make the copy on the device, where there is none."""
        if self._here:
            return
        for tensor, kept in zip(self._tensors, self._kept, strict=True):
            tensor.data = kept.to(self.device, non_blocking=True)
        self._here = True

    def drop(self) -> None:
        """Let the copy go."""
        if not self._here:
            return
        for tensor, kept in zip(self._tensors, self._kept, strict=True):
            tensor.data = kept
        self._here = False


def _locked(tensor: Tensor) -> Tensor:
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


def _distinct(things: Iterable[nn.Module | Tensor | None]) -> Iterator[Tensor]:
    """Every tensor once."""
    seen: set[int] = set()
    for thing in things:
        if thing is None:
            continue
        tensors = [thing] if isinstance(thing, Tensor) else [*thing.parameters(), *thing.buffers()]
        for tensor in tensors:
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor
