"""The header of a `.safetensors` file: names, shapes and places of its tensors, checked against the file's size.

Torch-free, so that a dry run can look at a model. Tensors themselves are read by `models.tensors`.
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.errors import UserError

BYTES_OF = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
}
_MAX_HEADER = 100_000_000
_AGAIN = "download or copy it again"


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: safetensors' name of its dtype, shape, and its bytes [start, end) in the file.

    `stride`, in values, is of tensors that pickles hold in another order than row after row.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    stride: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Header:
    """What a file says of itself."""

    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor; () where there is none of this name."""
        entry = self.entries.get(name)
        return entry.shape if entry else ()

    def any(self, *prefixes: str) -> bool:
        """Does any tensor's name start with one of these?"""
        return any(name.startswith(prefixes) for name in self.entries)

    def first(self, *names: str) -> tuple[int, ...]:
        """The shape of the first of these tensors that is there; () where none is."""
        return next((self.entries[name].shape for name in names if name in self.entries), ())


def read_header(path: Path, where: str | None = None) -> Header:
    """Read and check a header; nothing behind it is read.

    Args:
        where: what an error names as the place, the path itself unless told.

    Raises:
        UserError: not a safetensors file, damaged, or shorter or longer than its header says.
    """
    place = where or str(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(9)
            if len(start) < 8:
                raise UserError.single(place, f"the file holds only {size} bytes, it is empty or truncated", _AGAIN)
            (length,) = struct.unpack_from("<Q", start)
            if length > min(_MAX_HEADER, size - 8):
                raise UserError.single(place, _not_safetensors(start, length, size), _AGAIN)
            file.seek(8)
            raw = file.read(length)
    except IsADirectoryError as error:
        raise UserError.single(place, "is a folder", "name a file in it") from error
    except OSError as error:
        raise UserError.single(place, f"can't be read ({error.strerror})") from error
    try:
        table = json.loads(raw, object_pairs_hook=_each_once)
        entries = {name: _entry(values, 8 + length) for name, values in table.items() if name != "__metadata__"}
        metadata = {str(key): str(value) for key, value in (table.get("__metadata__") or {}).items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError.single(place, "is not a safetensors file, or its header is damaged", _AGAIN) from error
    _check_places(entries, 8 + length, size, place)
    return Header(path, entries, metadata)


def _not_safetensors(start: bytes, length: int, size: int) -> str:
    if start.startswith((b"PK\x03\x04", b"\x80")) and start[8:] != b"{":
        return "is a PyTorch pickle with the ending of a safetensors file; rename it to .ckpt"
    if start.startswith((b"version ", b"<!", b"<html")):
        return "is a text file (a git-lfs pointer or a web page), not a safetensors file"
    if length <= _MAX_HEADER:
        return f"is truncated: its header alone should take {length:,} bytes, the file has {size:,}"
    return "is not a safetensors file"


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys all differ."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found


def _entry(values: dict[str, Any], data_start: int) -> Entry:
    dtype, shape, (begin, end) = values["dtype"], tuple(values["shape"]), values["data_offsets"]
    if not isinstance(dtype, str) or not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise TypeError("wrong type")
    if end < begin or (dtype in BYTES_OF and end - begin != BYTES_OF[dtype] * math.prod(shape)):
        raise ValueError("offsets don't fit the shape")
    return Entry(dtype, shape, data_start + begin, data_start + end)


def _check_places(entries: dict[str, Entry], data_start: int, size: int, place: str) -> None:
    """The tensors follow each other without overlaps and gaps, from the header to the file's end."""
    end = max((entry.end for entry in entries.values()), default=data_start)
    if size < end:
        raise UserError.single(place, f"is truncated: {size:,} bytes of {end:,} are there", _AGAIN)
    if size > end:
        raise UserError.single(place, f"is damaged: {size:,} bytes where its header tells of {end:,}", _AGAIN)
    last = data_start
    for name, entry in sorted(entries.items(), key=lambda pair: (pair[1].start, pair[1].end)):
        if entry.start != last:
            what = "overlaps another tensor" if entry.start < last else "stands behind a gap"
            raise UserError.single(place, f"is damaged: by its header, the tensor {name} {what}", _AGAIN)
        last = entry.end
