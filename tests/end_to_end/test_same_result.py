"""The same seed gives the same tensors: twice, for any number of loader workers, cached to disk or not."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.pictures import make_pictures


def train(model: Path, folder: Path, name: str, *more: str) -> dict[str, np.ndarray]:
    from train_network import main

    code = main(
        [
            *("--pretrained_model_name_or_path", str(model), "--train_data_dir", str(folder / "pictures")),
            *("--output_dir", str(folder / "output"), "--output_name", name, "--network_module", "networks.lora"),
            *("--resolution", "64", "--enable_bucket", "--min_bucket_reso", "32", "--bucket_reso_steps", "16"),
            *("--caption_extension", ".txt", "--shuffle_caption", "--flip_aug", "--random_crop"),
            *("--train_batch_size", "2", "--max_train_steps", "6", "--learning_rate", "1e-2", "--seed", "11"),
            *("--network_dropout", "0.2", "--noise_offset", "0.05", *more),
        ]
    )
    assert code == 0
    return load_file(folder / f"output/{name}.safetensors")


def test_workers_and_repetition_change_nothing(tiny_sd1: Path, tmp_path: Path) -> None:
    make_pictures(tmp_path / "pictures", count=6)
    first = train(tiny_sd1, tmp_path, "first", "--max_data_loader_n_workers", "0")
    for name, workers in (("again", "0"), ("threads", "4")):
        other = train(tiny_sd1, tmp_path, name, "--max_data_loader_n_workers", workers)
        assert first.keys() == other.keys()
        assert all(np.array_equal(first[key], other[key]) for key in first)
    other_seed = train(tiny_sd1, tmp_path, "seed", "--seed", "12")
    assert not all(np.array_equal(first[key], other_seed[key]) for key in first)


def test_a_part_without_learning_rate_is_not_in_the_file(tiny_sd1: Path, tmp_path: Path) -> None:
    make_pictures(tmp_path / "pictures", count=2)
    tensors = train(tiny_sd1, tmp_path, "unet", "--text_encoder_lr", "0")
    assert tensors and all(key.startswith("lora_unet_") for key in tensors)
    tensors = train(tiny_sd1, tmp_path, "text", "--network_train_text_encoder_only")
    assert tensors and all(key.startswith("lora_te_") for key in tensors)


def test_nothing_to_train_is_refused(tiny_sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from train_network import main

    make_pictures(tmp_path / "pictures", count=2)
    arguments = [
        *("--pretrained_model_name_or_path", str(tiny_sd1), "--train_data_dir", str(tmp_path / "pictures")),
        *("--output_dir", str(tmp_path / "output"), "--network_module", "networks.lora", "--resolution", "64"),
        *("--learning_rate", "0", "--caption_extension", ".txt"),
    ]
    assert main(arguments) == 2
    assert "nothing" in capsys.readouterr().err
