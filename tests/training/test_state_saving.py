"""Saving: each format comes back, uploads see whole files, and no good state goes before a newer one is there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from library.training.products import Product
from library.training.saving import Saver
from library.training.state import RunState, find_latest, read_state
from library.training.steps import Save, SavePlan, make_clock
from library.weights.check import BadWeightsError, check_file
from library.weights.files import read_metadata, read_tensors
from library.weights.save import save_lora


class Tensors:
    """What is trained: two factors of a LoRA."""

    def __init__(self) -> None:
        self.value = 1.0

    def state_dict(self) -> dict[str, torch.Tensor]:
        name = "lora_unet_mid_block"
        down = torch.full((4, 8), self.value)
        return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": down.T, f"{name}.alpha": torch.tensor(4.0)}

    def save(self, path: Path, dtype: torch.dtype | None, metadata: dict[str, str]) -> None:
        tensors = {name: tensor.to(dtype or tensor.dtype) for name, tensor in self.state_dict().items()}
        save_lora(tensors, path, metadata)


Make = Callable[..., Saver]


@pytest.fixture
def saver(tmp_path: Path) -> Make:
    trained: Any = Tensors()

    def make(
        extension: Literal[".safetensors", ".pt", ".ckpt"] = ".safetensors",
        optimizer: Callable[[], dict[str, Any]] = lambda: {"optimizer": {}},
        after: Callable[[Path], None] | None = None,
    ) -> Saver:
        def write(path: Path, dtype: torch.dtype | None, updates_done: int) -> None:
            trained.save(path, dtype, {"ss_steps": str(updates_done)})

        def check(path: Path) -> list[str]:
            return check_file(path, {name: one.shape for name, one in trained.state_dict().items()})

        return Saver(
            tmp_path,
            lambda stem: (Product(f"{stem}{extension}", write, check),),
            None,
            trained,
            optimizer,
            lambda updates: RunState(updates, 1, 2.0, 3, 12, 12, (), {}, {}),
            after=after,
        )

    return make


@pytest.mark.parametrize("extension", [".safetensors", ".pt", ".ckpt"])
def test_each_format_comes_back_and_only_one_has_metadata(
    saver: Make, extension: Literal[".safetensors", ".pt", ".ckpt"], tmp_path: Path
) -> None:
    made = saver(extension)
    path = made.save(Save("end", "x", False), 7)
    assert path == tmp_path / f"x{extension}" and [one.name for one in tmp_path.iterdir()] == [path.name]
    tensors = read_tensors(path)
    assert {name: one.tolist() for name, one in tensors.items()} == {
        name: one.tolist() for name, one in made.trainable.state_dict().items()
    }
    if extension == ".safetensors":
        assert read_metadata(path)["ss_steps"] == "7"
    else:
        assert torch.load(path, weights_only=True).keys() == tensors.keys()


@pytest.mark.parametrize("extension", [".safetensors", ".pt"])
def test_bad_numbers_leave_the_older_file(
    saver: Make, extension: Literal[".safetensors", ".pt"], tmp_path: Path
) -> None:
    made = saver(extension)
    path = made.save(Save("best", "x-best", False), 1)
    before = path.read_bytes()
    trained: Any = made.trainable
    trained.value = float("nan")
    with pytest.raises(BadWeightsError, match="not finite"):
        made.save(Save("best", "x-best", False), 2)
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    trained.value = 2.0
    made.save(Save("best", "x-best", False), 3)
    assert path.read_bytes() != before


def test_uploads_see_whole_files_before_older_ones_go(saver: Make, tmp_path: Path) -> None:
    seen: list[tuple[str, bool]] = []

    def look(path: Path) -> None:
        whole = read_state(path).updates_done > 0 if path.is_dir() else bool(read_tensors(path))
        seen.append((path.name, whole and (tmp_path / "old.safetensors").exists()))

    (tmp_path / "old.safetensors").touch()
    saver(after=look).save(Save("step", "x-step00000002", True, ("old",), ("old",)), 2)
    assert seen == [("x-step00000002.safetensors", True), ("x-step00000002-state", True)]
    assert not (tmp_path / "old.safetensors").exists()


def test_states_expire_only_when_a_newer_one_was_written(
    saver: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A resumed run without --save_state, or with an optimizer whose state can't be stored, keeps what it came from."""
    saver().save(Save("step", "x-step00000002", True), 2)
    saver().save(Save("step", "x-step00000004", False, (), ("x-step00000002",)), 4)
    assert find_latest(tmp_path, "x") == tmp_path / "x-step00000002-state"
    bad = saver(optimizer=lambda: {"optimizer": object()})
    bad.save(Save("step", "x-step00000006", True, (), ("x-step00000002",)), 6)
    assert find_latest(tmp_path, "x") == tmp_path / "x-step00000002-state"
    assert bad.latest_state is None and (tmp_path / "x-step00000006.safetensors").exists()
    assert "was not written, so that this run can't be resumed" in capsys.readouterr().err
    saver().save(Save("step", "x-step00000008", True, (), ("x-step00000002",)), 8)
    assert [path.name for path in tmp_path.glob("*-state")] == ["x-step00000008-state"]


def test_a_full_disk_costs_no_older_state(saver: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver().save(Save("step", "x-step00000002", True), 2)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        saver().save(Save("step", "x-step00000004", True, ("x-step00000002",), ("x-step00000002",)), 4)
    assert find_latest(tmp_path, "x") == tmp_path / "x-step00000002-state"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_at_every_moment_of_a_rolling_run_there_is_a_good_state(saver: Make, tmp_path: Path, keep: int) -> None:
    plan = SavePlan("x", every_n_steps=2, last_n_steps_state=keep, save_state=True)
    clock = make_clock(5, 1, 20, None)
    for updates in range(1, 21):
        for save in plan.due(updates, clock):
            saver().save(save, updates)
            found = find_latest(tmp_path, "x")
            assert found is not None and read_state(found).updates_done == updates
    assert len(list(tmp_path.glob("x-step*-state"))) == keep // 2 + 1
