"""What is in pictures decides whether a run may be resumed: seen in real files, read once, wherever they lie."""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from library.data import fingerprint
from library.data.fingerprint import contents
from library.data.plan import Plan, build_plan
from library.data.sources import index
from library.data.sources.scan import scan
from library.errors import UserError
from library.options.specs import DatasetSpec

MakePicture = Callable[..., Path]
MakeSpec = Callable[..., DatasetSpec]
PlanOf = Callable[[Path], Plan]


@pytest.fixture
def folder(tmp_path: Path, make_picture: MakePicture) -> Path:
    """Bitmaps of more than three blocks each, with masks."""
    for i in range(3):
        make_picture(tmp_path / "cats" / f"{i}.bmp", (200, 120 + i), caption=f"cat {i}")
        make_picture(tmp_path / "masks" / f"{i}.bmp", (200, 120 + i))
    return tmp_path / "cats"


@pytest.fixture
def plan_of(make_spec: MakeSpec) -> PlanOf:
    def plan_of(folder: Path) -> Plan:
        specs = [make_spec(folder, mask_dir=folder.parent / "masks")]
        return build_plan(specs, scan(specs).records, 8, 1)

    return plan_of


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of files that are hashed from now on."""
    names: list[str] = []
    digest = fingerprint._digest

    def listening(path: str, whole: bool) -> str:
        names.append(Path(path).name)
        return digest(path, whole)

    monkeypatch.setattr(fingerprint, "_digest", listening)
    return names


def repaint(path: Path, at: int) -> None:
    """Other bytes of the same number."""
    with path.open("r+b") as file:
        file.seek(at)
        file.write(bytes(255 - byte for byte in path.read_bytes()[at : at + 3]))


@pytest.mark.parametrize("name", ["cats/1.bmp", "masks/2.bmp"])
def test_a_picture_that_was_painted_over_is_noticed(folder: Path, plan_of: PlanOf, name: str) -> None:
    plan = plan_of(folder)
    before = contents(plan)
    assert contents(plan) == before
    path = folder.parent / name
    repaint(path, path.stat().st_size // 3)
    again = plan_of(folder)
    assert again.fingerprint() == plan.fingerprint()
    assert contents(again) != before


def test_places_names_and_times_do_not_count(folder: Path, tmp_path: Path, plan_of: PlanOf) -> None:
    before = contents(plan_of(folder))
    shutil.copytree(folder, tmp_path / "elsewhere" / "dogs")
    shutil.copytree(folder.parent / "masks", tmp_path / "elsewhere" / "masks")
    os.utime(tmp_path / "elsewhere" / "dogs" / "0.bmp", (1, 1))
    assert contents(plan_of(tmp_path / "elsewhere" / "dogs")) == before


def test_swapped_pictures_are_noticed(folder: Path, plan_of: PlanOf) -> None:
    plan = plan_of(folder)
    first, *others = plan.datasets[0].records
    moved = (replace(others[0], key=first.key), replace(first, key=others[0].key), *others[1:])
    swapped = replace(plan, datasets=(replace(plan.datasets[0], records=moved),))
    assert contents(swapped) != contents(plan)


def test_a_second_start_reads_nothing(
    folder: Path, plan_of: PlanOf, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "now", lambda: time.time() + 10)
    plan = plan_of(folder)
    before = contents(plan)
    assert sorted(read) == ["0.bmp", "0.bmp", "1.bmp", "1.bmp", "2.bmp", "2.bmp"]
    read.clear()
    assert contents(plan) == before
    assert read == []
    time.sleep(0.02)
    repaint(folder / "1.bmp", 5000)
    assert contents(plan) != before
    assert read == ["1.bmp"]


def test_files_that_were_just_written_are_read_again(folder: Path, plan_of: PlanOf, read: list[str]) -> None:
    plan = plan_of(folder)
    assert contents(plan) == contents(plan)
    assert len(read) == 12


def test_of_many_large_files_three_blocks_are_read(
    folder: Path, plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "WHOLE_FILES", 1)
    monkeypatch.setattr(fingerprint, "WHOLE_BYTES", 1)
    plan = plan_of(folder)
    path = folder / "1.bmp"
    found = [contents(plan)]
    for at in (100, path.stat().st_size // 2, path.stat().st_size - 100):
        repaint(path, at)
        found.append(contents(plan))
    assert len(set(found)) == 4
    repaint(path, path.stat().st_size // 3)
    assert contents(plan) == found[-1]


def test_a_picture_that_has_gone_is_named(folder: Path, plan_of: PlanOf) -> None:
    plan = plan_of(folder)
    (folder / "1.bmp").unlink()
    with pytest.raises(UserError, match=r"1\.bmp: can't be read any more: No such file"):
        contents(plan)
