"""Hashes against independent computations on the bytes of real files."""

import hashlib
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from library.weights.hashes import lora_hashes
from library.weights.model_hash import IS_A_FOLDER, BackgroundHashes, legacy_hash, sha256


@pytest.mark.parametrize("rows", [1, 3000, 40000])
def test_lora_hashes_are_those_of_the_serialised_file(rows: int) -> None:
    """The three sizes end before, within and after the window that the short hash reads."""
    generator = torch.Generator().manual_seed(0)
    tensors = {f"m{number}.lora_up.weight": torch.randn(rows, 8, generator=generator) for number in range(3)}
    tensors |= {"m0.alpha": torch.tensor(1.0), "half": torch.ones(5, dtype=torch.float16)}
    file = save(tensors, {"ss_steps": "é 7"})
    data = file[8 + int.from_bytes(file[:8], "little") :]
    found = lora_hashes(tensors, {"ss_steps": "é 7", "modelspec.title": "not hashed"})
    assert found.model == hashlib.sha256(data).hexdigest()
    assert found.legacy == hashlib.sha256(file[0x100000 : 0x100000 + 0x10000]).hexdigest()[:8]


def test_metadata_does_not_change_the_model_hash() -> None:
    tensors = {"a": torch.ones(4)}
    assert lora_hashes(tensors, {"ss_a": "1"}).model == lora_hashes(tensors, {"ss_a": "1000"}).model


def test_hashes_of_a_model_file(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    os.utime(path, (1_000_000, 1_000_000))
    seen: list[int] = []
    assert sha256(path, seen.append) == hashlib.sha256(data).hexdigest()
    assert sum(seen) == len(data)
    assert legacy_hash(path) == hashlib.sha256(data[0x100000:][:0x10000]).hexdigest()[:8]
    assert sha256(path, seen.append) == hashlib.sha256(data).hexdigest()
    assert sum(seen) == len(data), "an unchanged file is read once"
    path.write_bytes(data[:-1])
    assert sha256(path) == hashlib.sha256(data[:-1]).hexdigest()


def test_a_short_file_has_the_hash_of_nothing_and_a_folder_none(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"abc")
    assert legacy_hash(tmp_path / "short") == hashlib.sha256(b"").hexdigest()[:8]
    assert legacy_hash(tmp_path) == sha256(tmp_path) == IS_A_FOLDER


def test_hashes_in_the_background_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(range(256)) * 5000)
    hashes = BackgroundHashes(path, path).result()
    assert hashes.base == hashes.vae == (legacy_hash(path), sha256(path))
    assert BackgroundHashes(path).result().vae is None
