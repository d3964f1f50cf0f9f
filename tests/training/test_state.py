"""States: complete or absent, found again, and refused when they don't fit."""

import os
from pathlib import Path
from typing import Any

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
