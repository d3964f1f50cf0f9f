"""Preview pictures while training: PNGs in `sample/`, and one contact sheet that grows with the run.

The pictures come from the very modules that are trained. Nothing of the run is disturbed: samplers draw from generators
of their own, and the network's mode is put back.
"""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from library.console import track
from library.rng import rng
from library.training.prompts import Prompt

if TYPE_CHECKING:
    from PIL.Image import Image

_STAMP = "%Y%m%d%H%M%S"


class Painter(Protocol):
    """The model's part: pictures of one prompt, one for each seed; it chooses the size where the prompt names none."""

    def paint(self, prompt: Prompt, seeds: Sequence[int]) -> "Iterator[Image]": ...


@dataclass(frozen=True)
class PreviewWriter:
    """Draws prompts and files pictures; `started_at` (unix seconds) tells this run's pictures from older ones.

    Of each prompt there are `count` pictures, whose seeds count up from the prompt's.
    """

    painter: Painter
    prompts: Sequence[Prompt]
    folder: Path
    output_name: str | None
    sampler: str
    seed: int
    started_at: float
    told_to_stop: Callable[[], bool]
    count: int = 1

    def draw(self, updates_done: int, epoch: int | None) -> dict[str, Path]:
        """Draw every prompt, unless told to stop. Files are named by `epoch` (from 1), or without one by the step.

        Returns the files by the names that trackers show: `sample_<prompt>`, and with several of each prompt
        `sample_<prompt>_<number>`.
        """
        from library.data.sheet import write_png

        self.folder.mkdir(parents=True, exist_ok=True)
        tag = f"{updates_done:06d}" if epoch is None else f"e{epoch:06d}"
        total = len(self.prompts) * self.count
        drawn: dict[str, Path] = {}
        for index, seed, image in track(self._images(), f"previews at step {updates_done}", total):
            path = self.folder / f"{self._prefix}{tag}_{index:02d}_{time.strftime(_STAMP)}_{seed}.png"
            write_png(image, path)
            drawn[f"sample_{index}" + (f"_{len(drawn) % self.count}" if self.count > 1 else "")] = path
        if not self.told_to_stop():
            self._write_sheet()
        return drawn

    def _images(self) -> "Iterator[tuple[int, int, Image]]":
        """The number of the prompt, the seed and the picture, until told to stop."""
        for index, prompt in enumerate(self.prompts):
            first = prompt.seed if prompt.seed is not None else int(rng(self.seed, "preview", index).integers(2**31))
            seeds = range(first, first + self.count)
            if self.told_to_stop():
                return
            sampler = prompt.sample_sampler or self.sampler
            pictures = self.painter.paint(replace(prompt, sample_sampler=sampler), seeds)
            for seed, image in zip(seeds, pictures, strict=True):
                yield index, seed, image
                if self.told_to_stop():
                    return

    @property
    def _prefix(self) -> str:
        return f"{self.output_name}_" if self.output_name else ""

    def _pictures(self) -> dict[str, dict[int, Path]]:
        """This run's pictures on disk: tag -> column of the sheet -> newest file. A prompt has `count` columns, its
        pictures in the order of their seeds."""
        pattern = re.compile(re.escape(self._prefix) + r"(e?\d{6})_(\d{2,})_(\d{14})_(\d+)\.png")
        since = time.strftime(_STAMP, time.localtime(self.started_at))
        found: dict[tuple[str, int], dict[int, tuple[str, Path]]] = {}
        for path in self.folder.glob("*.png"):
            match = pattern.fullmatch(path.name)
            if match and match[3] >= since:
                seeds = found.setdefault((match[1], int(match[2])), {})
                seeds[int(match[4])] = max(seeds.get(int(match[4]), ("", path)), (match[3], path))
        rows: dict[str, dict[int, Path]] = {}
        for (tag, index), seeds in sorted(found.items()):
            newest = sorted(seeds, key=lambda seed: (seeds[seed][0], -seed))[-self.count :]
            for place, seed in enumerate(sorted(newest)):
                rows.setdefault(tag, {})[index * self.count + place] = seeds[seed][1]
        return rows

    def _write_sheet(self) -> None:
        """`<name>_sheet.png`: steps down, prompts across, made anew from the pictures on disk."""
        from library.data.sheet import Cell, draw_sheet, write_png

        rows = []
        for tag, row in self._pictures().items():
            what = f"epoch {int(tag[1:])}" if tag.startswith("e") else f"step {int(tag)}"
            cells: list[Cell | None] = [None] * (1 + max(row))
            for index, path in row.items():
                cells[index] = Cell(_small(path), (what,))
            rows.append(cells)
        if rows:
            write_png(draw_sheet(rows), self.folder / f"{self._prefix}sheet.png")


def _small(path: Path) -> "Image":
    """A picture in RGB, no side longer than a cell of the contact sheet."""
    from PIL import Image

    from library.data.sheet import CELL

    with Image.open(path) as image:
        image.thumbnail((CELL, CELL))
        return image.convert("RGB")
