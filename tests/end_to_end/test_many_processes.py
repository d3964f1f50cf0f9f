"""Real processes under torchrun: the same run however the batch is divided, and an end with a message when one dies."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.pictures import make_pictures
from tests.programs import SCRIPT, environment

RATE = 1e-3
STEPS = 6


def arguments(model: Path, folder: Path, name: str, batch_size: int, *more: str) -> list[str]:
    """A run of several buckets, none of which a global batch of 4 divides."""
    return [
        *("--pretrained_model_name_or_path", str(model), "--train_data_dir", str(folder / "pictures")),
        *("--output_dir", str(folder / name), "--output_name", "x", "--network_module", "tests.signalling_lora"),
        *("--network_dim", "4", "--network_dropout", "0.2", "--resolution", "64", "--enable_bucket"),
        *("--min_bucket_reso", "32", "--bucket_reso_steps", "16", "--caption_extension", ".txt", "--shuffle_caption"),
        *("--train_batch_size", str(batch_size), "--max_train_steps", str(STEPS), "--seed", "5"),
        *("--learning_rate", str(RATE), "--max_grad_norm", "0", "--save_every_n_steps", "1", "--save_state"),
        *("--max_data_loader_n_workers", "0", *more),
    ]


def run(processes: int, words: list[str], **extra: str) -> subprocess.CompletedProcess[str]:
    several = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes))
    command = [sys.executable, *(several if processes > 1 else ()), str(SCRIPT), *words]
    variables = environment(ACCELERATE_USE_CPU="true", **extra)
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=False)


def left_over(output: Path) -> list[str]:
    """Processes that still have the output folder on their command line."""
    found = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in found.splitlines() if f"--output_dir {output}" in line]


def first_gradient(folder: Path) -> torch.Tensor:
    """All gradients of the first step, which AdamW's first moments hold a tenth of."""
    stored = torch.load(folder / "x-step00000001-state/optimizer.pt", weights_only=True)
    return torch.cat([moment.double().reshape(-1) for moment in _moments(stored)]) * 10


def _moments(value: object) -> list[torch.Tensor]:
    if not isinstance(value, dict):
        return []
    found = [value["exp_avg"]] if "exp_avg" in value else []
    return [*found, *(moment for inner in value.values() for moment in _moments(inner))]


def assert_same_run(one: Path, both: Path) -> None:
    """First gradients are equal within 1e-6 of their norm, weights after all steps within 0.01 x learning rate."""
    first, second = first_gradient(one), first_gradient(both)
    assert float(first.norm()) > 0
    assert float((first - second).norm() / first.norm()) < 1e-6
    assert apart(one, both) < 0.01 * RATE


def apart(one: Path, both: Path) -> float:
    """The largest difference between the weights that two runs have ended with."""
    weights, others = load_file(one / "x.safetensors"), load_file(both / "x.safetensors")
    assert weights.keys() == others.keys()
    return max(float((weights[key] - others[key]).abs().max()) for key in weights)


def both_ways(model: Path, folder: Path, *more: str) -> tuple[Path, Path]:
    """The folders of the same run with one process and with two."""
    make_pictures(folder / "pictures", count=7)
    for processes, name, batch_size in ((1, "one", 4), (2, "both", 2)):
        done = run(processes, arguments(model, folder, name, batch_size, *more))
        assert done.returncode == 0, done.stderr
    return folder / "one", folder / "both"


@pytest.fixture(scope="module")
def runs(tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return both_ways(tiny_sd1, tmp_path_factory.mktemp("runs"))


def test_one_process_of_4_equals_two_of_2(runs: tuple[Path, Path]) -> None:
    assert_same_run(*runs)


@pytest.mark.slow
def test_accumulated_too(tiny_sd1: Path, tmp_path: Path) -> None:
    assert_same_run(*both_ways(tiny_sd1, tmp_path, "--gradient_accumulation_steps", "2"))


def test_a_state_of_two_processes_goes_on_with_one(tiny_sd1: Path, runs: tuple[Path, Path]) -> None:
    one, both = runs
    half = both / "x-step00000003-state"
    again = run(1, arguments(tiny_sd1, one.parent, "again", 4, "--resume", str(half)))
    assert again.returncode == 0, again.stderr
    assert apart(one.parent / "again", both) < 0.01 * RATE


def test_a_killed_process_ends_the_job_with_a_message_and_the_work_is_kept(tiny_sd1: Path, tmp_path: Path) -> None:
    make_pictures(tmp_path / "pictures", count=7)
    ended = run(2, arguments(tiny_sd1, tmp_path, "x", 2), LORASMITH_TEST_SIGNAL="rank1:KILL@4")
    assert ended.returncode != 0
    last = tmp_path / "x/x-step00000003-state"
    assert time.time() - (last / "manifest.json").stat().st_mtime < 60
    assert "process 0 of 2 lost another one" in ended.stderr
    assert not left_over(tmp_path / "x")
    assert max((tmp_path / "x").glob("x-step*-state")) == last
    goes_on = run(1, arguments(tiny_sd1, tmp_path, "x", 4, "--resume", "latest"))
    assert goes_on.returncode == 0, goes_on.stderr
    assert "at step 3 of 6" in goes_on.stderr
