"""Writing what was trained: weights checked after writing, states beside them, and the rolling deletion of old ones."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from library.console import say, warn
from library.training.state import SUFFIX, RunState, flush, write_state
from library.training.steps import Save
from library.training.trainable import Trainable
from library.weights.files import open_to_others


@dataclass
class Saver:
    """Where files go, and what goes into them.

    Attributes:
        metadata: updates done -> metadata of the weight file.
        check: reads a written file back; raises if it is not as it should be, returns what a user should know.
        snapshot: updates done -> the manifest of a state.
    """

    output_dir: Path
    extension: str
    dtype: torch.dtype | None
    trainable: Trainable
    optimizer: Callable[[], dict[str, Any]]
    metadata: Callable[[int], dict[str, str]]
    check: Callable[[Path], list[str]]
    snapshot: Callable[[int], RunState]
    latest_state: Path | None = None

    def save(self, save: Save, updates_done: int) -> Path:
        """Write what `save` asks for; returns the weight file."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        path = self.output_dir / f"{save.stem}{self.extension}"
        self._write(path, updates_done)
        say(f"saved {path}")
        if save.state:
            folder = self.output_dir / f"{save.stem}{SUFFIX}"
            write_state(folder, self.snapshot(updates_done), self.trainable.state_dict(), self.optimizer())
            self.latest_state = folder
            say(f"saved {folder}")
        self._delete_expired(save)
        return path

    def _write(self, path: Path, updates_done: int) -> None:
        """Write under a temporary name, read back, rename: whatever the network module does, `path` is whole or old."""
        temporary = path.with_name(f".{path.stem}.writing{path.suffix}")
        try:
            self.trainable.save(temporary, self.dtype, self.metadata(updates_done))
            for line in self.check(temporary):
                warn(f"{path}: {line}")
            open_to_others(temporary)
            flush(temporary)
            temporary.replace(path)
            flush(path.parent)
        finally:
            temporary.unlink(missing_ok=True)

    def _delete_expired(self, save: Save) -> None:
        for stem in save.expired_weights:
            (self.output_dir / f"{stem}{self.extension}").unlink(missing_ok=True)
        for stem in save.expired_states:
            shutil.rmtree(self.output_dir / f"{stem}{SUFFIX}", ignore_errors=True)
