"""Files of arrays (`.npz`): read fast and by many threads at once, written whole or not at all.

Uncompressed members with plain arrays of this machine's byte order, which is what every cache holds, are read by
offset. Whatever else a file may hold is left to numpy, which never gets to unpickle anything.
"""

import contextlib
import io
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    RuntimeError,
    MemoryError,
    OverflowError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
"""What reading a damaged file raises."""
_PARSING = Lock()
"""numpy reads the heads of arrays with `ast`, which fails in several threads before Python 3.11.8 and 3.12.2."""
_END = struct.Struct("<4s4H2LH")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_TAIL, _HEAD = 2048, 512
_SUFFIX = ".npy"
_MAGIC = b"\x93NUMPY\1\0"
_PLAIN = re.compile(
    rb"\{'descr': '([<|][biufcSU]\d+)', 'fortran_order': False, 'shape': \((|\d+,|\d+(?:, \d+)+)\), \} *\n"
)
State = tuple[int, int, int]
"""Size in bytes, time of the last change in ns, and inode: one of them is another when a file was replaced."""
_Member = tuple[int, int, int]
"""Offset, length and checksum."""


class ChangedError(OSError):
    """A file isn't the one that was judged."""


class _OtherKindError(Exception):
    """The file isn't laid out as the fast way expects. It may be a good one all the same."""


def read(path: Path, *names: str, checked: bool = False, state: State | None = None) -> dict[str, NDArray[Any]]:
    """Those of the named entries that a file has; all of them if none is named. The arrays may be changed.

    Args:
        checked: compare each entry with its checksum, where the fast way wouldn't.
        state: what the file must still be.

    Raises:
        ChangedError: it has another state.
        OSError and others of UNREADABLE: there is no such file, or it is damaged.
    """
    with path.open("rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        if state is not None and _state(status) != state:
            raise ChangedError("changed since it was judged")
        with contextlib.suppress(_OtherKindError, struct.error):
            members = _members(file, status.st_size)
            wanted = [name for name in names if name in members] if names else list(members)
            return {name: _array(file, name, members[name], checked) for name in wanted}
        file.seek(0)
        return _read_slowly(file, names)


def state_of(path: Path) -> State | None:
    """The state of a file; None if it can't be looked at."""
    try:
        return _state(path.stat())
    except OSError:
        return None


def _state(status: os.stat_result) -> State:
    return status.st_size, status.st_mtime_ns, status.st_ino


def _read_slowly(file: io.FileIO, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """The entries of any file that numpy reads."""
    with _PARSING, np.load(file, allow_pickle=False) as loaded:
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise ValueError("holds a single array")
        found = {name: loaded[name] for name in names or loaded.files if name in loaded.files}
    if not all(isinstance(array, np.ndarray) for array in found.values()):
        raise ValueError("holds something that is no array")
    return found


def write(path: Path, arrays: Mapping[str, NDArray[Any]]) -> State:
    """Write arrays, uncompressed, and flush them to the disk. Not atomic: give it a temporary name.

    Returns the state of the file, which it keeps when it is renamed.

    Raises:
        OSError: the file can't be written; nothing is left of it.
    """
    packed = io.BytesIO()
    np.savez(packed, allow_pickle=False, **dict(arrays))
    try:
        with path.open("wb", buffering=0) as file:
            rest = packed.getbuffer()
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
            return _state(os.fstat(file.fileno()))
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _members(file: io.FileIO, length: int) -> dict[str, _Member]:
    """The entries by name. A later entry of the same name counts."""
    start = max(0, length - _TAIL)
    tail = _at(file, start, length - start)
    mark, disk, first_disk, here, count, size, offset, remark = _END.unpack_from(tail, len(tail) - _END.size)
    if mark != b"PK\5\6" or disk or first_disk or remark or here != count or offset + size + _END.size != length:
        raise _OtherKindError
    table = tail[offset - start : -_END.size] if offset >= start else _at(file, offset, size)
    found: dict[str, _Member] = {}
    position = 0
    for _ in range(count):
        mark, _, _, flags, method, _, _, checksum, packed, plain, *lengths, _, _, _, place = _CENTRAL.unpack_from(
            table, position
        )
        position += _CENTRAL.size
        name = table[position : position + lengths[0]]
        position += sum(lengths)
        inside = packed == plain and place + plain < length
        if (
            mark != b"PK\1\2"
            or flags
            or method
            or not inside
            or not name.isascii()
            or not name.endswith(_SUFFIX.encode())
        ):
            raise _OtherKindError
        found[name[: -len(_SUFFIX)].decode("ascii")] = (place, plain, checksum)
    if position != size:
        raise _OtherKindError
    return found


def _array(file: io.FileIO, name: str, member: _Member, checked: bool) -> NDArray[Any]:
    place, length, checksum = member
    head = _at(file, place, _HEAD)
    mark, _, flags, method, *_, name_length, extra = _LOCAL.unpack_from(head)
    start = _LOCAL.size + name_length + extra
    named = head[_LOCAL.size : _LOCAL.size + name_length] == (name + _SUFFIX).encode()
    if mark != b"PK\3\4" or flags or method or not named or head[start : start + 8] != _MAGIC:
        raise _OtherKindError
    begin = start + 10 + int.from_bytes(head[start + 8 : start + 10], "little")
    dtype, shape, size = _layout(head[start + 10 : begin])
    if begin > len(head) or size != length - (begin - start):
        raise _OtherKindError
    array = np.empty(shape, dtype)
    raw = array.reshape(-1).view(np.uint8).data
    _fill(file, place + begin, raw)
    if checked and zlib.crc32(raw, zlib.crc32(head[start:begin])) != checksum:
        raise zipfile.BadZipFile(f"{name}: its checksum is wrong")
    return array


@lru_cache(maxsize=1024)
def _layout(text: bytes) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    """What the head of an array says: kind, shape, and length in bytes."""
    match = _PLAIN.fullmatch(text)
    if match is None:
        raise _OtherKindError
    try:
        dtype = np.dtype(match[1].decode())
    except TypeError as error:
        raise _OtherKindError from error
    shape = tuple(int(side) for side in match[2].split(b",") if side)
    if not dtype.isnative or not dtype.itemsize:
        raise _OtherKindError
    return dtype, shape, math.prod(shape) * dtype.itemsize


def _at(file: io.FileIO, offset: int, length: int) -> bytes:
    """Up to `length` bytes from `offset` on."""
    file.seek(offset)
    return file.read(length)


def _fill(file: io.FileIO, offset: int, target: memoryview) -> None:
    file.seek(offset)
    while target:
        count = file.readinto(target)
        if not count:
            raise EOFError("the file ends too early")
        target = target[count:]
