"""The hash by which a resumed run knows its data again: all that decides what is trained, and no place where it lies.

Settings are taken from the specs field by field, except those named here, so that a new one can't be forgotten.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from typing import Any

import numpy as np

from library.data.buckets import Fit
from library.data.records import ImageRecord
from library.options.specs import DatasetSpec, SubsetSpec

VERSION = 2
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
