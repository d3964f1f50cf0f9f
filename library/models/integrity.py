"""Is a file what its own metadata say? Some tools write a hash of the tensors into a file's header; torch-free.

A check reads the whole file, so one that went well is remembered by path, size, times and inode in the user's cache.
"""

import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Iterable
from pathlib import Path

from library.console import bar
from library.errors import UserError
from library.models.headers import Header

_KEYS = ("modelspec.hash_sha256", "sshs_model_hash")
_CHUNK = 1 << 22
_MEGABYTE = 1_000_000
_REMEMBERED = 500
_AGAIN = (
    "the file is damaged, download or copy it again; pass --ignore_model_hash if a tool changed it and kept an old hash"
)


def check_hashes(named: Iterable[tuple[str, Header]]) -> None:
    """Check those files that carry a hash of their content; each is read to its end once, with a progress bar.

    Args:
        named: how a message names each file, and its header.

    Raises:
        UserError: a file's content has another hash than it says.
    """
    memo = _Memo()
    for where, header in {header.path: (where, header) for where, header in named}.values():
        told = {key: digits for key in _KEYS if (digits := _digits(header.metadata.get(key, "")))}
        if not told or memo.knows(header.path):
            continue
        found = _hash(header.path)
        for key, value in told.items():
            if value != found:
                wrong = f"its metadata give {key} as {value[:12]}..., but its content has {found[:12]}..."
                raise UserError.single(where, wrong, _AGAIN)
        memo.add(header.path)


def _digits(value: str) -> str | None:
    """The 64 hex digits of a SHA-256, with or without 0x; None for anything else."""
    digits = value.strip().lower().removeprefix("0x")
    return digits if len(digits) == 64 and all(digit in "0123456789abcdef" for digit in digits) else None


def _hash(path: Path) -> str:
    """SHA-256 of everything behind the header."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(8 + struct.unpack("<Q", file.read(8))[0])
        total = (path.stat().st_size - file.tell()) // _MEGABYTE
        with bar(f"checking {path.name} against its own hash, MB", max(1, total)) as progress:
            done = 0
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                done += len(chunk)
                progress.update(done // _MEGABYTE - progress.n)
    return digest.hexdigest()


class _Memo:
    """Files that were found to be what they say, in a small JSON file; done without where it can't be had."""

    def __init__(self) -> None:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
        self._path = Path(base) / "lorasmith" / "checked_files.json"
        self._known: dict[str, list[int]] = {}
        with contextlib.suppress(OSError, ValueError):
            read = json.loads(self._path.read_text(encoding="utf-8"))
            self._known = read if isinstance(read, dict) else {}

    def knows(self, path: Path) -> bool:
        """Was this very file checked before?"""
        return self._known.get(str(path.resolve())) == _state(path)

    def add(self, path: Path) -> None:
        """Remember a file."""
        name = str(path.resolve())
        self._known.pop(name, None)
        self._known[name] = _state(path)
        kept = dict(list(self._known.items())[-_REMEMBERED:])
        fresh = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_text(json.dumps(kept), encoding="utf-8")
            fresh.replace(self._path)


def _state(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
