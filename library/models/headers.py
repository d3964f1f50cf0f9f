"""The header of a `.safetensors` file: names, shapes and places of its tensors, checked against the file's size.

Torch-free, so that a dry run can look at a model. Tensors themselves are read by `models.tensors`.
"""

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

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
    """One tensor of a file: safetensors' name of its dtype, shape, and its bytes [start, end) in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


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
            start = file.read(8)
            if len(start) < 8:
                raise UserError.single(place, f"the file holds only {size} bytes, it is empty or truncated", _AGAIN)
            (length,) = struct.unpack("<Q", start)
            if length > min(_MAX_HEADER, size - 8):
                raise UserError.single(place, _not_safetensors(start, length, size), _AGAIN)
            raw = file.read(length)
    except OSError as error:
        raise UserError.single(place, f"can't be read ({error.strerror})") from error
    try:
        table = json.loads(raw)
        entries = {name: _entry(values, 8 + length) for name, values in table.items() if name != "__metadata__"}
        metadata = {str(key): str(value) for key, value in (table.get("__metadata__") or {}).items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError.single(place, "is not a safetensors file, or its header is damaged", _AGAIN) from error
    _check_size(entries.values(), 8 + length, size, place)
    return Header(path, entries, metadata)


def _not_safetensors(start: bytes, length: int, size: int) -> str:
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return "is a PyTorch pickle with the wrong ending, not a safetensors file"
    if start.startswith((b"version ", b"<!", b"<html")):
        return "is a text file (a git-lfs pointer or a web page), not a safetensors file"
    if length <= _MAX_HEADER:
        return f"is truncated: its header alone should take {length:,} bytes, the file has {size:,}"
    return "is not a safetensors file"


def _entry(values: dict[str, object], data_start: int) -> Entry:
    dtype, shape, offsets = values["dtype"], values["shape"], values["data_offsets"]
    if not (isinstance(dtype, str) and isinstance(shape, list) and isinstance(offsets, list)):
        raise TypeError("wrong type")
    begin, end = (int(offset) for offset in offsets)
    sizes = tuple(int(length) for length in shape)
    if begin < 0 or end < begin or (dtype in BYTES_OF and end - begin != BYTES_OF[dtype] * math.prod(sizes)):
        raise ValueError("offsets don't fit the shape")
    return Entry(dtype, sizes, data_start + begin, data_start + end)


def _check_size(entries: Iterable[Entry], data_start: int, size: int, place: str) -> None:
    end = max((entry.end for entry in entries), default=data_start)
    if size < end:
        raise UserError.single(place, f"is truncated: {size:,} bytes of {end:,} are there", _AGAIN)
    if size > end:
        raise UserError.single(place, f"is damaged: {size:,} bytes where its header tells of {end:,}", _AGAIN)
