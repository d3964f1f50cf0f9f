"""Latent files beside the pictures: their names, what they hold, whether one still fits, and how one is written.

The layout is that of sd-scripts (`latents`, `latents_flipped`, `alpha_mask`, `original_size`, `crop_ltrb`) with
log-variances where a run draws from the posterior, and one entry more, `lorasmith`: JSON that says what the arrays were
made from. Which files a run needs is data.caches.slots' to know.
"""

import contextlib
import hashlib
import json
import os
import platform
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from library.data.buckets import Fit, Size, legacy_crop
from library.data.caches import npz
from library.data.caches.npz import UNREADABLE, State
from library.data.records import ImageRecord
from library.errors import UserError
from library.options.specs import SubsetSpec

FORMAT_VERSION = 1
ENTRY = "lorasmith"
MASK = "alpha_mask"
ALPHA = "alpha"
Latents = NDArray[np.float32]
Arrays = dict[str, NDArray[Any]]
Sampling = Literal["mean", "sample"]
Verdict = Literal["ours", "foreign", "absent", "stale", "damaged", "maskless"]
USABLE: tuple[Verdict, ...] = ("ours", "foreign")
VALUES: Mapping[Sampling, tuple[str, ...]] = MappingProxyType(
    {"mean": ("mean", "mean+logvar"), "sample": ("mean+logvar",)}
)
"""What a file may say that it holds, to serve a run."""
LATENTS = ("latents", "latents_flipped", "latents_logvar", "latents_flipped_logvar")
_SIZES = ("original_size", "crop_ltrb")
_FIT = ("bucket", "resized", "crop")
_OLD_SECONDS = 3600
_TEMPORARY = re.compile(r"\.(.+\.npz)\.(?:([0-9a-f]{8})-)?(\d+)\.tmp")


def entry_of(flipped: bool, logvar: bool = False) -> str:
    """The name of an array of latents in a file."""
    return f"latents{'_flipped' * flipped}{'_logvar' * logvar}"


@dataclass(frozen=True)
class Wanted:
    """Latents of one picture in one fit, and its mask.

    `factor` is the side in pixels of one latent value. `kind` ends file names: `sd` or `sdxl`, as sd-scripts has it, so
    that both may lie side by side. `mask` is the path of the mask picture, "alpha" for the alpha channel, or None.
    """

    record: ImageRecord
    fit: Fit
    subset: SubsetSpec
    flipped: bool
    vae_id: str
    dtype: str
    factor: int
    channels: int = 4
    kind: str = "sd"
    sampling: Sampling = "mean"
    mask: str | None = None

    @cached_property
    def path(self) -> Path:
        """The picture's file."""
        return self.record.path

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the latents."""
        return self.channels, self.fit.bucket[1] // self.factor, self.fit.bucket[0] // self.factor

    @property
    def entries(self) -> tuple[str, ...]:
        """Names of the arrays of latents."""
        logvars = (False, True) if self.sampling == "sample" else (False,)
        return tuple(entry_of(flip, logvar) for flip in (False, True)[: 1 + self.flipped] for logvar in logvars)

    @property
    def sources(self) -> list[Path]:
        """The files that all is made from: the picture, and the mask picture if there is one."""
        return [self.path] if self.mask in (None, ALPHA) else [self.path, Path(str(self.mask))]

    def description(self) -> dict[str, object]:
        """All that the latents depend on besides the picture's file."""
        return {
            "format": FORMAT_VERSION,
            "orientation": self.record.orientation,
            "bucket": list(self.fit.bucket),
            "resized": list(self.fit.resized),
            "crop": list(self.fit.crop),
            "interpolation": self.subset.resize_interpolation,
            "vae": self.vae_id,
            "dtype": self.dtype,
        }


@dataclass(frozen=True)
class Hashes:
    """Content hashes of the picture's file, and of the mask picture's ("alpha" for an alpha channel)."""

    picture: str
    mask: str | None = None


@dataclass(frozen=True)
class Trust:
    """Which files may be used: those without our entry, and ours without hashing picture and arrays again."""

    foreign: bool = True
    unchecked: bool = False


def names(wanted: Wanted) -> tuple[str, ...]:
    """File names for a picture's latents, best first: usual, for a second bucket, for a stem that pictures share."""
    (width, height), bucket, path = wanted.record.size, wanted.fit.bucket, wanted.path
    middles = (f"{width:04d}x{height:04d}", f"{width}x{height}_{bucket[0]}x{bucket[1]}")
    return tuple(f"{base}_{middle}_{wanted.kind}.npz" for base in (path.stem, path.name) for middle in middles)


def old_name(wanted: Wanted) -> str:
    """The name that early versions of sd-scripts gave; read, never written."""
    return f"{wanted.path.stem}.npz"


def hash_file(path: Path) -> str:
    """The content hash of a picture's file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def hash_sources(wanted: Wanted) -> Hashes:
    """The hashes of what the latents and the mask are made from.

    Raises:
        OSError: a file can't be read.
    """
    picture, *mask = [hash_file(path) for path in wanted.sources]
    return Hashes(picture, mask[0] if mask else wanted.mask)


def hash_arrays(arrays: Mapping[str, NDArray[Any]]) -> str:
    """A hash of names, kinds, shapes and values."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name}:{array.dtype.str}:{arrays[name].shape};".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def mask_values(mask: NDArray[Any]) -> NDArray[np.float32]:
    """A mask as files hold it: float32 in [0, 1]."""
    return mask.astype(np.float32) / np.float32(255) if mask.dtype == np.uint8 else mask.astype(np.float32, copy=False)


def judge(path: Path, wanted: Wanted, trust: Trust) -> Verdict:
    """Whether the file at `path` holds the wanted latents; `maskless` ones fit, but the mask beside them doesn't."""
    masks = (MASK,) if wanted.mask is not None else ()
    try:
        found = npz.read(path, *LATENTS, *masks, ENTRY)
        if ENTRY not in found:
            return "foreign" if trust.foreign and _fits_foreign(path, wanted) else "stale"
        said = json.loads(str(found.pop(ENTRY)))
    except FileNotFoundError:
        return "absent"
    except UNREADABLE:
        return "damaged"
    if not isinstance(said, dict):
        return "stale"
    mask = found.pop(MASK, None)
    kept = said.copy()
    mask_said, mask_array = kept.pop("mask", None), kept.pop("mask_array", None)
    picture, arrays, value = kept.pop("picture", None), kept.pop("arrays", None), kept.pop("value", None)
    if kept != wanted.description() or value not in VALUES[wanted.sampling]:
        return "stale"
    if any(array.shape != wanted.shape for array in found.values()) or not found.keys() >= set(wanted.entries):
        return "stale"
    if not trust.unchecked and hash_arrays(found) != arrays:
        return "damaged"
    try:
        hashes = Hashes(str(picture), str(mask_said)) if trust.unchecked else hash_sources(wanted)
    except OSError:
        return "stale"
    if hashes.picture != picture:
        return "stale"
    if wanted.mask is None:
        return "ours"
    same = mask is not None and mask.shape == wanted.fit.bucket[::-1] and hashes.mask == mask_said
    same = same and (mask_said == ALPHA) == (wanted.mask == ALPHA)
    if not same or mask is None or not (trust.unchecked or hash_arrays({MASK: mask}) == mask_array):
        return "maskless"
    return "ours"


def holds_other_fit(path: Path, wanted: Wanted) -> bool:
    """Whether the file at `path` is a whole one of ours for another bucket, size or cut, so that it is no worse for
    not being wanted here. What picture or VAE it was made from doesn't matter."""
    try:
        found = npz.read(path, *LATENTS, ENTRY)
        said = json.loads(str(found.pop(ENTRY)))
        fits = all(said[name] == value for name, value in wanted.description().items() if name in _FIT)
        whole = bool(found) and hash_arrays(found) == said["arrays"]
        return whole and not fits and bool(said["format"] == FORMAT_VERSION)
    except (*UNREADABLE, TypeError):
        return False


def _fits_foreign(path: Path, wanted: Wanted) -> bool:
    """A file of another program: right shape, size and crop, an upright picture that is older than the file."""
    record = wanted.record
    if record.orientation != 1 or wanted.mask not in (None, ALPHA):
        return False
    needed = (*wanted.entries, *_SIZES, *([MASK] if wanted.mask else []))
    found = npz.read(path, *needed, checked=True)
    if found.keys() != set(needed) or not wanted.path.stat().st_mtime < path.stat().st_mtime:
        return False
    for name in wanted.entries:
        if found[name].shape != wanted.shape or not _finite(found[name]):
            return False
    if wanted.mask and not _is_mask(found[MASK], wanted.fit.bucket):
        return False
    crop = np.asarray(found["crop_ltrb"], dtype=np.float64)
    expected = np.asarray(legacy_crop(record.size, wanted.fit.bucket))
    same_crop = crop.shape == (4,) and bool(np.allclose(crop, expected, rtol=0, atol=1e-3))
    return same_crop and np.asarray(found["original_size"]).tolist() == list(record.size)


def _finite(array: NDArray[Any]) -> bool:
    return array.dtype.kind == "f" and bool(np.isfinite(array).all())


def _is_mask(mask: NDArray[Any], bucket: Size) -> bool:
    return mask.shape == bucket[::-1] and _finite(mask) and bool(((mask >= 0) & (mask <= 1)).all())


def read(path: Path, entry: str, state: State | None) -> Latents:
    """An array of latents, float32 (c, h, w), or the mask, float32 (H, W).

    Args:
        state: what the file was when it was judged.

    Raises:
        ChangedError: it is another one now.
        UserError: the file went away or was damaged since it was checked.
    """
    try:
        return np.asarray(npz.read(path, entry, state=state)[entry], dtype=np.float32)
    except npz.ChangedError:
        raise
    except UNREADABLE as error:
        wrong = f"cached latents can't be read ({error})"
        raise UserError.single(str(path), wrong, "start again to rebuild it") from error


def write(path: Path, wanted: Wanted, hashes: Hashes, latents: Arrays, mask: NDArray[np.uint8] | None) -> State:
    """Write one file under a temporary name and rename it; whatever stood there before is replaced whole.

    Returns what `read` wants to know of it.

    Args:
        hashes: taken before picture and mask were decoded.
        mask: uint8 (H, W). Where one is wanted, a picture without alpha channel gets ones.

    Raises:
        UserError: the folder can't be written to.
    """
    value = VALUES[wanted.sampling][0]
    description = {**wanted.description(), "picture": hashes.picture, "value": value, "arrays": hash_arrays(latents)}
    return _save_latents(path, wanted, latents, description, hashes, mask)


def add_mask(path: Path, wanted: Wanted, hashes: Hashes, mask: NDArray[np.uint8] | None, state: State | None) -> State:
    """Put the mask into a file whose latents fit; all else is kept as it is.

    Args:
        state: what the file was when it was judged.

    Returns what `read` wants to know of it.

    Raises:
        UserError: the file can't be read any more, or not be written.
    """
    try:
        found = npz.read(path, *LATENTS, ENTRY, state=state)
        said = json.loads(str(found.pop(ENTRY)))
    except UNREADABLE as error:
        raise UserError.single(str(path), f"can't be read any more ({error})", "start again") from error
    return _save_latents(path, wanted, found, said, hashes, mask)


def _save_latents(
    path: Path,
    wanted: Wanted,
    latents: Arrays,
    description: Mapping[str, object],
    hashes: Hashes,
    mask: NDArray[np.uint8] | None,
) -> State:
    arrays: Arrays = {
        **latents,
        "original_size": np.array(wanted.record.size),
        "crop_ltrb": np.array(legacy_crop(wanted.record.size, wanted.fit.bucket)),
    }
    if wanted.mask is not None:
        ones = np.ones(wanted.fit.bucket[::-1], np.float32)
        arrays[MASK] = ones if mask is None else mask_values(mask)
        description = {**description, "mask": hashes.mask, "mask_array": hash_arrays({MASK: arrays[MASK]})}
    return save(path, arrays, description, memory_flag="--cache_latents")


def save(path: Path, arrays: Arrays, description: Mapping[str, object], *, memory_flag: str) -> State:
    """Write arrays, with our entry that holds `description`, under a temporary name and rename it.

    Args:
        memory_flag: what a user may say to do without files.

    Raises:
        UserError: the file can't be written.
    """
    temporary = path.with_name(f".{path.name}.{_host()}-{os.getpid()}.tmp")
    try:
        state = npz.write(temporary, {**arrays, ENTRY: np.array(json.dumps(description, sort_keys=True))})
        try:
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return state
    except OSError as error:
        advice = f"mend that, or use {memory_flag}, which keeps them in memory"
        raise UserError.single(str(path), f"can't be written ({error.strerror or error})", advice) from error


def leftovers(folders: Iterable[Path]) -> list[Path]:
    """Temporary files of ours that nobody writes any more: older than an hour, or of a process that has gone."""
    found = []
    for folder in folders:
        try:
            inside = [path for path in folder.iterdir() if path.name.endswith(".tmp")]
        except OSError:
            continue
        found += [
            path for path in inside if (match := _TEMPORARY.fullmatch(path.name)) and _is_left(path, *match.groups())
        ]
    return sorted(found)


def sweep(folders: Iterable[Path]) -> None:
    """Delete the `leftovers` of these folders, where that can be done."""
    for path in leftovers(folders):
        with contextlib.suppress(OSError):
            path.unlink()


def _is_left(path: Path, _name: str, host: str | None, process: str) -> bool:
    try:
        old = time.time() - path.stat().st_mtime > _OLD_SECONDS
    except OSError:
        return False
    return old or (host == _host() and not _runs(int(process)))


def _runs(process: int) -> bool:
    """Whether a process of this machine is there; where that can't be told, it is."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


@lru_cache(maxsize=1)
def _host() -> str:
    """This machine in a file's name."""
    return hashlib.blake2b(platform.node().encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()
