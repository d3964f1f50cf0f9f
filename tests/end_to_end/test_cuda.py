"""Mixed precision on a CUDA device, every family: fp16 with loss scaling, and bf16."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.pictures import make_pictures


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_trains_finite_weights(
    tiny_models: Callable[[str], Path], tmp_path: Path, precision: str, family: str
) -> None:
    from train_network import main

    make_pictures(tmp_path / "pictures", count=4)
    code = main(
        [
            *(
                "--pretrained_model_name_or_path",
                str(tiny_models(family)),
                "--train_data_dir",
                str(tmp_path / "pictures"),
            ),
            *("--output_dir", str(tmp_path / "output"), "--output_name", "x", "--network_module", "networks.lora"),
            *("--resolution", "64", "--caption_extension", ".txt", "--max_train_steps", "8", "--seed", "1"),
            *("--mixed_precision", precision, "--save_state", "--cache_latents", "--train_batch_size", "2"),
            *("--learning_rate", "1e-3"),
        ]
    )
    assert code == 0
    tensors = load_file(tmp_path / "output/x.safetensors")
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())
    assert any(tensor.any() for key, tensor in tensors.items() if key.endswith("lora_up.weight"))
    manifest = json.loads((tmp_path / "output/x-state/manifest.json").read_text())
    assert manifest["settings"]["mixed_precision"] == precision
