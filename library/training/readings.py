"""Numbers of updates on their way from the device to a log. A GPU is never waited for: they are read an update later.

What is read, and what follows from it, is the loop's business.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Reading:
    """What update number `update` (from 1) showed. `about` is what was said of it when it was put in."""

    update: int
    values: dict[str, float]
    about: Any


class Readings:
    """A queue of numbers; on the CPU they are there at once, on a GPU when the next update has been sent to it."""

    def __init__(self, device: torch.device) -> None:
        self.are_late = device.type != "cpu"
        self._device = device
        self._waiting: deque[tuple[int, tuple[str, ...], torch.Tensor, torch.cuda.Event | None, Any]] = deque()

    def put(self, update: int, values: Mapping[str, torch.Tensor | float], about: Any) -> None:
        """Enter the numbers of an update: 0-d tensors on the device, or plain numbers."""
        tensors = [
            value.detach().to(self._device, torch.float32).reshape(())
            if isinstance(value, torch.Tensor)
            else torch.full((), float(value), device=self._device)
            for value in values.values()
        ]
        together = torch.stack(tensors)
        event = None
        if self._device.type == "cuda":
            host = torch.empty(together.shape, dtype=together.dtype, pin_memory=True)
            together = host.copy_(together, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._waiting.append((update, tuple(values), together, event, about))

    def ready(self) -> Iterator[Reading]:
        """What can be read without waiting for the update that was sent last."""
        while len(self._waiting) > self.are_late:
            yield self._take()

    def all(self) -> Iterator[Reading]:
        """Everything that was put in, however long it takes."""
        while self._waiting:
            yield self._take()

    def _take(self) -> Reading:
        update, names, values, event, about = self._waiting.popleft()
        if event is not None:
            event.synchronize()
        return Reading(update, dict(zip(names, values.tolist(), strict=True)), about)
