"""Real photographs on full-size models in one original-layout file: the run ends, and the file is whole."""

from pathlib import Path

import pytest
from safetensors import safe_open

from tests.full_size import write_single_file
from tests.memory import run_measured
from tests.photos import write_photos
from tests.programs import environment, launch_command

FROZEN_TEXT = ("--network_train_unet_only", "--cache_text_encoder_outputs")
RUNS = {
    "sd1": ("F32", 192 + 72, "sd_v1", ()),
    "sd2": ("F16", 192 + 138, "sd_v2_v", ("--mixed_precision", "bf16", "--v_parameterization")),
    "sdxl": ("F16", 722, "sdxl_base_v1-0", ("--mixed_precision", "bf16", *FROZEN_TEXT)),
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("family", RUNS)
def test_twelve_photographs_on_a_full_size_model(family: str, tmp_path: Path) -> None:
    dtype, modules, version, more = RUNS[family]
    model = tmp_path / f"{family}.safetensors"
    write_single_file(family, model, dtype=dtype)
    write_photos(tmp_path / "photos")
    command = launch_command(
        *("--pretrained_model_name_or_path", model, "--train_data_dir", tmp_path / "photos"),
        *("--output_dir", tmp_path / "output", "--output_name", "photo", "--network_module", "networks.lora"),
        *("--resolution", 256, "--enable_bucket", "--min_bucket_reso", 128, "--cache_latents"),
        *("--network_dim", 8, "--max_train_steps", 2, "--caption_extension", ".txt", "--seed", 1, *more),
    )
    try:
        run = run_measured(command, environment(OMP_NUM_THREADS="2"), tmp_path / "log", timeout=1500)
    finally:
        model.unlink()
    assert run.returncode == 0, run.stderr
    times = next(line for line in run.stderr.splitlines() if "time: " in line)
    print(f"\n{family}: {run.seconds:.1f} s; {times}; {run.anonymous / 2**30:.2f} GiB anonymous")
    with safe_open(tmp_path / "output/photo.safetensors", "np") as file:
        assert len(file.keys()) == 3 * modules
        assert file.metadata()["ss_base_model_version"] == version
