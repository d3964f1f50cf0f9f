"""A loss or gradient that is no number stops the run, names the pictures, and leaves the last good files."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.pictures import make_pictures


def train(model: Path, folder: Path, *more: str) -> int:
    from train_network import main

    make_pictures(folder / "pictures", count=2)
    return main(
        [
            *("--pretrained_model_name_or_path", str(model), "--train_data_dir", str(folder / "pictures")),
            *("--output_dir", str(folder / "output"), "--output_name", "x", "--resolution", "64", "--seed", "1"),
            *("--caption_extension", ".txt", "--max_train_steps", "4", "--save_every_n_steps", "1", *more),
        ]
    )


def test_a_loss_that_is_no_number(tiny_sd1: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert train(tiny_sd1, tmp_path, "--network_module", "networks.lora", "--learning_rate", "1e30") == 1
    said = capfd.readouterr().err
    assert "the loss of step 2" in said or "the gradient of step 2" in said
    assert "picture0" in said and "at timestep" in said
    assert (tmp_path / "output/x-step00000001.safetensors").is_file()
    assert not (tmp_path / "output/x.safetensors").exists()


def test_a_gradient_that_is_no_number(tiny_sd1: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert train(tiny_sd1, tmp_path, "--network_module", "tests.exploding_lora") == 1
    assert "the gradient of step 1 is nan" in capfd.readouterr().err
    assert not list((tmp_path / "output").glob("*"))


@pytest.mark.parametrize("more", [(), ("--cache_latents",)])
def test_a_vae_that_overflows_is_told_with_the_picture(
    more: tuple[str, ...], tiny_sd1: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_sd1, folder)
    weights = folder / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["encoder.conv_in.weight"] *= 1e38
    tensors["encoder.conv_out.weight"] *= 1e38
    save_file(tensors, weights)
    assert train(folder, tmp_path, "--network_module", "networks.lora", *more) == 2
    said = capfd.readouterr().err
    assert "the VAE gives NaN or infinite latents for this picture" in said and "picture0" in said
    assert "--vae" in said and "no_half_vae" not in said
