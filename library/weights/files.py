"""Reading and writing weight files. A write is all or nothing: a crash leaves the old file, never half of a new one.

The `.safetensors` bytes are laid out here rather than by the library, which writes metadata in random order: the same
tensors and metadata give the same file, byte for byte, and the hashes need no second copy in memory.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from library.errors import UserError

# Names in the header, in the order in which the safetensors library groups tensors (by alignment, greatest first).
_DTYPES: dict[torch.dtype, str] = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ORDER = {dtype: place for place, dtype in enumerate(_DTYPES)}


@contextmanager
def atomic_write(path: Path, verify: Callable[[Path], None] | None = None) -> Iterator[BinaryIO]:
    """Open a file that becomes `path` only if the block, and `verify` of the written file, end without an error.

    The bytes go to a temporary name in the same folder, then to the disk (file and folder are synced). On an error the
    temporary file is deleted and an older `path` stays as it was. A link stays one: what it leads to is replaced.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=f".tmp{path.suffix}", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if verify is not None:
            verify(temporary)
        open_to_others(temporary)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    _sync_folder(path.parent)


def open_to_others(temporary: Path) -> None:
    """Give a file the permissions that the user's umask gives to new files; those of temporary ones are narrower.

    Where a file system has no such permissions, the file stays as it is.
    """
    mask = os.umask(0)
    os.umask(mask)
    with suppress(OSError):
        temporary.chmod(0o666 & ~mask)


def _sync_folder(folder: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def tensor_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Keys in the order in which a `.safetensors` file holds their data: widest dtype first, then by name."""
    return sorted(tensors, key=lambda name: (_ORDER[tensors[name].dtype], name))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's numbers, little-endian and row-major, without a copy if it lies so on the CPU already."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")


def safetensors_header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON header of a `.safetensors` file, padded to 8 bytes; metadata stands in its own order."""
    ordered = ((name, tensors[name]) for name in tensor_order(tensors))
    return header_of(((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in ordered), metadata)


def header_of(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The same for tensors that aren't there yet: names, dtypes and shapes in the order of their data."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "backslashreplace")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def save_safetensors(
    tensors: Mapping[str, Tensor],
    path: Path,
    metadata: Mapping[str, str],
    verify: Callable[[Path], None] | None = None,
) -> None:
    """Write `tensors` with `metadata` (all text) as one `.safetensors` file, whole or not at all."""
    with atomic_write(path, verify) as file:
        file.write(safetensors_header(tensors, metadata))
        for name in tensor_order(tensors):
            file.write(tensor_bytes(tensors[name]))


def save_pickle(tensors: Mapping[str, Tensor], path: Path, verify: Callable[[Path], None] | None = None) -> None:
    """Write `tensors` as torch does (`.ckpt`, `.pt`): without metadata, whole or not at all."""
    with atomic_write(path, verify) as file:
        torch.save(dict(tensors), file)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a `.safetensors` file, or of a torch file (loaded without running code), on the CPU.

    Raises UserError if there is no such file, or it can't be read as what its name says.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError.single(str(path), "is a folder", "name a file in it")
    if not path.is_file():
        raise UserError.single(str(path), "there is no such weight file")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                names = tuple(file.keys())
                return {name: file.get_tensor(name) for name in names}
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError.single(str(path), f"can't be read as weights ({reason})", "it may be damaged") from error
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    found = {n: v for n, v in loaded.items() if isinstance(v, Tensor)} if isinstance(loaded, dict) else {}
    if not found:
        raise UserError.single(str(path), "does not hold a table of tensors")
    return found


def read_metadata(path: Path) -> dict[str, str]:
    """The text metadata of a `.safetensors` file (empty if it has none)."""
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})
