"""Hashes by which other programs know a base model. No torch: hashing can begin before it is there."""

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from library.known_files import KnownFiles

IS_A_FOLDER = "IsADirectory"
LEGACY_START = 0x100000
LEGACY_LENGTH = 0x10000
_CHUNK = 1 << 22


def legacy_hash(path: Path) -> str:
    """The 8-digit hash of a model file: SHA-256 of the 64 KiB that stand 1 MiB into it. A folder has none."""
    if path.is_dir():
        return IS_A_FOLDER
    with path.open("rb") as file:
        file.seek(LEGACY_START)
        return hashlib.sha256(file.read(LEGACY_LENGTH)).hexdigest()[:8]


def sha256(path: Path, advance: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a whole model file, 64 hex digits; a folder has none. `advance` is told of every few MB read.

    A file that has not changed since it was read before isn't read again (library.known_files).
    """
    if path.is_dir():
        return IS_A_FOLDER

    def read(path: Path) -> str:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                if advance is not None:
                    advance(len(chunk))
        return digest.hexdigest()

    return KnownFiles("file_sha256").value(path, read)


def _both(path: Path) -> tuple[str, str]:
    return legacy_hash(path), sha256(path)


@dataclass(frozen=True)
class ModelHashes:
    """Of a base model and, where one was named, of another VAE: (8-digit legacy hash, SHA-256)."""

    base: tuple[str, str]
    vae: tuple[str, str] | None


class BackgroundHashes:
    """The hashes of model files, worked out by a thread while libraries load, which keep one core busy."""

    def __init__(self, base: Path, vae: Path | None = None) -> None:
        self._base, self._vae = base, vae
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        vae = None if self._vae is None else _both(self._vae)
        self._found = ModelHashes(_both(self._base), vae)

    def result(self) -> ModelHashes:
        """All hashes; waits for them if need be."""
        self._thread.join()
        return self._found
