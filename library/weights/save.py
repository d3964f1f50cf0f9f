"""Saving a LoRA in the formats that other programs load."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from library.weights.check import check_file
from library.weights.files import save_pickle, save_safetensors
from library.weights.hashes import lora_hashes


def save_lora(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a LoRA file, whole or not at all. `.safetensors` gets `metadata` and both hashes; other endings neither.

    The new file is read back before it replaces an older one: BadWeightsError if it isn't what was meant to be saved
    (keys, shapes, finite numbers), and then the older file stays.
    """

    def verify(written: Path) -> None:
        check_file(written, {name: tensor.shape for name, tensor in tensors.items()})

    if path.suffix != ".safetensors":
        save_pickle(tensors, path, verify)
        return
    hashes = lora_hashes(tensors, metadata)
    complete = {**metadata, "sshs_model_hash": hashes.model, "sshs_legacy_hash": hashes.legacy}
    save_safetensors(tensors, path, complete, verify)
