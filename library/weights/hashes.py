"""Hashes by which other programs know a LoRA; those of a base model are in model_hash."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from library.weights.files import safetensors_header, tensor_bytes, tensor_order
from library.weights.model_hash import LEGACY_LENGTH, LEGACY_START


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
        low = max(LEGACY_START - position, 0)
        high = max(LEGACY_START + LEGACY_LENGTH - position, 0)
        window.update(data[low:high])

    feed_window(header)
    position = len(header)
    for name in tensor_order(tensors):
        data = tensor_bytes(tensors[name])
        whole.update(data)
        feed_window(data)
        position += len(data)
    return LoraHashes(whole.hexdigest(), window.hexdigest()[:8])
