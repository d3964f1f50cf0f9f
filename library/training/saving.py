"""Writing what was trained: weights checked after writing, states beside them, and the rolling deletion of old ones."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from library.console import say, warn
from library.training.state import SUFFIX, RunState, UnstorableStateError, delete_state, flush, write_state
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
        evaluating: a context in which the weights are those that a file holds; a state has those that train.
        after: gets every weight file and state folder as soon as it is complete, before older ones are deleted.
    """

    output_dir: Path
    extension: Literal[".safetensors", ".pt", ".ckpt"]
    dtype: torch.dtype | None
    trainable: Trainable
    optimizer: Callable[[], dict[str, Any]]
    metadata: Callable[[int], dict[str, str]]
    check: Callable[[Path], list[str]]
    snapshot: Callable[[int], RunState]
    evaluating: Callable[[], AbstractContextManager[None]] = nullcontext
    after: Callable[[Path], None] | None = None
    latest_state: Path | None = None

    def save(self, save: Save, updates_done: int) -> Path:
        """Write what `save` asks for; returns the weight file."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        path = self.output_dir / f"{save.stem}{self.extension}"
        self._write(path, updates_done)
        self._is_there(path)
        has_state = save.state and self._write_state(self.output_dir / f"{save.stem}{SUFFIX}", updates_done)
        for stem in save.expired_weights:
            (self.output_dir / f"{stem}{self.extension}").unlink(missing_ok=True)
        for stem in save.expired_states if has_state else ():
            delete_state(self.output_dir / f"{stem}{SUFFIX}")
        return path

    def _is_there(self, path: Path) -> None:
        say(f"saved {path}")
        if self.after is not None:
            self.after(path)

    def _write_state(self, folder: Path, updates_done: int) -> bool:
        """Write a state, before any older one goes; False, with a warning, where the optimizer's can't be stored."""
        try:
            write_state(folder, self.snapshot(updates_done), self.trainable.state_dict(), self.optimizer())
        except UnstorableStateError as fault:
            warn(f"{folder} was not written, so that this run can't be resumed: {fault}")
            return False
        self.latest_state = folder
        self._is_there(folder)
        return True

    def _write(self, path: Path, updates_done: int) -> None:
        """Write under a temporary name, read back, rename: whatever the network module does, `path` is whole or old."""
        temporary = path.with_name(f".{path.stem}.writing{path.suffix}")
        try:
            with self.evaluating():
                self.trainable.save(temporary, self.dtype, self.metadata(updates_done))
            for line in self.check(temporary):
                warn(f"{path}: {line}")
            open_to_others(temporary)
            flush(temporary)
            temporary.replace(path)
            flush(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
