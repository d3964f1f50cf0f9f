"""Writing what was trained: weights checked after writing, states beside them, and the rolling deletion of old ones."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from library.console import say, warn
from library.training.products import Product, Products
from library.training.state import SUFFIX, RunState, UnstorableStateError, delete_state, flush, write_state
from library.training.steps import Save
from library.training.trainable import Trainable
from library.weights.files import open_to_others


@dataclass
class Saver:
    """Where files go, and what goes into them.

    Attributes:
        products: a save's stem -> its files, the main one first.
        snapshot: updates done -> the manifest of a state.
        evaluating: a context in which the weights are those that a file holds; a state has those that train.
        after: gets every weight file and state folder as soon as it is complete, before older ones are deleted.
    """

    output_dir: Path
    products: Products
    dtype: torch.dtype | None
    trainable: Trainable
    optimizer: Callable[[], dict[str, Any]]
    snapshot: Callable[[int], RunState]
    evaluating: Callable[[], AbstractContextManager[None]] = nullcontext
    after: Callable[[Path], None] | None = None
    latest_state: Path | None = None

    def main_file(self, stem: str) -> Path:
        """The file by which a save is named."""
        return self.output_dir / self.products(stem)[0].name

    def save(self, save: Save, updates_done: int) -> Path:
        """Write what `save` asks for; returns its main file."""
        for path in self._write(self.products(save.stem), updates_done):
            self._is_there(path)
        has_state = save.state and self._write_state(self.output_dir / f"{save.stem}{SUFFIX}", updates_done)
        for product in (one for stem in save.expired_weights for one in self.products(stem)):
            (self.output_dir / product.name).unlink(missing_ok=True)
        for stem in save.expired_states if has_state else ():
            delete_state(self.output_dir / f"{stem}{SUFFIX}")
        return self.main_file(save.stem)

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

    def _write(self, products: Sequence[Product], updates_done: int) -> list[Path]:
        """Write all files of a save under temporary names and read them back; then rename them, so that files which
        belong together are all new, or all old, unless the run is killed between two renames. Returns their paths."""
        paths = [self.output_dir / product.name for product in products]
        temporaries = [path.with_name(f".{path.stem}.writing{path.suffix}") for path in paths]
        try:
            for product, path, temporary in zip(products, paths, temporaries, strict=True):
                path.parent.mkdir(parents=True, exist_ok=True)
                with self.evaluating():
                    product.write(temporary, self.dtype, updates_done)
                for line in product.check(temporary):
                    warn(line)
                open_to_others(temporary)
                flush(temporary)
            for path, temporary in zip(paths, temporaries, strict=True):
                temporary.replace(path)
                flush(path.parent)
        finally:
            for temporary in temporaries:
                temporary.unlink(missing_ok=True)
        return paths
