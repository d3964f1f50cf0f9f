"""Latent files beside the pictures: their names, what they hold, whether one still fits, and how one is written.

The layout is that of sd-scripts (`latents`, `latents_flipped`, `original_size`, `crop_ltrb`) with one entry more,
`lorasmith`: JSON that says what the latents were made from. Which files a run needs is data.cache's to know.
"""

import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from library.data.buckets import Fit, Size, legacy_crop
from library.data.records import ImageRecord
from library.errors import UserError

FORMAT_VERSION = 1
ENTRY = "lorasmith"
Latents = NDArray[np.float32]
Verdict = Literal["ours", "foreign", "absent", "stale", "damaged"]
ENTRIES = ("latents", "latents_flipped", "original_size", "crop_ltrb", ENTRY)
_PARSING = Lock()
"""numpy reads the heads of arrays with `ast`, which fails in several threads before Python 3.11.8 and 3.12.2."""
UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError)


@dataclass(frozen=True)
class Wanted:
    """Latents of one picture in one fit. `factor` is the side in pixels of one latent value; `kind` ends file names."""

    record: ImageRecord
    fit: Fit
    interpolation: str | None
    flipped: bool
    vae_id: str
    dtype: str
    factor: int
    channels: int = 4
    kind: str = "sd"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the latents."""
        return self.channels, self.fit.bucket[1] // self.factor, self.fit.bucket[0] // self.factor

    def description(self, picture: str) -> dict[str, object]:
        """All that the latents depend on; `picture` is the hash of the picture's file."""
        return {
            "format": FORMAT_VERSION,
            "picture": picture,
            "orientation": self.record.orientation,
            "bucket": list(self.fit.bucket),
            "resized": list(self.fit.resized),
            "crop": list(self.fit.crop),
            "interpolation": self.interpolation,
            "vae": self.vae_id,
            "dtype": self.dtype,
            "value": "mean",
        }


@dataclass(frozen=True)
class Trust:
    """Which files may be used: those without our entry, and ours without hashing picture and arrays again."""

    foreign: bool = True
    unchecked: bool = False


def names(record: ImageRecord, bucket: Size, kind: str) -> tuple[str, ...]:
    """File names for a picture's latents, best first: usual, for a second bucket, for a stem that pictures share.

    `kind` is `sd` or `sdxl`, as sd-scripts has it, so that both may lie side by side.
    """
    size = f"{record.size[0]:04d}x{record.size[1]:04d}"
    second = f"{record.size[0]}x{record.size[1]}_{bucket[0]}x{bucket[1]}"
    bases = (record.path.stem, record.path.name)
    return tuple(f"{base}_{middle}_{kind}.npz" for base in bases for middle in (size, second))


def old_name(record: ImageRecord) -> str:
    """The name that early versions of sd-scripts gave; read, never written."""
    return f"{record.path.stem}.npz"


def hash_file(path: Path) -> str:
    """The content hash of a picture's file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def hash_arrays(arrays: dict[str, NDArray[Any]]) -> str:
    """A hash of names, kinds, shapes and values."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name}:{array.dtype.str}:{array.shape};".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def entries(path: Path, *names: str) -> dict[str, NDArray[Any]]:
    """Those of the named entries that a file has; all of them if none is named.

    Raises:
        OSError and others of UNREADABLE: there is no such file, or it is damaged.
    """
    with _PARSING, np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in names or file.files if name in file.files}


def judge(path: Path, wanted: Wanted, trust: Trust) -> Verdict:
    """Whether the file at `path` holds the wanted latents."""
    try:
        found = entries(path, *ENTRIES)
        if ENTRY not in found:
            return "foreign" if trust.foreign and _fits_foreign(found, path, wanted) else "stale"
        said = json.loads(str(found[ENTRY]))
    except FileNotFoundError:
        return "absent"
    except UNREADABLE:
        return "damaged"
    arrays = {name: array for name, array in found.items() if name.startswith("latents")}
    if not isinstance(said, dict) or not all(array.shape == wanted.shape for array in arrays.values()):
        return "stale"
    if trust.unchecked:
        picture, arrays_hash = said.get("picture"), said.get("arrays")
    else:
        picture, arrays_hash = None, hash_arrays(arrays)
        if said.get("arrays") != arrays_hash:
            return "damaged"
        picture = _hash_if_same_otherwise(said, wanted)
    if {**wanted.description(str(picture)), "arrays": arrays_hash} != said:
        return "stale"
    return "ours" if "latents" in arrays and ("latents_flipped" in arrays or not wanted.flipped) else "stale"


def _hash_if_same_otherwise(said: dict[str, object], wanted: Wanted) -> str:
    """The hash of the picture's file; left out if the rest of the description differs already."""
    rest = wanted.description("")
    same = all(said.get(name) == value for name, value in rest.items() if name != "picture")
    return hash_file(wanted.record.path) if same else ""


def _fits_foreign(file: Mapping[str, NDArray[Any]], path: Path, wanted: Wanted) -> bool:
    """A file of another program: right shape, size and crop, an upright picture that is older than the file."""
    record = wanted.record
    needed = ["latents", "original_size", "crop_ltrb"] + (["latents_flipped"] if wanted.flipped else [])
    if record.orientation != 1 or any(name not in file for name in needed):
        return False
    if not record.path.stat().st_mtime < path.stat().st_mtime:
        return False
    arrays = [file[name] for name in needed if name.startswith("latents")]
    if not all(
        array.shape == wanted.shape and array.dtype.kind == "f" and np.isfinite(array).all() for array in arrays
    ):
        return False
    crop = np.asarray(file["crop_ltrb"], dtype=np.float64)
    expected = np.asarray(legacy_crop(record.size, wanted.fit.bucket))
    same_crop = crop.shape == (4,) and bool(np.allclose(crop, expected, rtol=0, atol=1e-3))
    return same_crop and np.asarray(file["original_size"]).tolist() == list(record.size)


def read(path: Path, flipped: bool) -> Latents:
    """Latents float32 (c, h, w).

    Raises:
        UserError: the file went away or was damaged since it was checked.
    """
    try:
        name = "latents_flipped" if flipped else "latents"
        return np.asarray(entries(path, name)[name], dtype=np.float32)
    except UNREADABLE as error:
        wrong = f"cached latents can't be read ({error})"
        raise UserError.single(str(path), wrong, "start again to rebuild it") from error


def write(path: Path, wanted: Wanted, picture: str, latents: Latents, flipped: Latents | None) -> None:
    """Write one file under a temporary name and rename it; whatever stood there before is replaced whole.

    Args:
        picture: the hash of the picture's file, taken before it was decoded.

    Raises:
        UserError: the folder can't be written to.
    """
    arrays: dict[str, NDArray[Any]] = {"latents": latents}
    if flipped is not None:
        arrays["latents_flipped"] = flipped
    sizes = {
        "original_size": np.array(wanted.record.size),
        "crop_ltrb": np.array(legacy_crop(wanted.record.size, wanted.fit.bucket)),
    }
    save(path, arrays, wanted.description(picture), sizes, memory_flag="--cache_latents")


def save(
    path: Path,
    arrays: dict[str, NDArray[Any]],
    description: dict[str, object],
    other: Mapping[str, NDArray[Any]] = MappingProxyType({}),
    *,
    memory_flag: str,
) -> None:
    """Write arrays, with our entry that holds `description` and their hash, under a temporary name and rename it.

    Args:
        other: entries that the hash leaves out.
        memory_flag: what a user may say to do without files.

    Raises:
        UserError: the file can't be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    said = {**description, "arrays": hash_arrays(arrays)}
    everything: dict[str, Any] = {**arrays, **other, ENTRY: np.array(json.dumps(said, sort_keys=True))}
    try:
        try:
            with temporary.open("wb") as file:
                np.savez(file, **everything)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        advice = f"mend that, or use {memory_flag}, which keeps them in memory"
        raise UserError.single(str(path), f"can't be written ({error.strerror or error})", advice) from error
