"""Where the captions of pictures go: a text file beside each picture, or a metadata file for all of them.

Both know what is there already, so that work that was stopped goes on where it was. How a caption is made is not known
here.
"""

import time
from pathlib import Path
from typing import Any, Literal, Protocol

from library.data.captioning import metadata_files
from library.data.captioning.metadata_files import Table
from library.data.sources.images import EXTENSIONS
from library.data.sources.shelves import read_caption
from library.errors import Problem, UserError

Field = Literal["caption", "tags"]
_WRITTEN_EVERY = 30.0
"""Seconds. A table is written as a whole, so not after every picture."""


class Store(Protocol):
    """Texts of pictures, by the pictures' paths."""

    def place(self, picture: Path) -> str:
        """Where the text of a picture stands: two pictures with one place share it."""

    def has(self, picture: Path) -> bool:
        """Whether there is a text for it, be it empty."""

    def read(self, picture: Path) -> str:
        """Its text: lines that aren't blank, stripped; empty where there is none.

        Raises:
            UserError: what is there is no text.
        """

    def write(self, picture: Path, text: str, size: tuple[int, int]) -> None:
        """Keep a text in place of an older one; `size` is the picture's upright width and height."""

    def close(self) -> None:
        """Write what isn't written yet."""


def open_store(folder: Path, extension: str, output: Path | None, field: Field, *, relative: bool = False) -> Store:
    """The store that a tool's flags ask for: the metadata file `output`, which is continued if it is there, or files
    with `extension` beside the pictures where that is None.

    Raises:
        UserError: the metadata file can't be read.
    """
    return Sidecars(extension) if output is None else TableFile(output, folder, field, relative=relative)


class Sidecars:
    """A text file beside each picture, `<base><extension>`, with a line end behind the text."""

    def __init__(self, extension: str) -> None:
        self._extension = with_dot(extension)

    def path(self, picture: Path) -> Path:
        """The text file of a picture."""
        return picture.with_name(picture.stem + self._extension)

    def place(self, picture: Path) -> str:
        return str(self.path(picture))

    def has(self, picture: Path) -> bool:
        return self.path(picture).is_file()

    def read(self, picture: Path) -> str:
        if not self.has(picture):
            return ""
        text = read_caption(str(self.path(picture)))
        if isinstance(text, Problem):
            raise UserError([text])
        return text

    def write(self, picture: Path, text: str, size: tuple[int, int]) -> None:
        metadata_files.write_text(self.path(picture), f"{text}\n")

    def close(self) -> None:
        pass


class TableFile:
    """One field of a metadata file; other fields and other pictures in it stay as they are.

    A picture is found there under its absolute path, its path as it was given, its path within the folder, or either
    without its extension. New ones get their absolute path, or with `relative` the path within the folder. Sizes are
    those of pictures as they are shown, (width, height).
    """

    def __init__(self, path: Path, folder: Path, field: Field, *, relative: bool) -> None:
        self._path, self._folder, self._field, self._relative = path, folder, field, relative
        self._table: Table = metadata_files.read_table(path) if path.exists() else {}
        self._changed, self._written = False, time.monotonic()

    def _key(self, picture: Path) -> str | None:
        return metadata_files.key_of(self._table, picture, self._folder)

    def place(self, picture: Path) -> str:
        key = self._key(picture)
        if key is None:
            key = (picture.relative_to(self._folder) if self._relative else metadata_files.absolute(picture)).as_posix()
        return key

    def has(self, picture: Path) -> bool:
        key = self._key(picture)
        return key is not None and self._table[key].get(self._field) is not None

    def read(self, picture: Path) -> str:
        key = self._key(picture)
        text = "" if key is None else self._table[key].get(self._field)
        if text is None:
            return ""
        if not isinstance(text, str):
            wrong = f"{self._field} of {key} is no text"
            raise UserError.single(str(self._path), wrong, "write it as one text")
        return "\n".join(line for raw in text.splitlines() if (line := raw.strip()))

    def write(self, picture: Path, text: str, size: tuple[int, int]) -> None:
        entry: dict[str, Any] = self._table.setdefault(self.place(picture), {})
        entry[self._field] = text
        entry["image_size"] = list(size)
        self._changed = True
        if time.monotonic() - self._written > _WRITTEN_EVERY:
            self.close()

    def close(self) -> None:
        if self._changed:
            metadata_files.write_table(self._path, self._table)
        self._changed, self._written = False, time.monotonic()


def with_dot(extension: str) -> str:
    """A caption extension as file names end, whichever way it was written."""
    return extension if extension.startswith(".") else f".{extension}"


def problem_with_extension(extension: str, where: str) -> Problem | None:
    """Why captions can't have this extension: it would be a folder's, nothing, or overwrite pictures."""
    if not extension.strip(".") or "/" in extension or "\\" in extension:
        return Problem(where, f"{extension or 'nothing'} is no extension", "write one such as .txt")
    if with_dot(extension).lower() in EXTENSIONS:
        return Problem(where, f"{extension} is what pictures end in, so they would be overwritten", "write .txt")
    return None
