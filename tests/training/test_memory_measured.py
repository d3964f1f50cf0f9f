"""The prediction against real runs of full-size models (random weights) on the CPU: within 15 %."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from library.options.parse import parse
from library.options.scripts import TRAIN_NETWORK, TRAIN_TEXTUAL_INVERSION
from library.training.memory_plan import available_memory, predict_memory
from library.training.prepare import prepare
from tests.full_size import write_single_file
from tests.memory import run_measured
from tests.photos import write_photos
from tests.programs import ROOT, environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
BF16 = ("--mixed_precision", "bf16")
FROZEN_TEXT = ("--network_train_unet_only", "--cache_text_encoder_outputs")
NETWORK = ("--network_module", "networks.lora", "--network_dim", 8)
TOKEN = ("--token_string", "mycat", "--num_vectors_per_token", 8, "--use_object_template")
RUNS = {
    "float32": ("sd1", (256, "--cache_latents")),
    "bf16": ("sd1", (256, "--cache_latents", *BF16)),
    "bf16, batch 4": ("sd1", (256, "--cache_latents", *BF16, "--train_batch_size", 4)),
    "bf16, checkpointing": ("sd1", (384, "--cache_latents", *BF16, "--gradient_checkpointing")),
    "float32, the VAE stays": ("sd1", (320, *FROZEN_TEXT)),
    "bf16, convolutions": ("sd1", (256, "--cache_latents", *BF16, "--network_args", "conv_dim=8")),
    "LyCORIS": ("sd1", (256, "--cache_latents", *BF16, "--network_module", "lycoris.kohya")),
    "SDXL": ("sdxl", (512, "--cache_latents", *BF16, *FROZEN_TEXT)),
    "vectors": ("sd1", (256, "--cache_latents", *BF16, *TOKEN)),
    "vectors for SDXL": ("sdxl", (512, "--cache_latents", *BF16, "--gradient_checkpointing", *TOKEN)),
}
"""Those of `--token_string` train vectors alone."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where photographs and models lie; of models one at a time."""
    place = tmp_path_factory.mktemp("measured")
    write_photos(place / "photos", repeats=1)
    yield place
    for file in place.glob("*.safetensors"):
        file.unlink()


def model_of(family: str, place: Path) -> Path:
    path = place / f"{family}.safetensors"
    if not path.exists():
        for other in place.glob("*.safetensors"):
            other.unlink()
        write_single_file(family, path, dtype="F16" if family == "sdxl" else "F32")
    return path


@pytest.mark.parametrize("name", RUNS)
def test_a_run_needs_what_was_predicted(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, (side, *flags) = RUNS[name]
    alone = "--token_string" in flags
    script = TRAIN_TEXTUAL_INVERSION if alone else TRAIN_NETWORK
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    line = [
        *("--pretrained_model_name_or_path", model_of(family, folder), "--train_data_dir", folder / "photos"),
        *("--output_dir", folder / "output", *(() if alone else NETWORK)),
        *("--resolution", side, "--caption_extension", ".txt", "--seed", 1, "--learning_rate", 1e-4),
        *("--max_train_steps", 2, *flags),
    ]
    words = [str(one) for one in line]
    prediction = predict_memory(prepare(parse(words, script=script)))
    there = available_memory()
    if there is not None and there < 1.1 * prediction.total:
        pytest.skip(f"needs {prediction.total / 2**30:.1f} GiB, and {there / 2**30:.1f} are available")
    variables = environment(OMP_NUM_THREADS="2", ACCELERATE_USE_CPU="true")
    run = run_measured([sys.executable, str(ROOT / script.file), *words], variables, folder / "log", timeout=900)
    assert run.returncode == 0, run.stderr[-3000:]
    ratio = prediction.total / run.high_water
    print(f"\n{name}: predicted {prediction.total / 2**30:.2f} GiB, was {run.high_water / 2**30:.2f} GiB, {ratio:.3f}")
    assert ratio == pytest.approx(1, abs=0.15)
    told = re.search(r"peak memory ([0-9.]+) GiB", run.stderr)
    assert told and float(told[1]) * 2**30 == pytest.approx(run.high_water, rel=0.03)
