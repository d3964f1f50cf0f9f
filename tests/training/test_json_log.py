"""The machine-readable log: a JSON object a line, whole at every moment, and cut where a run goes on."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest

from library.training.json_log import JsonLog, log_path, over_epochs


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_lines_are_there_at_once_and_can_be_read_by_anybody(tmp_path: Path) -> None:
    path = log_path(tmp_path / "new" / "folder", None)
    assert path.name == "last.log.jsonl"
    before = time.time()
    log = JsonLog(path)
    log.log({"loss/validation/epoch_average": 0.5}, 0)
    log.log({"loss/current": 0.25, "lr/unet": 1e-4}, 7)
    log.log({"loss/epoch_average": math.nan}, 2)
    log.log({"loss/current": math.inf}, 8)
    found = lines(path)
    log.close()
    assert all(before - 1 < line.pop("time") < time.time() + 1 for line in found)
    assert found == [
        {"step": 0, "epoch": 0, "loss/validation/epoch_average": 0.5},
        {"step": 7, "loss/current": 0.25, "lr/unet": 1e-4},
        {"step": 7, "epoch": 2, "loss/epoch_average": None},
        {"step": 8, "loss/current": None},
    ]
    assert "NaN" not in path.read_text(encoding="utf-8")


def test_what_is_counted_in_epochs_is_known_by_its_name() -> None:
    assert over_epochs({"loss/epoch_average": 0.0})
    assert over_epochs({"loss/validation/epoch_divergence": 0.0, "loss/validation/subset/cat": 0.0})
    assert not over_epochs({"loss/validation/step_average": 0.0, "norm/weight/my_epoch_": 0.0})


def test_a_resumed_run_cuts_off_what_it_does_again(tmp_path: Path) -> None:
    path = tmp_path / "cat.log.jsonl"
    log = JsonLog(path)
    for step in range(1, 6):
        log.log({"loss/current": float(step)}, step)
        if step % 2 == 0:
            log.log({"loss/epoch_average": 9.0}, step // 2)
    log.close()
    with path.open("a", encoding="utf-8") as file:
        file.write('{"step": 3, "unfini')
    again = JsonLog(path, 4)
    again.log({"loss/epoch_average": 8.0}, 2)
    again.log({"loss/current": 50.0}, 5)
    again.close()
    assert [(line["step"], line.get("epoch")) for line in lines(path)] == [
        (1, None),
        (2, None),
        (2, 1),
        (3, None),
        (4, None),
        (4, 2),
        (4, 2),
        (5, None),
    ]
    assert lines(path)[-1]["loss/current"] == 50.0
    assert [one.name for one in tmp_path.iterdir()] == ["cat.log.jsonl"]


def test_damaged_lines_are_cut_off_too(tmp_path: Path) -> None:
    path = tmp_path / "cat.log.jsonl"
    path.write_bytes(b'{"step": 1}\nnonsense\n[]\n{"step": "x"}\n\xff\xfe\n{"step": 2}\n{"step": 3}')
    log = JsonLog(path, 3)
    log.log({"loss/current": 1.0}, 4)
    log.close()
    assert [line["step"] for line in lines(path)] == [1, 2, 4]


def test_a_new_run_starts_a_new_log_and_keeps_the_last_one(tmp_path: Path) -> None:
    path = tmp_path / "cat.log.jsonl"
    for run in range(3):
        log = JsonLog(path)
        log.log({"loss/current": float(run)}, 1)
        log.close()
        log.log({"loss/current": 9.0}, 2)
    assert [line["loss/current"] for line in lines(path)] == [2.0]
    assert [line["loss/current"] for line in lines(tmp_path / "cat.log.1.jsonl")] == [1.0]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("resumed_step", [None, 1])
def test_a_start_that_fails_leaves_the_log_as_it_was(tmp_path: Path, resumed_step: int | None) -> None:
    path = tmp_path / "cat.log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n', encoding="utf-8")
    JsonLog(path, resumed_step).close()
    assert [line["step"] for line in lines(path)] == [1, 2]
    assert list(tmp_path.iterdir()) == [path]


def test_a_log_that_can_not_be_written_ends_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cat.log.jsonl").mkdir()
    log = JsonLog(tmp_path / "cat.log.jsonl")
    log.log({"loss/current": 1.0}, 1)
    log.close()
    assert "can't be written, there will be no log" in capsys.readouterr().err


def test_a_full_disk_ends_the_log_only(capsys: pytest.CaptureFixture[str]) -> None:
    log = JsonLog(Path("/dev/full"))
    log.log({"loss/current": 1.0}, 1)
    log.log({"loss/current": 1.0}, 2)
    log.close()
    assert capsys.readouterr().err.count("the log ends at step 1") == 1
