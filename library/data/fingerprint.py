"""The hash by which a resumed run knows its data again: all that decides what is trained, and no place where it lies.

Settings are taken from the specs field by field, except those named here, so that a new one can't be forgotten. The
hash of a plan opens no picture; what is in the pictures is a hash of its own, `contents`, that only a real run needs.
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from library.data.buckets import Fit
from library.data.records import ImageRecord
from library.data.sources import index as indexes
from library.data.sources.index import Index, Numbers
from library.data.sources.reading import LateBar, default_threads, read_all
from library.errors import UserError
from library.options.specs import DatasetSpec, SubsetSpec

if TYPE_CHECKING:
    from library.data.plan import Plan

VERSION = 2
WHOLE_FILES, WHOLE_BYTES = 2000, 2 << 30
"""Of up to so many files, or so many bytes in all, every byte is hashed; of more, three blocks of each file."""
_BLOCK = 16 << 10
_LONG = 100_000
_SAID_BY_RECORDS = {
    SubsetSpec: {
        *("image_dir", "num_repeats", "is_reg", "class_tokens", "caption_extension", "caption_extension_named"),
        *("where", "source", "metadata_file", "columns", "hub", "recursive", "caption_from", "mask_dir", "masks"),
        *("keep_in_memory", "validation_split"),
    },
    DatasetSpec: {
        *("batch_size", "subsets", "where", "split_seed", "enable_bucket", "min_bucket_reso", "max_bucket_reso"),
        *("bucket_reso_steps", "bucket_no_upscale", "aspect_buckets", "bucket_choice"),
    },
}
"""Fields that say where pictures are, or whose effect is seen in records, fits and the size of batches."""


class Hash:
    """Collects what the hash is of, in order."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self.add(VERSION)

    def add(self, value: Any) -> None:
        """A number, a text, or a structure of them."""
        self._bytes(json.dumps(value, sort_keys=True, default=str).encode())

    def add_dataset(
        self, spec: DatasetSpec, records: Sequence[ImageRecord], fits: Sequence[Fit], global_batch: int
    ) -> None:
        """A dataset: its settings, and those of the subsets that have records; the records by columns."""
        used = sorted({record.subset for record in records})
        self.add([global_batch, _settings(spec), {str(i): _settings(spec.subsets[i]) for i in used}])
        self._texts(record.key for record in records)
        self._texts(record.caption for record in records)
        self._numbers(number for record in records for number in record.size)
        self._numbers(record.orientation for record in records)
        self._numbers(record.file_bytes for record in records)
        self._numbers(record.repeats for record in records)
        self._numbers(record.subset for record in records)
        self._numbers(record.is_reg for record in records)
        self._numbers(-1 if record.mask is None else record.mask_bytes for record in records)
        kinds: dict[tuple[int, ...], int] = {}
        known: dict[int, int] = {}
        places = []
        for fit in fits:
            place = known.get(id(fit))
            if place is None:
                place = known[id(fit)] = kinds.setdefault((*fit.bucket, *fit.resized, *fit.crop), len(kinds))
            places.append(place)
        self._numbers(places)
        self.add(list(kinds))

    def hexdigest(self) -> str:
        """The hash of what was added so far."""
        return self._hash.hexdigest()

    def _bytes(self, data: bytes) -> None:
        self._hash.update(len(data).to_bytes(8, "little"))
        self._hash.update(data)

    def _numbers(self, values: Iterable[int]) -> None:
        self._bytes(np.fromiter(values, "<i8").tobytes())

    def _texts(self, texts: Iterable[str]) -> None:
        found = list(texts)
        self._numbers(map(len, found))
        self._bytes("".join(found).encode("utf-8", "surrogatepass"))


def _settings(spec: DatasetSpec | SubsetSpec) -> dict[str, Any]:
    """The fields of a spec that the records don't show."""
    left_out = _SAID_BY_RECORDS[type(spec)]
    values = (
        asdict(spec)
        if isinstance(spec, SubsetSpec)
        else {field.name: getattr(spec, field.name) for field in fields(spec)}
    )
    return {name: value for name, value in values.items() if name not in left_out}


def contents(plan: "Plan") -> str:
    """A hash of what is in the files of a plan's pictures and masks, in their order; names and places don't count.

    A picture that was painted over has the same length, and `Plan.fingerprint` doesn't see it. Whole files are hashed
    up to `WHOLE_BYTES` in all, or 8 times that of at most `WHOLE_FILES`; beyond that the first, middle and last 16 KiB
    of each, which a
    small change between them escapes. What was found is remembered in the user's cache folder while a file's size,
    times and inode are the same, so a second start opens no picture.

    Raises:
        UserError: a file can't be read any more.
    """
    tops = {folder: str(folder.absolute()).rstrip("/") for folder in {record.folder for record in plan.records}}
    pictures = [
        record.key if record.key.startswith("/") else f"{tops[record.folder]}/{record.key}" for record in plan.records
    ]
    lengths: dict[str, int] = {}
    for record, picture in zip(plan.records, pictures, strict=True):
        lengths[picture] = record.file_bytes
        if record.mask is not None:
            lengths[record.mask] = record.mask_bytes
    total = sum(lengths.values())
    whole = total <= WHOLE_BYTES or (len(lengths) <= WHOLE_FILES and total <= 8 * WHOLE_BYTES)
    folders: dict[str, list[str]] = defaultdict(list)
    for path in lengths:
        folder, _, name = path.rpartition("/")
        folders[folder or "/"].append(name)
    progress = LateBar("hashing pictures", len(lengths))
    found: dict[str, str] = {}
    for folder, names in folders.items():
        digests = _digests(folder, names, whole, progress)
        found |= {f"{folder.rstrip('/')}/{name}": digest for name, digest in zip(names, digests, strict=True)}
    progress.close()
    digest = hashlib.blake2b(f"{VERSION} {'whole' if whole else 'parts'}".encode(), digest_size=16)
    for record, picture in zip(plan.records, pictures, strict=True):
        mask = "" if record.mask is None else found[record.mask]
        digest.update(f"\n{found[picture]} {mask}".encode())
    return digest.hexdigest()


def _digests(folder: str, names: Sequence[str], whole: bool, progress: LateBar) -> list[str]:
    """The hash of each of these files of a folder: remembered ones, else what is read now."""
    kind = f"contents-{'whole' if whole else 'parts'}"
    looked = indexes.now()
    states = indexes.states_of(folder, names)
    known = indexes.load(folder, kind)
    rows = known.rows(names, states)
    digests = [known.texts[row] if row >= 0 else "" for row in rows.tolist()]
    unread = np.flatnonzero(rows < 0).tolist()
    progress.add(len(names) - len(unread))
    new = read_all(
        lambda i: _digest(f"{folder}/{names[i]}", whole),
        unread,
        threads=default_threads(),
        progress=progress,
        always=bool(unread) and states[unread, 0].mean() > _LONG,
    )
    for i, digest in zip(unread, new, strict=True):
        digests[i] = digest
    _remember(folder, kind, [names[i] for i in unread], states[unread], new, looked)
    return digests


def _remember(
    folder: str, kind: str, names: Sequence[str], states: Numbers, digests: Sequence[str], looked: float
) -> None:
    """Keep hashes of files that were left alone before they were read, and meanwhile."""
    same = indexes.settled(states, looked) & (indexes.states_of(folder, names) == states).all(1)
    if same.any():
        fresh = Index(list(names), states, np.ones((len(names), 3), np.int64), list(digests))
        there = frozenset(entry.name for entry in os.scandir(folder))
        indexes.add(folder, fresh.only(np.flatnonzero(same).tolist()), there, kind)


def _digest(path: str, whole: bool) -> str:
    """The hash of a file's length and bytes, or of those of three blocks."""
    try:
        with Path(path).open("rb", buffering=0) as file:
            length = os.fstat(file.fileno()).st_size
            digest = hashlib.blake2b(length.to_bytes(8, "little"), digest_size=16)
            if whole or length <= 3 * _BLOCK:
                while data := file.read(1 << 20):
                    digest.update(data)
            else:
                for start in (0, (length - _BLOCK) // 2, length - _BLOCK):
                    file.seek(start)
                    digest.update(file.read(_BLOCK))
    except OSError as error:
        raise UserError.single(path, f"can't be read any more: {error.strerror or error}") from None
    return digest.hexdigest()
