"""`--debug_dataset`: contact sheets of what a model would see in an epoch. No torch."""

from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from library.data.ahead import ahead
from library.data.pixels import Picture
from library.data.plan import Plan, Sample
from library.data.samples import Samples, Shown
from library.data.sheet import CELL, Cell, draw_sheet, wrapped, write_png

COLUMNS = 6
FRAME = 1
PER_PAGE = 24
PAGES = 10
CAPTION_LINES = 8


def write_sheets(
    plan: Plan,
    folder: Path,
    name: str,
    *,
    seed: int,
    epoch: int = 1,
    prior_loss_weight: float = 1.0,
    accumulation: int = 1,
    total_steps: int = 0,
    per_page: int = PER_PAGE,
    pages: int = PAGES,
    threads: int = 2,
) -> list[Path]:
    """Write `<folder>/<name>_01.png` and so on: the first samples of an epoch in the order in which they are trained.

    Each is shown as it comes out of crop, flip and colour, its mask beside it, with its name and all that was drawn
    for it. The other arguments are those of data.samples.

    Raises:
        UserError: a picture can't be read.
        OSError: the folder can't be written to.
    """
    samples = Samples(
        plan, seed=seed, prior_loss_weight=prior_loss_weight, accumulation=accumulation, total_steps=total_steps
    )

    def draw(turn: tuple[int, Sample]) -> Cell:
        shown = samples.shown(turn[1], epoch, turn[0])
        return _cell(shown, samples.picture(shown), turn[0])

    batches = enumerate(plan.epoch(seed, epoch))
    turns = islice(((index, sample) for index, batch in batches for sample in batch.samples), per_page * pages)
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    with closing(ahead(draw, turns, threads=threads, depth=2 * threads)) as cells:
        for page in _chunks(cells, per_page):
            path = folder / f"{name}_{len(written) + 1:02d}.png"
            write_png(draw_sheet([page[start : start + COLUMNS] for start in range(0, len(page), COLUMNS)]), path)
            written.append(path)
    return written


def _chunks(cells: Iterator[Cell], length: int) -> Iterator[list[Cell]]:
    while chunk := list(islice(cells, length)):
        yield chunk


def _cell(shown: Shown, picture: Picture, index: int) -> Cell:
    seen = [Image.fromarray(picture.pixels)]
    seen[0].thumbnail((CELL, CELL))
    if picture.mask is not None:
        mask = Image.fromarray(np.asarray(picture.mask)).convert("RGB")
        mask.thumbnail((CELL, CELL))
        seen.append(ImageOps.expand(ImageOps.crop(mask, FRAME), FRAME, "grey"))
    width = max(CELL, sum(image.width for image in seen))
    joined = Image.new("RGB", (width, seen[0].height), "white")
    for number, image in enumerate(seen):
        joined.paste(image, (number * seen[0].width, 0))
    caption = wrapped(f'"{shown.caption}"', width)
    if len(caption) > CAPTION_LINES:
        caption = [*caption[: CAPTION_LINES - 1], "..."]
    return Cell(joined, tuple([line for fact in _facts(shown, index) for line in wrapped(fact, width)] + caption))


def _facts(shown: Shown, index: int) -> Iterator[str]:
    drawn, (width, height) = shown.augmentation, shown.fit.bucket
    yield shown.record.key
    yield f"batch {index + 1}, repeat {shown.repeat + 1} of {shown.record.repeats}, bucket {width}x{height}"
    yield f"cut at {drawn.crop[0]},{drawn.crop[1]} of {drawn.resized[0]}x{drawn.resized[1]}"
    changes = ["flipped"] if drawn.flip else []
    if drawn.color is not None:
        changes.append(f"{drawn.color.kind} {drawn.color.amount:.3g}")
    if changes:
        yield ", ".join(changes)
    if shown.wants_mask:
        yield f"mask: {shown.record.mask or 'alpha channel'}"
    if shown.record.is_reg:
        yield f"regularization, loss weight {shown.loss_weight:g}"
