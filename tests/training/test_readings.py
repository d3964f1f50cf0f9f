"""Numbers of updates are read late on a GPU: here the lateness alone, on a CPU, which must change only the time."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from library.training import loop
from library.training.readings import Readings
from tests.pictures import make_pictures


class LateReadings(Readings):
    """As on a GPU, but for the device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.are_late = True


def train(model: Path, place: Path, *more: str) -> int:
    from train_network import main

    if not (place / "pictures").is_dir():
        make_pictures(place / "pictures", count=4, repeats=2)
    return main(
        [
            *("--pretrained_model_name_or_path", str(model), "--train_data_dir", str(place / "pictures")),
            *("--output_dir", str(place / "output"), "--resolution", "64", "--seed", "1", "--network_dim", "2"),
            *("--caption_extension", ".txt", "--max_train_steps", "5", "--learning_rate", "1e-2", *more),
        ]
    )


def logged(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


def test_a_queue_gives_numbers_in_order_and_keeps_the_last_one_while_they_are_late() -> None:
    for kind, kept in ((Readings, 0), (LateReadings, 1)):
        readings = kind(torch.device("cpu"))
        for update in (1, 2, 3):
            readings.put(update, {"loss": torch.tensor(update / 2), "told": 0.0}, about=f"update {update}")
        seen = list(readings.ready())
        assert [reading.update for reading in seen] == [1, 2, 3][: 3 - kept]
        assert seen[0].values == {"loss": 0.5, "told": 0.0} and seen[0].about == "update 1"
        assert [reading.update for reading in readings.all()] == [1, 2, 3][3 - kept :]


def test_late_numbers_change_neither_weights_nor_logs(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--network_module", "networks.lora", "--save_every_n_steps", "2", "--log_norms")
    assert train(tiny_sd1, tmp_path, *flags, "--output_name", "now") == 0
    monkeypatch.setattr(loop, "Readings", LateReadings)
    assert train(tiny_sd1, tmp_path, *flags, "--output_name", "late") == 0
    output = tmp_path / "output"
    one, other = load_file(output / "now.safetensors"), load_file(output / "late.safetensors")
    assert one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)
    assert logged(output / "now.log.jsonl") == logged(output / "late.log.jsonl")


def test_a_late_nan_is_noticed_before_anything_is_saved(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loop, "Readings", LateReadings)
    flags = ("--network_module", "networks.lora", "--learning_rate", "1e30", "--save_every_n_steps", "1")
    assert train(tiny_sd1, tmp_path, *flags, "--output_name", "x") == 1
    assert "of step 2 is" in capfd.readouterr().err
    assert sorted(path.name for path in (tmp_path / "output").glob("*.safetensors")) == ["x-step00000001.safetensors"]
