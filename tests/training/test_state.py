"""States: complete or absent, found again, and refused when they don't fit."""

import json
import os
from collections import Counter, OrderedDict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from library.errors import UserError
from library.training import state as states
from library.training.state import (
    RunState,
    changes,
    check_same_run,
    find_latest,
    load_tensors,
    read_state,
    schedule_total,
)


def make(updates: int = 4, **changes: object) -> RunState:
    values: dict[str, Any] = {
        "updates_done": updates,
        "session_id": 5,
        "started_at": 1.25,
        "seed": 3,
        "schedule_total": 12,
        "total_updates": 12,
        "losses": (0.1, 1 / 3),
        "settings": {"seed": "3", "data": "abc"},
        "may_change": {"learning_rate": "0.1"},
        "watch": {"best": [3, 0.1 + 0.2], "seen": None},
        "world_size": 2,
    }
    return RunState(**{**values, **changes})


def write(folder: Path, state: RunState) -> None:
    parameter = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    parameter.grad = torch.ones(2, 3)
    optimizer.step()
    states.write_state(folder, state, {"a": parameter.detach()}, {"optimizer": optimizer.state_dict()})


def test_a_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    write(tmp_path / "x-state", make())
    assert read_state(tmp_path / "x-state") == make()
    tensors, optimizer = load_tensors(tmp_path / "x-state")
    assert tensors["a"].shape == (2, 3)
    assert optimizer["optimizer"]["state"][0]["exp_avg"].sum() == pytest.approx(0.6)


def test_latest_is_the_one_furthest_in_the_run_of_that_name(tmp_path: Path) -> None:
    for name, updates in (("x-step00000002", 2), ("x-000001", 10), ("xy-step00000099", 99), ("x", 8)):
        write(tmp_path / f"{name}-state", make(updates))
    (tmp_path / "x-step00000100-state").mkdir()
    assert find_latest(tmp_path, "x") == tmp_path / "x-000001-state"
    assert find_latest(tmp_path, "other") is None
    assert find_latest(tmp_path / "none", "x") is None


def test_a_crash_while_writing_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "x-state", make(2))

    def crash(*arguments: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(states, "flush", crash)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path / "x-state", make(4))
    assert read_state(tmp_path / "x-state").updates_done == 2
    assert find_latest(tmp_path, "x") == tmp_path / "x-state"


def test_a_newer_run_counts_before_an_older_one_that_went_further(tmp_path: Path) -> None:
    write(tmp_path / "x-state", make(12))
    write(tmp_path / "x-step00000004-state", make(4, started_at=2.5))
    os.utime(tmp_path / "x-state/manifest.json", (1, 1))
    assert find_latest(tmp_path, "x") == tmp_path / "x-step00000004-state"


def test_a_state_that_was_being_replaced_is_found_again(tmp_path: Path) -> None:
    write(tmp_path / "x-state", make(2))
    (tmp_path / "x-state").rename(tmp_path / ".x-state.replaced")
    (tmp_path / ".x-state.tmp77").mkdir()
    assert find_latest(tmp_path, "x") == tmp_path / "x-state"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x-state"]


def test_what_a_resume_changes_is_said(tmp_path: Path) -> None:
    assert changes(make(), {"learning_rate": "0.1"}) == []
    assert changes(make(), {"learning_rate": "0.2"}) == ["--resume: learning_rate was 0.1, from here on it is 0.2"]


@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_a_damaged_state_is_refused(tmp_path: Path, damage: str) -> None:
    write(tmp_path / "x-state", make())
    path = tmp_path / "x-state" / states.TENSORS
    if damage == "flip":
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()
    with pytest.raises(UserError, match=r"damaged: trained\.safetensors"):
        read_state(tmp_path / "x-state")


def test_a_state_of_sd_scripts_is_refused_with_advice(tmp_path: Path) -> None:
    (tmp_path / "train_state.json").write_text("{}")
    with pytest.raises(UserError, match=r"sd-scripts.*--network_weights"):
        read_state(tmp_path)


@pytest.mark.parametrize(("version", "advice"), [(1, "finish that run.*--network_weights"), (9, "update lorasmith")])
def test_another_version_is_refused_even_as_latest(tmp_path: Path, version: int, advice: str) -> None:
    write(tmp_path / "x-state", make())
    path = tmp_path / "x-state/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": version}))
    found = find_latest(tmp_path, "x")
    assert found is not None
    with pytest.raises(UserError, match=f"format version {version}.*{advice}"):
        read_state(found)


def test_latest_passes_over_a_damaged_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "x-step00000002-state", make(2))
    write(tmp_path / "x-step00000004-state", make(4))
    (tmp_path / "x-step00000004-state" / states.OPTIMIZER).write_bytes(b"")
    assert find_latest(tmp_path, "x") == tmp_path / "x-step00000002-state"
    assert "x-step00000004-state is damaged (optimizer.pt is missing or changed)" in capsys.readouterr().err
    states.delete_state(tmp_path / "x-step00000002-state")
    assert find_latest(tmp_path, "x") == tmp_path / "x-step00000004-state"


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(states, "flush", crash)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path / "x-state", make(4))
    assert list(tmp_path.iterdir()) == []


def test_deleting_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "x-state", make())
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)
    states.delete_state(tmp_path / "x-state")
    states.delete_state(tmp_path / "never-there-state")
    assert find_latest(tmp_path, "x") is None
    assert not (tmp_path / "x-state").exists()


class Unsafe:
    """Something that can only be read back by running code."""


@pytest.mark.parametrize(("kept", "name"), [(Unsafe(), r"test_state\.Unsafe"), (deque([1.0]), r"collections\.deque")])
def test_what_cannot_be_read_back_is_not_written(tmp_path: Path, kept: object, name: str) -> None:
    write(tmp_path / "x-state", make(2))
    with pytest.raises(states.UnstorableStateError, match=name):
        states.write_state(tmp_path / "x-state", make(4), {"a": torch.ones(1)}, {"optimizer": {"kept": kept}})
    assert read_state(tmp_path / "x-state").updates_done == 2


def test_numbers_and_containers_of_other_packages_come_back(tmp_path: Path) -> None:
    kept = {
        "float": np.float64(0.1),
        "half": np.float16(0.5),
        "array": np.arange(3, dtype=np.int32),
        "counts": Counter({3: 1}),
        "state": {0: {"a": torch.ones(2, dtype=torch.bfloat16)}},
        "set": {1, 2},
        "ordered": OrderedDict(a=1, b=2),
    }
    states.write_state(tmp_path / "x-state", make(), {"a": torch.ones(1)}, {"optimizer": kept})
    _, loaded = load_tensors(tmp_path / "x-state")
    found = loaded["optimizer"]
    assert type(found["float"]) is np.float64 and found["float"] == kept["float"]
    assert found["half"].dtype == np.float16 and found["array"].dtype == np.int32
    assert found["counts"] == {3: 1} and found["set"] == {1, 2}
    assert list(found["ordered"].items()) == [("a", 1), ("b", 2)]
    assert found["state"][0]["a"].dtype == torch.bfloat16


def test_another_number_of_processes_is_said() -> None:
    assert changes(make(), {"learning_rate": "0.1"}, 2) == []
    (line,) = changes(make(), {"learning_rate": "0.1"}, 1)
    assert "2 processes, from here on 1" in line


def test_other_settings_are_refused_all_at_once() -> None:
    with pytest.raises(UserError) as caught:
        check_same_run(make(), {"seed": "4", "data": "xyz"})
    assert len(caught.value.problems) == 2
    check_same_run(make(), {"seed": "3", "data": "abc"})


def test_a_new_total_needs_a_choice() -> None:
    assert schedule_total(make(), 12, None) == 12
    with pytest.raises(UserError, match="resume_schedule"):
        schedule_total(make(), 20, None)
    assert schedule_total(make(), 20, "keep") == 12
    assert schedule_total(make(), 20, "stretch") == 20
    with pytest.raises(UserError, match="complete"):
        schedule_total(make(12), 12, None)
