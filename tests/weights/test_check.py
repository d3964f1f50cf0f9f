"""Saving and reading back: what may not be kept is refused before it replaces a good file."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from library.weights.check import BadWeightsError, check_file
from library.weights.files import read_metadata, read_tensors
from library.weights.save import save_lora


def tensors(up: float = 1.0) -> dict[str, torch.Tensor]:
    """Two modules, one of each part; the U-Net's up-factor is `up`."""
    found = {}
    for name, value in (("lora_unet_a", up), ("lora_te_b", 1.0)):
        found[f"{name}.alpha"] = torch.tensor(1.0)
        found[f"{name}.lora_down.weight"] = torch.ones(2, 3)
        found[f"{name}.lora_up.weight"] = torch.full((4, 2), value)
    return found


def test_a_saved_file_passes_and_carries_metadata_and_hashes(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_lora(tensors(), path, {"ss_steps": "1", "modelspec.title": "t"})
    assert check_file(path, tensors().keys(), trained_parts=("unet", "text_encoder")) == []
    metadata = read_metadata(path)
    file = save(tensors(), {"ss_steps": "1"})
    data = file[8 + int.from_bytes(file[:8], "little") :]
    assert metadata["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    assert {"ss_steps", "modelspec.title", "sshs_legacy_hash"} <= metadata.keys()


@pytest.mark.parametrize("ending", [".safetensors", ".ckpt", ".pt"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_never_replace_a_good_file(tmp_path: Path, ending: str, bad: float) -> None:
    path = tmp_path / f"a{ending}"
    save_lora(tensors(), path, {})
    before = path.read_bytes()
    with pytest.raises(BadWeightsError, match=r"1 of 6 tensors are not finite, e.g. lora_unet_a.lora_up"):
        save_lora(tensors(bad), path, {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    assert read_tensors(path).keys() == tensors().keys()


def test_wrong_keys_and_shapes_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(tensors(), path)
    with pytest.raises(BadWeightsError, match="1 keys are missing"):
        check_file(path, [*tensors(), "extra"])
    with pytest.raises(BadWeightsError, match="should not be there"):
        check_file(path, tensors().keys() - {"lora_unet_a.alpha"})
    with pytest.raises(BadWeightsError, match="shape"):
        check_file(path, dict.fromkeys(tensors(), (1,)))
    assert check_file(path, {name: tensor.shape for name, tensor in tensors().items()}) == []


def test_a_trained_part_that_is_still_zero_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(tensors(up=0.0), path)
    (warning,) = check_file(path, tensors().keys(), trained_parts=("unet", "text_encoder"))
    assert "U-Net" in warning and warning.startswith(f"{path}: ")
    (warning,) = check_file(path, None, trained_parts=("unet",), called="b.safetensors")
    assert warning.startswith("b.safetensors: ") and str(path) not in warning
    with pytest.raises(BadWeightsError, match=r"^b.safetensors: "):
        check_file(path, [], called="b.safetensors")
    assert check_file(path, tensors().keys(), trained_parts=("text_encoder",)) == []
