"""Which picture files lie in a folder: each folder is listed once, however many names are looked up in it.

For sources that name pictures one by one (metadata, columns, masks). Nothing is opened and nothing is judged here.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from library.data.sources.images import EXTENSIONS
from library.errors import Problem

SHOWN = 10
"""So many names stand in one message; the others are counted."""


@dataclass
class Folder:
    """The files of one folder: `pictures` have a picture's extension, `others` don't. `wrong` if it can't be listed."""

    path: str
    pictures: dict[str, None] = field(default_factory=dict)
    others: frozenset[str] = frozenset()
    wrong: str = ""
    _stems: dict[str, list[str]] | None = None

    def of_stem(self, stem: str) -> list[str]:
        """The pictures whose name without its extension is `stem`, sorted."""
        if self._stems is None:
            self._stems = {}
            for name in sorted(self.pictures):
                self._stems.setdefault(name.rpartition(".")[0], []).append(name)
        return self._stems.get(stem, [])


class Folders:
    """Folders by path, listed when they are first asked for."""

    def __init__(self) -> None:
        self.listed: dict[str, Folder] = {}

    def __getitem__(self, path: str) -> Folder:
        found = self.listed.get(path)
        if found is None:
            found = self.listed[path] = list_folder(path)
        return found

    def __contains__(self, path: str) -> bool:
        """Whether a file of this absolute path is there."""
        inner, _, name = path.rpartition("/")
        folder = self[inner or "/"]
        return name in folder.pictures or name in folder.others


def list_folder(path: str) -> Folder:
    """The files directly in one folder, links to files among them; without any if it can't be listed."""
    pictures: dict[str, None] = {}
    others: list[str] = []
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if _is_folder(entry):
                    continue
                if is_picture(entry.name):
                    pictures[entry.name] = None
                else:
                    others.append(entry.name)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        return Folder(path, wrong="there is no such folder" if missing else error.strerror or str(error))
    return Folder(path, pictures, frozenset(others))


def is_picture(name: str) -> bool:
    """Whether a file's name ends as those of pictures do, in any case."""
    _, dot, ending = name.rpartition(".")
    return (dot + ending).lower() in EXTENSIONS


def some(names: Sequence[str], shown: int = SHOWN) -> str:
    """Names in a message: the first ones, then how many more there are; what would break a line is escaped."""
    told = ", ".join(name if name.isprintable() else ascii(name)[1:-1] for name in names[:shown])
    return told + (f" and {len(names) - shown} more" if len(names) > shown else "")


def shortened(problems: Sequence[Problem], where: str, advice: str = "mend them all") -> list[Problem]:
    """The first problems of files that can't be used, then how many more there are."""
    more = len(problems) - SHOWN
    if more <= 0:
        return list(problems)
    return [*problems[:SHOWN], Problem(where, f"{more} more of {len(problems)} that can't be used", advice)]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """A link that leads nowhere, or round in a circle, is a file: what is wrong with it shows when it is opened."""
    try:
        return entry.is_dir()
    except OSError:
        return False
