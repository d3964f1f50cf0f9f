"""Whether what a tool is to write could be written, told before any work is done, and folders that are there whole or
not at all. No torch."""

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from library.console import say
from library.errors import Problem

LORA_ENDINGS = (".safetensors", ".ckpt", ".pt", ".pth")
"""Of LoRA files; only the first kind holds metadata."""
MODEL_ENDINGS = (".safetensors",)


def output_problems(path: Path, flag: str, endings: Sequence[str]) -> Iterator[Problem]:
    """What speaks against writing a new file, or over an old one: its ending, or where it is to stand.

    Args:
        flag: that named it.
    """
    where = f"{flag} {path}"
    if path.suffix not in endings:
        wrong = f"ends in {path.suffix}" if path.suffix else "has no ending"
        yield Problem(where, wrong, f"use {' or '.join(endings)}")
    if path.is_dir():
        yield Problem(where, "is a folder", "give the name of the new file")
        return
    yield from _place_problems(path, where)


def folder_problems(path: Path, flag: str) -> Iterator[Problem]:
    """What speaks against making a new folder: nothing of a user's is overwritten."""
    where = f"{flag} {path}"
    if path.is_dir() and any(path.iterdir()):
        yield Problem(where, "is there already and isn't empty", "choose another name, or remove it")
    elif path.exists() and not path.is_dir():
        yield Problem(where, "is a file", "give the name of a new folder")
    else:
        yield from _place_problems(path, where)


def inside_problems(old: Path, path: Path, flag: str) -> Iterator[Problem]:
    """What speaks against a new folder within the one that it is made of."""
    if old.is_dir() and old.resolve() in path.resolve().parents:
        yield Problem(f"{flag} {path}", f"lies within {old}", "give the name of a folder elsewhere")


def tell_replaced(path: Path, given: Iterable[Path]) -> None:
    """Say so where the new file takes the place of one that it is made of."""
    if path.exists() and any(one.exists() and path.samefile(one) for one in given):
        say(f"{path} is one of the files that are read: it is replaced once the new one is whole")


def _place_problems(path: Path, where: str) -> Iterator[Problem]:
    ancestor = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not ancestor.is_dir():
        yield Problem(where, f"can't be made: {ancestor} is no folder")
    elif not os.access(ancestor, os.W_OK | os.X_OK):
        yield Problem(where, f"can't be made: no permission in {ancestor}")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A place for a folder, which becomes `path` (not there, or empty) if the block, which makes it, ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        new = temporary / path.name
        yield new
        if path.is_dir():
            path.rmdir()
        new.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
