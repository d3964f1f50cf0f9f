"""Is a file what its own metadata say? Some tools write a hash of the tensors into a file's header; torch-free.

A check reads the whole file, so the hash of one that went well is remembered (library.known_files).
"""

import hashlib
import struct
from collections.abc import Iterable
from pathlib import Path

from library.console import bar
from library.errors import UserError
from library.known_files import KnownFiles
from library.models.headers import Header

_KEYS = ("modelspec.hash_sha256", "sshs_model_hash")
_CHUNK = 1 << 22
_MEGABYTE = 1_000_000
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
    known = KnownFiles("content_sha256")
    for where, header in {header.path: (where, header) for where, header in named}.values():
        told = {key: digits for key in _KEYS if (digits := _digits(header.metadata.get(key, "")))}
        if not told:
            continue
        found = known.value(header.path, _hash)
        for key, value in told.items():
            if value != found:
                wrong = f"its metadata give {key} as {value[:12]}..., but its content has {found[:12]}..."
                raise UserError.single(where, wrong, _AGAIN)


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
