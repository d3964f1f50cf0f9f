"""Whether a file that a tool is to write could be written, told before any work is done. Nothing is made; no torch."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from library.errors import Problem


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
    ancestor = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not ancestor.is_dir():
        yield Problem(where, f"can't be made: {ancestor} is no folder")
    elif not os.access(ancestor, os.W_OK | os.X_OK):
        yield Problem(where, f"can't be made: no permission in {ancestor}")
