"""The machine-readable log of a run: `<output_dir>/<name>.log.jsonl`, one JSON object a line. Standard library only.

Every line has "step" (optimizer steps done) and "time" (seconds since 1970), then numbers under the names that
TensorBoard shows; what is counted in epochs has "epoch", too. Numbers that JSON can't hold are null. The log of an
earlier run of the same name is kept as `<name>.log.1.jsonl`, one generation; a run that logs nothing changes nothing.
"""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from library.console import warn


def log_path(output_dir: Path, output_name: str | None) -> Path:
    """Where the log of a run is."""
    return output_dir / f"{output_name or 'last'}.log.jsonl"


def earlier_log(path: Path) -> Path:
    """Where the log at `path` is kept when a new run begins one there."""
    return path.with_name(f"{path.name.removesuffix('.jsonl')}.1.jsonl")


def over_epochs(values: Mapping[str, float]) -> bool:
    """Whether numbers are counted in epochs: their names say so, such as `loss/validation/epoch_average`."""
    return any(part.startswith("epoch_") for name in values for part in name.split("/"))


def keep_until(path: Path, step: int) -> None:
    """Cut off what was logged after `step`, and lines that were not finished; all at once or not at all."""
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    with path.open(encoding="utf-8", errors="replace") as old, temporary.open("w", encoding="utf-8") as new:
        for line in old:
            if line.endswith("\n") and _step(line) <= step:
                new.write(line)
        new.flush()
        os.fsync(new.fileno())
    temporary.replace(path)


def _step(line: str) -> float:
    """The step of a line; infinite for what is no line of a log."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf


class JsonLog:
    """Appends lines, each of which is handed to the system at once. A full disk ends the log, not the run.

    The file is opened for the first line, so that a start that fails takes nothing from the log that is there.

    Args:
        resumed_step: the step that the run goes on from: lines of later ones are cut off. None starts a new log.
    """

    def __init__(self, path: Path, resumed_step: int | None = None) -> None:
        self.path = path
        self._resumed_step = resumed_step
        self._step = resumed_step or 0
        self._file: TextIO | None = None
        self._is_closed = False

    def _open(self) -> TextIO | None:
        """The file, ready for more lines; None once it is closed or can't be written."""
        if self._file is None and not self._is_closed:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                if self.path.is_file():
                    if self._resumed_step is None:
                        self.path.replace(earlier_log(self.path))
                    else:
                        keep_until(self.path, self._resumed_step)
                self._file = self.path.open("a", encoding="utf-8")
            except OSError as fault:
                self._is_closed = True
                warn(f"{self.path}: can't be written, there will be no log: {fault}")
        return self._file

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write a line; `step` is an epoch for numbers that are counted in epochs."""
        file = self._open()
        if file is None:
            return
        place: dict[str, float] = {"step": step}
        if over_epochs(values):
            place = {"step": self._step, "epoch": step}
        self._step = int(place["step"])
        numbers = {name: float(value) if math.isfinite(value) else None for name, value in values.items()}
        line = json.dumps({**place, "time": round(time.time(), 3), **numbers}, allow_nan=False)
        try:
            file.write(f"{line}\n")
            file.flush()
        except OSError as fault:
            warn(f"{self.path}: can't be written any more, the log ends at step {self._step}: {fault}")
            self.close()

    def show(self, pictures: Mapping[str, Path], step: int) -> None:
        """Pictures are files of their own; nothing is written."""

    def close(self) -> None:
        """End the log."""
        self._is_closed = True
        if self._file is not None:
            file, self._file = self._file, None
            try:
                file.close()
            except OSError as fault:
                warn(f"{self.path}: its last lines may be missing: {fault}")
