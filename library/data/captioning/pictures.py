"""Pictures for captioners and taggers: which there are, and their upright pixels, read ahead by threads, in batches.

Transparent parts become white. What a model makes of pixels is its own matter; what trains goes through data.pixels.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from library.data import pixels
from library.data.ahead import ahead
from library.data.captioning.store import Store
from library.data.pixels import Pixels
from library.data.records import ImageRecord
from library.data.sources.folders import list_pictures
from library.data.sources.images import Damage, probe
from library.data.sources.picture_files import some
from library.errors import UserError

Prepare = Callable[[Pixels], NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Loaded:
    """One picture: what a model takes in, and its upright width and height; `wrong` says why it can't be used."""

    path: Path
    values: NDArray[Any] | None = None
    size: tuple[int, int] = (0, 0)
    wrong: str = ""


@dataclass(frozen=True)
class Work:
    """The pictures of a folder: those that are to be done, in the order of their names, and how many are done.

    Attributes:
        notices: one line each about what isn't read.
    """

    folder: Path
    todo: tuple[Path, ...]
    done: int
    notices: tuple[str, ...]


def find_work(folder: Path, store: Store, *, recursive: bool, again: bool) -> Work:
    """Which pictures have no text yet; `again` takes those with one, too. One of several that share a text file counts.

    Raises:
        UserError: the folder can't be read, or has no pictures.
    """
    try:
        tree = list_pictures(folder, recursive=recursive)
    except OSError as error:
        reason = "there is no such folder" if isinstance(error, FileNotFoundError) else f"{error.strerror or error}"
        raise UserError.single(str(folder), reason) from error
    if not tree.keys:
        advice = "" if recursive else "with --recursive, inner folders count too"
        raise UserError.single(str(folder), "no pictures there", advice)
    paths = [folder / key for key in tree.keys]
    notices = list(tree.notices)
    twins = _same_text(paths, store)
    if twins:
        named = some([path.name for path in twins], 3)
        notices.append(f"{folder}: {named} differ from others in the extension only, and share their texts")
    left = [path for path in paths if path not in twins]
    todo = [path for path in left if again or not store.has(path)]
    return Work(folder, tuple(todo), len(left) - len(todo), tuple(notices))


def _same_text(paths: Sequence[Path], store: Store) -> frozenset[Path]:
    """Pictures whose text stands where that of an earlier one does."""
    seen: set[str] = set()
    twins = []
    for path in paths:
        if (place := store.place(path)) in seen:
            twins.append(path)
        seen.add(place)
    return frozenset(twins)


def batches(
    paths: Sequence[Path], prepare: Prepare, size: int, *, threads: int, bad: Callable[[Loaded], object]
) -> Generator[list[Loaded], None, None]:
    """Pictures, decoded and prepared by threads, `size` at a time; those that can't be read go to `bad` in between."""
    load = partial(loaded, prepare=prepare)
    source: Generator[Loaded, None, None] = ahead(load, paths, threads=threads, depth=size + 2 * threads)
    with closing(source):
        batch: list[Loaded] = []
        for one in source:
            if one.wrong:
                bad(one)
                continue
            batch.append(one)
            if len(batch) == size:
                yield batch
                batch = []
        if batch:
            yield batch


def loaded(path: Path, prepare: Prepare) -> Loaded:
    """One picture as a model takes it in, or what is wrong with it."""
    header = probe(path)
    if isinstance(header, Damage):
        return Loaded(path, wrong=header.wrong)
    record = ImageRecord(path.parent, path.name, header.size, header.orientation, "", False, 0, 0, 1, False)
    try:
        return Loaded(path, prepare(on_white(record)), header.size)
    except UserError as error:
        return Loaded(path, wrong=error.problems[0].wrong)


def on_white(record: ImageRecord) -> Pixels:
    """uint8 (h, w, 3) RGB, upright, transparent parts white.

    Raises:
        UserError: the picture can't be decoded.
    """
    picture = pixels.decoded(record, alpha=True)
    if picture.mask is None:
        return picture.pixels
    image = Image.fromarray(picture.pixels)
    white = Image.new("RGB", image.size, (255, 255, 255))
    return np.asarray(Image.composite(image, white, Image.fromarray(picture.mask)))
