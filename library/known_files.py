"""Hashes of large files that were read before, so that nobody reads gigabytes twice; standard library only.

A file is known by path, size, times and inode. The memory is a small JSON file in the user's cache; where that can't be
read or written, everything is hashed anew.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

_KEPT = 500
_SETTLED = 2.0


class KnownFiles:
    """Values of files, such as a SHA-256, under one subject, such as `content_sha256`."""

    def __init__(self, subject: str) -> None:
        self._path = cache_folder() / "lorasmith" / f"{subject}.json"

    def value(self, path: Path, read: Callable[[Path], str]) -> str:
        """The value of this very file: the one that is remembered, else what `read` finds, which is then remembered.

        Nothing is remembered of a file that changed while it was read, or so shortly before that its times might not
        show another change.
        """
        before = _state(path)
        state, known = self._read().get(_name(path), (None, None))
        if known is not None and state == before:
            return known
        found = read(path)
        if _state(path) == before and time.time() - path.stat().st_mtime > _SETTLED:
            self._add(path, before, found)
        return found

    def _add(self, path: Path, state: list[int], value: str) -> None:
        known = self._read()
        known.pop(_name(path), None)
        known[_name(path)] = (state, value)
        fresh = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_text(json.dumps(dict(list(known.items())[-_KEPT:])), encoding="utf-8")
            fresh.replace(self._path)

    def _read(self) -> dict[str, tuple[list[int], str]]:
        try:
            read = json.loads(self._path.read_text(encoding="utf-8"))
            return {str(name): (list(state), str(value)) for name, (state, value) in read.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}


def cache_folder() -> Path:
    """The user's cache folder; of a user without a home, one that can't be written."""
    named = os.environ.get("XDG_CACHE_HOME")
    if named:
        return Path(named)
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        return Path(os.devnull)


def _name(path: Path) -> str:
    return str(path.resolve())


def _state(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
