"""Logged numbers: TensorBoard through accelerate, under the names that sd-scripts uses."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol


class Tracker(Protocol):
    """Where numbers go."""

    def log(self, values: Mapping[str, float], step: int) -> None: ...
    def close(self) -> None: ...


class NoTracker:
    """Nothing was asked for."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        return None

    def close(self) -> None:
        return None


class TensorBoard:
    """Event files in `<logging_dir>/<prefix><YYYYmmddHHMMSS>/<name>`."""

    def __init__(self, logging_dir: Path, prefix: str | None, name: str | None) -> None:
        from accelerate.tracking import TensorBoardTracker

        folder = logging_dir / f"{prefix or ''}{time.strftime('%Y%m%d%H%M%S')}"
        self._tracker = TensorBoardTracker(name or "network_train", logging_dir=folder)
        self._tracker.start()

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._tracker.log(dict(values), step=step)

    def close(self) -> None:
        self._tracker.finish()


class LossAverage:
    """`loss/average`: the mean over the last epoch's worth of updates, each epoch overwriting the one before."""

    def __init__(self, updates_per_epoch: int, losses: tuple[float, ...] = ()) -> None:
        self._length = updates_per_epoch
        self.losses = list(losses)

    def add(self, updates_done: int, loss: float) -> float:
        """Enter the loss of update number `updates_done` (from 1); returns the average."""
        position = (updates_done - 1) % self._length
        if position < len(self.losses):
            self.losses[position] = loss
        else:
            self.losses.append(loss)
        return self.average

    @property
    def average(self) -> float:
        return sum(self.losses) / max(1, len(self.losses))
