"""Hashes by which other programs know a base model or a LoRA."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from library.weights.files import safetensors_header, tensor_bytes, tensor_order

IS_A_FOLDER = "IsADirectory"
_CHUNK = 1 << 22
_LEGACY_START = 0x100000
_LEGACY_LENGTH = 0x10000
_sha256_memo: dict[tuple[str, int, int], str] = {}


@dataclass(frozen=True)
class LoraHashes:
    """`sshs_model_hash` (64 hex digits) and `sshs_legacy_hash` (8) of a LoRA file's metadata."""

    model: str
    legacy: str


def lora_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> LoraHashes:
    """Hashes of the `.safetensors` file that holds `tensors` and only the `ss_` part of `metadata`.

    The first is SHA-256 of all that follows the header, so metadata doesn't change it. The second is SHA-256 of the
    64 KiB that stand 1 MiB into the file, header included, or of what there is of them.
    """
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    header = safetensors_header(tensors, training)
    whole, window = hashlib.sha256(), hashlib.sha256()
    position = 0

    def feed_window(data: bytes | memoryview) -> None:
        low = max(_LEGACY_START - position, 0)
        high = max(_LEGACY_START + _LEGACY_LENGTH - position, 0)
        window.update(data[low:high])

    feed_window(header)
    position = len(header)
    for name in tensor_order(tensors):
        data = tensor_bytes(tensors[name])
        whole.update(data)
        feed_window(data)
        position += len(data)
    return LoraHashes(whole.hexdigest(), window.hexdigest()[:8])


def legacy_hash(path: Path) -> str:
    """The 8-digit hash of a model file: SHA-256 of the 64 KiB that stand 1 MiB into it. A folder has none."""
    if path.is_dir():
        return IS_A_FOLDER
    with path.open("rb") as file:
        file.seek(_LEGACY_START)
        return hashlib.sha256(file.read(_LEGACY_LENGTH)).hexdigest()[:8]


def sha256(path: Path, advance: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a whole model file, 64 hex digits; a folder has none. `advance` is told of every few MB read.

    A file that has not changed (size, time of change) is read once a process.
    """
    if path.is_dir():
        return IS_A_FOLDER
    status = path.stat()
    known = (str(path.resolve()), status.st_size, status.st_mtime_ns)
    if known not in _sha256_memo:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                if advance is not None:
                    advance(len(chunk))
        _sha256_memo[known] = digest.hexdigest()
    return _sha256_memo[known]
