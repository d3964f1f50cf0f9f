"""A run that was stopped, killed and resumed ends with the very bits of one that never was."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.pictures import make_pictures
from tests.programs import SCRIPT, environment, launch_command

STEPS = 12
NOT_COMPARED = {
    "ss_training_started_at",
    "ss_training_finished_at",
    "modelspec.date",
    "sshs_model_hash",
    "sshs_legacy_hash",
}


def arguments(model: Path, pictures: Path, output: Path, workers: int, accumulation: int) -> list[str]:
    return [
        *(
            "--pretrained_model_name_or_path",
            str(model),
            "--train_data_dir",
            str(pictures),
            "--output_dir",
            str(output),
        ),
        *(
            "--output_name",
            "run",
            "--network_module",
            "tests.signalling_lora",
            "--network_dim",
            "4",
            "--network_dropout",
            "0.1",
        ),
        *("--resolution", "64", "--enable_bucket", "--min_bucket_reso", "32", "--max_bucket_reso", "128"),
        *("--bucket_reso_steps", "16", "--caption_extension", ".txt", "--shuffle_caption", "--flip_aug"),
        *("--train_batch_size", "2" if accumulation > 1 else "3", "--gradient_accumulation_steps", str(accumulation)),
        *("--noise_offset", "0.1", "--lr_scheduler", "cosine", "--learning_rate", "1e-2", "--seed", "5"),
        *("--max_train_steps", str(STEPS), "--save_every_n_steps", "2", "--save_state", "--cache_latents"),
        *("--max_data_loader_n_workers", str(workers)),
    ]


def run(command: list[str], signal: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=environment(LORASMITH_TEST_SIGNAL=signal), capture_output=True, text=True, timeout=240, check=False
    )


def contents(path: Path) -> tuple[dict[str, bytes], dict[str, str]]:
    with safe_open(path, "np") as file:
        tensors = {key: file.get_tensor(key).tobytes() for key in sorted(file.keys())}
        metadata = {key: value for key, value in file.metadata().items() if key not in NOT_COMPARED}
    return tensors, metadata


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures"), count=7, repeats=2)


@pytest.mark.parametrize(("workers", "accumulation"), [(0, 1), (4, 1), (4, 2)])
def test_stopped_killed_and_resumed_equals_one_go(
    tiny_sd1: Path, pictures: Path, tmp_path: Path, workers: int, accumulation: int
) -> None:
    def command(output: str, *more: str) -> list[str]:
        common = arguments(tiny_sd1, pictures, tmp_path / output, workers, accumulation)
        return [sys.executable, str(SCRIPT), *common, *more]

    whole = run(command("whole"))
    assert whole.returncode == 0, whole.stderr

    stopped = run(command("parts"), f"self:TERM@{4 * accumulation + 1}")
    assert stopped.returncode == 143, stopped.stderr
    assert (tmp_path / "parts/run-step00000005.safetensors").is_file()
    manifest = json.loads((tmp_path / "parts/run-step00000005-state/manifest.json").read_text())
    assert manifest["updates_done"] == 5
    assert "--resume" in stopped.stderr and "run-step00000005-state" in stopped.stderr

    killed = run(command("parts", "--resume", "latest"), f"self:KILL@{2 * accumulation + 1}")
    assert killed.returncode == -9
    assert not (tmp_path / "parts/run.safetensors").exists()

    finished = run(command("parts", "--resume", "latest"))
    assert finished.returncode == 0, finished.stderr
    assert "at step 6 of 12" in finished.stderr
    tensors, metadata = contents(tmp_path / "whole/run.safetensors")
    resumed_tensors, resumed_metadata = contents(tmp_path / "parts/run.safetensors")
    assert resumed_tensors == tensors
    assert resumed_metadata == metadata
    assert metadata["ss_steps"] == "12"

    again = run(command("parts", "--resume", "latest"))
    assert again.returncode == 2
    assert "complete" in again.stderr


def test_only_the_launcher_is_told_to_stop(tiny_sd1: Path, pictures: Path, tmp_path: Path) -> None:
    command = launch_command(*arguments(tiny_sd1, pictures, tmp_path, 0, 1), "--max_train_steps", "400")
    result = run(command, "launcher:TERM@5")
    assert result.returncode != 0
    state = tmp_path / "run-step00000005-state/manifest.json"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not state.is_file() or _running(tmp_path)):
        time.sleep(0.1)
    assert state.is_file()
    assert (tmp_path / "run-step00000005.safetensors").is_file()
    assert not _running(tmp_path)


def _running(output: Path) -> list[int]:
    """Processes that have the output folder on their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if str(output).encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found
