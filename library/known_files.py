"""Hashes of large files that were read before, so that nobody reads gigabytes twice; standard library only.

A file is known by path, size, times and inode. The memory is a small JSON file in the user's cache; where that can't be
read or written, everything is hashed anew.
"""

import contextlib
import json
import os
from pathlib import Path

_KEPT = 500


class KnownFiles:
    """Values of files, such as a SHA-256, under one subject, such as `content_sha256`."""

    def __init__(self, subject: str) -> None:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
        self._path = Path(base) / "lorasmith" / f"{subject}.json"

    def get(self, path: Path) -> str | None:
        """The value of this very file; None if it is unknown or has changed since."""
        state, value = self._read().get(_name(path), (None, None))
        return value if value is not None and state == _state(path) else None

    def add(self, path: Path, value: str) -> None:
        """Remember the value of a file as it is now."""
        known = self._read()
        known.pop(_name(path), None)
        known[_name(path)] = (_state(path), value)
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


def _name(path: Path) -> str:
    return str(path.resolve())


def _state(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
