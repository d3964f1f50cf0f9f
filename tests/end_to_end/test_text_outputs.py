"""Text encoder outputs: kept in memory or in files, never stale, and without influence on what is trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.pictures import make_pictures

FAMILIES = ("sd1", "sd2", "sdxl")
DISK = "--cache_text_encoder_outputs_to_disk"


def train(model: Path, place: Path, name: str, *more: str) -> dict[str, np.ndarray]:
    from train_network import main

    code = main(
        [
            *("--pretrained_model_name_or_path", str(model), "--train_data_dir", str(place / "pictures")),
            *("--output_dir", str(place / "output"), "--output_name", name, "--network_module", "networks.lora"),
            *("--resolution", "64", "--caption_extension", ".txt", "--seed", "3", "--network_train_unet_only"),
            *(
                "--network_dim",
                "2",
                "--learning_rate",
                "1e-2",
                "--max_train_steps",
                "4",
                "--train_batch_size",
                "2",
                *more,
            ),
        ]
    )
    assert code == 0
    return load_file(place / f"output/{name}.safetensors")


def outputs(place: Path) -> dict[str, int]:
    """The files of text outputs, and when each was written."""
    return {path.name: path.stat().st_mtime_ns for path in sorted((place / "pictures").rglob("*_te_outputs.npz"))}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_lora_with_and_without(
    family: str, tiny_models: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_pictures(tmp_path / "pictures", count=3)
    model = tiny_models(family)
    plain = train(model, tmp_path, "plain")
    for name, flag in (("memory", "--cache_text_encoder_outputs"), ("disk", DISK), ("again", DISK)):
        capsys.readouterr()
        other = train(model, tmp_path, name, flag)
        assert plain.keys() == other.keys()
        assert all(np.array_equal(plain[key], other[key]) for key in plain), name
        assert "the text encoders are released" in capsys.readouterr().err
    assert len(outputs(tmp_path)) == 3
    with np.load(next((tmp_path / "pictures").rglob("*_te_outputs.npz"))) as file:
        keys = {"hidden_state1", "lorasmith"} | ({"hidden_state2", "pool2"} if family == "sdxl" else set())
        assert set(file.files) == keys
        assert file["hidden_state1"].dtype == np.float32 and file["hidden_state1"].shape[0] == 77


def test_what_changed_is_made_again_and_nothing_else(tiny_sdxl: Path, tmp_path: Path) -> None:
    make_pictures(tmp_path / "pictures", count=3)
    train(tiny_sdxl, tmp_path, "first", DISK)
    first = outputs(tmp_path)
    train(tiny_sdxl, tmp_path, "second", DISK)
    assert outputs(tmp_path) == first

    caption = sorted((tmp_path / "pictures").rglob("*.txt"))[1]
    caption.write_text("something else altogether")
    train(tiny_sdxl, tmp_path, "caption", DISK)
    second = outputs(tmp_path)
    assert [name for name in first if second[name] != first[name]] == [f"{caption.stem}_te_outputs.npz"]

    train(tiny_sdxl, tmp_path, "length", DISK, "--max_token_length", "150")
    third = outputs(tmp_path)
    assert all(third[name] != second[name] for name in second)
    train(tiny_sdxl, tmp_path, "layer", DISK, "--max_token_length", "150", "--clip_skip", "3")
    assert all(outputs(tmp_path)[name] != third[name] for name in third)


def test_files_of_sd_scripts_are_never_used(tiny_sdxl: Path, tmp_path: Path) -> None:
    """Theirs say neither of what caption nor by which encoder they were made."""
    make_pictures(tmp_path / "pictures", count=2)
    plain = train(tiny_sdxl, tmp_path, "plain")
    for picture in (tmp_path / "pictures").rglob("*.txt"):
        arrays = {"hidden_state1": (77, 32), "hidden_state2": (77, 64), "pool2": (48,)}
        path = picture.with_name(f"{picture.stem}_te_outputs.npz")
        blank: dict[str, Any] = {name: np.zeros(shape, np.float32) for name, shape in arrays.items()}
        np.savez(path, **blank)
    cached = train(tiny_sdxl, tmp_path, "cached", DISK)
    assert all(np.array_equal(plain[key], cached[key]) for key in plain)


def test_captions_that_vary_go_through_the_memo(
    tiny_sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_pictures(tmp_path / "pictures", count=2)
    for caption in (tmp_path / "pictures").rglob("*.txt"):
        caption.write_text("one, two, three, four, five")
    plain = train(tiny_sd1, tmp_path, "plain", "--shuffle_caption")
    small = train(tiny_sd1, tmp_path, "small", "--shuffle_caption", "--text_memo_mb", "0", DISK)
    assert all(np.array_equal(plain[key], small[key]) for key in plain)
    assert "vary" in capsys.readouterr().err
    assert not outputs(tmp_path)


def test_weights_in_captions_change_the_training(tiny_sd1: Path, tmp_path: Path) -> None:
    make_pictures(tmp_path / "pictures", count=2)
    for caption in (tmp_path / "pictures").rglob("*.txt"):
        caption.write_text("a (red:1.5) square")
    plain = train(tiny_sd1, tmp_path, "plain")
    weighted = train(tiny_sd1, tmp_path, "weighted", "--weighted_captions")
    assert any(not np.array_equal(plain[key], weighted[key]) for key in plain)


def test_exact_crops_change_the_training_of_sdxl_alone(tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    make_pictures(tmp_path / "pictures", count=2, sizes=[(120, 64), (64, 120)])
    for family in ("sd1", "sdxl"):
        legacy = train(tiny_models(family), tmp_path, f"{family}-legacy")
        exact = train(tiny_models(family), tmp_path, f"{family}-exact", "--exact_crop_conditioning")
        same = all(np.array_equal(legacy[key], exact[key]) for key in legacy)
        assert same == (family == "sd1")
