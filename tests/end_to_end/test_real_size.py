"""Real photographs on a full-size SD 1.5 in one original-layout file: the run ends, and the file is whole."""

from pathlib import Path

import pytest
from safetensors import safe_open

from tests.full_size import write_sd15_single_file
from tests.photos import write_photos
from tests.programs import launch


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_twelve_photographs_on_a_full_size_model(tmp_path: Path) -> None:
    model = tmp_path / "sd15.safetensors"
    write_sd15_single_file(model)
    write_photos(tmp_path / "photos")
    result = launch(
        *("--pretrained_model_name_or_path", model, "--train_data_dir", tmp_path / "photos"),
        *("--output_dir", tmp_path / "output", "--output_name", "photo", "--network_module", "networks.lora"),
        *("--resolution", 256, "--enable_bucket", "--min_bucket_reso", 128, "--cache_latents"),
        *("--network_dim", 8, "--max_train_steps", 2, "--caption_extension", ".txt", "--seed", 1),
        timeout=1000,
        OMP_NUM_THREADS="2",
    )
    assert result.returncode == 0, result.stderr
    with safe_open(tmp_path / "output/photo.safetensors", "np") as file:
        assert len(file.keys()) == 3 * (192 + 72)
        assert file.metadata()["ss_base_model_version"] == "sd_v1"
