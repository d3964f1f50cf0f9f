"""Memory that is short: told before a model is loaded, and, if it runs out all the same, with the work saved."""

from pathlib import Path

import pytest

from library.training import memory_plan
from tests.pictures import make_pictures


def arguments(model: Path, place: Path, *more: str) -> list[str]:
    make_pictures(place / "pictures", count=4, repeats=2)
    return [
        *("--pretrained_model_name_or_path", str(model), "--train_data_dir", str(place / "pictures")),
        *("--output_dir", str(place / "output"), "--output_name", "x", "--resolution", "64", "--seed", "1"),
        *("--caption_extension", ".txt", "--max_train_steps", "5", *more),
    ]


def test_work_is_saved_when_memory_runs_out(tiny_sd1: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from train_network import main

    assert main(arguments(tiny_sd1, tmp_path, "--network_module", "tests.greedy_lora")) == 1
    said = capfd.readouterr().err
    assert "Traceback" not in said and "memory" in said and "in the phase 'steps'" in said
    assert (tmp_path / "output/x-step00000002.safetensors").is_file()
    assert (tmp_path / "output/x-step00000002-state/manifest.json").is_file()


def test_a_run_that_can_not_fit_is_refused_in_a_dry_run_too(
    tiny_sd1: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from train_network import main

    monkeypatch.setattr(memory_plan, "available_memory", lambda: 100 * 2**20)
    line = arguments(tiny_sd1, tmp_path, "--network_module", "networks.lora")
    assert main([*line, "--dry_run"]) == 2
    assert main(line) == 2
    said = capfd.readouterr().err
    assert said.count("100 MiB are available") == 2 and "--ignore_memory_check starts it all the same" in said
    assert not (tmp_path / "output").exists()
    assert main([*line, "--ignore_memory_check"]) == 0
