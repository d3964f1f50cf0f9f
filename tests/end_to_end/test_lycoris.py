"""`--network_module lycoris.kohya` in whole runs: its files have the keys that loaders look for; resume is exact."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.pictures import make_pictures

pytestmark = pytest.mark.xdist_group("lycoris")
FAMILIES = {
    "sd1": {"lora_unet_down_blocks_0_attentions_0", "lora_te_text_model_encoder_layers_0"},
    "sd2": {"lora_unet_down_blocks_0_attentions_0", "lora_te_text_model_encoder_layers_0"},
    "sdxl": {
        "lora_unet_input_blocks_4_1",
        "lora_unet_middle_block_1",
        "lora_te1_text_model_encoder_layers_0",
        "lora_te2_text_model_encoder_layers_0",
    },
}


def train(model: Path, place: Path, name: str, *more: str) -> dict[str, np.ndarray]:
    from train_network import main

    code = main(
        [
            *("--pretrained_model_name_or_path", str(model), "--train_data_dir", str(place / "pictures")),
            *("--output_dir", str(place / "output"), "--output_name", name, "--network_module", "lycoris.kohya"),
            *("--resolution", "64", "--caption_extension", ".txt", "--seed", "3", "--network_dim", "2"),
            *("--network_alpha", "1", "--learning_rate", "1e-2", "--max_train_steps", "3", *more),
        ]
    )
    assert code == 0
    return load_file(place / f"output/{name}.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
def test_trains_and_resumes_exactly(family: str, tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    make_pictures(tmp_path / "pictures", count=2)
    model, algo = tiny_models(family), ("--network_args", "algo=lokr", "factor=4")
    states = ("--save_state", "--save_every_n_steps", "2")
    whole = train(model, tmp_path, "whole", *algo, *states)
    for start in FAMILIES[family]:
        assert any(key.startswith(start) for key in whole), start
    prefixes = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
    assert all(key.startswith(prefixes) for key in whole)
    state = tmp_path / "output/whole-step00000002-state"
    resumed = train(model, tmp_path, "resumed", *algo, "--resume", str(state))
    assert whole.keys() == resumed.keys()
    assert all(np.array_equal(whole[key], resumed[key]) for key in whole)


def test_text_encoders_are_left_alone_when_told_so(tiny_sdxl: Path, tmp_path: Path) -> None:
    make_pictures(tmp_path / "pictures", count=2)
    more = ("--network_args", "algo=locon", "conv_dim=2", "--network_train_unet_only", "--cache_text_encoder_outputs")
    tensors = train(tiny_sdxl, tmp_path, "unet", *more)
    assert tensors and all(key.startswith("lora_unet_") for key in tensors)


@pytest.mark.parametrize("algo", ["glora", "full", "dylora block_size=1"])
def test_bf16_with_previews_and_checkpointing(algo: str, tiny_sdxl: Path, tmp_path: Path) -> None:
    """Algorithms that don't follow the frozen model's dtype by themselves."""
    make_pictures(tmp_path / "pictures", count=2)
    (tmp_path / "prompts.txt").write_text("a red shape --s 2 --w 64 --h 64 --d 1\n")
    more = ("--mixed_precision", "bf16", "--gradient_checkpointing", "--sample_every_n_steps", "3")
    tensors = train(
        tiny_sdxl,
        tmp_path,
        "cast",
        "--network_args",
        *f"algo={algo}".split(),
        *more,
        "--sample_prompts",
        str(tmp_path / "prompts.txt"),
    )
    assert tensors and list((tmp_path / "output/sample").glob("cast_0*.png"))


def test_what_the_module_complains_about_is_one_message(
    tiny_sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from train_network import main

    make_pictures(tmp_path / "pictures", count=2)
    start = [
        *("--pretrained_model_name_or_path", str(tiny_sdxl), "--train_data_dir", str(tmp_path / "pictures")),
        *("--output_dir", str(tmp_path / "output"), "--network_module", "lycoris.kohya", "--resolution", "64"),
        *("--caption_extension", ".txt"),
    ]
    assert main([*start, "--network_dim", "3", "--network_args", "algo=dylora", "block_size=2"]) == 2
    assert "lycoris.kohya can't make this network" in capsys.readouterr().err
    assert main([*start, "--network_args", "algo=locom"]) == 2
    assert "locon" in capsys.readouterr().err
    assert main([*start, "--text_encoder_lr", "1e-5", "1e-4"]) == 2
    assert "one rate for all text encoders" in capsys.readouterr().err


def test_goes_on_from_a_file_and_refuses_one_that_does_not_fit(
    tiny_sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from train_network import main

    make_pictures(tmp_path / "pictures", count=2)
    first = train(tiny_sdxl, tmp_path, "first", "--network_args", "algo=locon")
    file = str(tmp_path / "output/first.safetensors")
    nothing = ("--learning_rate", "1e-12", "--network_weights", file)
    second = train(tiny_sdxl, tmp_path, "second", "--network_args", "algo=locon", *nothing)
    third = train(tiny_sdxl, tmp_path, "third", "--dim_from_weights", *nothing)
    mask = os.umask(0o022)
    os.umask(mask)
    assert Path(file).stat().st_mode & 0o777 == 0o666 & ~mask, "others may read it as any new file"
    for key, value in first.items():
        np.testing.assert_allclose(second[key], value, atol=1e-6)
        np.testing.assert_allclose(third[key], value, atol=1e-6)
    start = [
        *("--pretrained_model_name_or_path", str(tiny_sdxl), "--train_data_dir", str(tmp_path / "pictures")),
        *("--output_dir", str(tmp_path / "output"), "--network_module", "lycoris.kohya", "--resolution", "64"),
        *("--caption_extension", ".txt", "--network_weights", file, "--network_args", "algo=lokr"),
    ]
    assert main(start) == 2
    assert "have no place in this network" in capsys.readouterr().err
