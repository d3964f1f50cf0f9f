"""Which files lie in a folder, or in a folder and its sub-folders. Nothing is opened.

Hidden files and folders don't count. A link that leads into a folder that is read anyway is told and not followed.
"""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from library.data.sources.images import EXTENSIONS
from library.data.sources.picture_files import some

OTHER_PICTURES = frozenset([".gif", ".tif", ".tiff", ".heic", ".heif", ".jfif", ".psd", ".svg"])
_PICTURES = frozenset(EXTENSIONS)


@dataclass(frozen=True)
class Tree:
    """What was listed.

    Attributes:
        keys: the pictures' posix paths relative to the top, sorted.
        folders: the names of all files in each folder, by its path.
        notices: one line each about what isn't read.
    """

    keys: tuple[str, ...]
    folders: dict[str, frozenset[str]]
    notices: tuple[str, ...]


@dataclass
class _Walk:
    top: str
    recursive: bool
    without: str
    keys: list[str] = field(default_factory=list)
    roots: list[str] = field(default_factory=list)
    folders: dict[str, frozenset[str]] = field(default_factory=dict)
    others: Counter[str] = field(default_factory=Counter)
    like_pictures: list[str] = field(default_factory=list)
    circles: list[str] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)


def list_pictures(top: Path, *, recursive: bool, without: Path | None = None) -> Tree:
    """All pictures directly in `top`, and with `recursive` in its sub-folders, but for the folder `without`.

    Raises:
        OSError: `top` can't be read as a folder.
    """
    left_out = "" if without is None else os.path.realpath(without)
    walk = _Walk(os.fspath(top), recursive, left_out, roots=[os.path.realpath(top)])
    folders = _read(walk, "")
    while folders:
        folder = folders.pop()
        try:
            folders += _read(walk, folder)
        except OSError as error:
            walk.closed.append(f"{folder[:-1]} ({error.strerror})")
    return Tree(tuple(sorted(walk.keys)), walk.folders, tuple(_notices(walk)))


def _read(walk: _Walk, folder: str) -> list[str]:
    """Take down the pictures of one folder, `sub/` or empty for the top; return the folders to read next."""
    found, names = [], []
    path = f"{walk.top}/{folder[:-1]}" if folder else walk.top
    with os.scandir(path) as entries:
        for entry in entries:
            name = entry.name
            if name[0] == ".":
                continue
            _, dot, ending = name.rpartition(".")
            extension = dot + ending.lower()
            if _is_folder(entry):
                if not walk.recursive:
                    walk.like_pictures += [name] * (extension in _PICTURES)
                elif walk.without and os.path.realpath(entry.path) == walk.without:
                    continue
                elif not entry.is_symlink() or _leads_out(walk, entry.path):
                    found.append(f"{folder}{name}/")
                else:
                    walk.circles.append(folder + name)
                continue
            names.append(name)
            if extension in _PICTURES:
                walk.keys.append(folder + name)
            elif extension in OTHER_PICTURES:
                walk.others[extension] += 1
    walk.folders[path] = frozenset(names)
    return found


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _leads_out(walk: _Walk, link: str) -> bool:
    """Whether a link to a folder leads to one that isn't read otherwise; then it is read, too."""
    target = f"{os.path.realpath(link)}/"
    for root in walk.roots:
        known = f"{root}/"
        if target.startswith(known) or known.startswith(target):
            return False
    walk.roots.append(target[:-1])
    return True


def _notices(walk: _Walk) -> list[str]:
    lines = []
    if walk.others:
        what = ", ".join(f"{count} {ending}" for ending, count in sorted(walk.others.items()))
        lines.append(f"{walk.top}: {what} not used: convert pictures to {', '.join(EXTENSIONS[:4])}")
    if walk.like_pictures:
        names = some(sorted(walk.like_pictures), 3)
        lines.append(f"{walk.top}: {names} not used: a folder that is named like a picture (--recursive reads folders)")
    if walk.circles:
        names = some(sorted(walk.circles), 3)
        lines.append(f"{walk.top}: {names} not followed: a link to a folder that is read anyway")
    if walk.closed:
        lines.append(f"{walk.top}: folders that can't be read are left out: {some(sorted(walk.closed), 3)}")
    return lines
