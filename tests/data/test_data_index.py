"""What a folder's index remembers, and when it must not."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.data.sources import images, index, shelves
from library.data.sources.index import NAME, Index, remember_damages, state_of
from library.data.sources.reading import LateBar
from library.data.sources.scan import Scan, scan, survey
from library.errors import UserError
from library.known_files import cache_folder
from library.options.specs import CaptionSpec, DatasetSpec
from tests.programs import ROOT, environment

MakePicture = Callable[..., Path]
MakeSpec = Callable[..., DatasetSpec]
Rescan = Callable[..., Scan]

_heard: list[list[str]] = []


def _hear(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and _heard:
        _heard[-1].append(os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | Path) else "")


sys.addaudithook(_hear)


@contextmanager
def opened() -> Iterator[list[str]]:
    """The data files that Python opens within."""
    _heard.append([])
    files: list[str] = []
    try:
        yield files
    finally:
        files += [name for name in _heard.pop() if name.endswith((".png", ".jpg", ".txt"))]


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten seconds have gone by since the files were written."""
    monkeypatch.setattr(index, "now", lambda: time.time() + 10)


@pytest.fixture
def folder(tmp_path: Path, make_picture: MakePicture) -> Path:
    """Six pictures with captions."""
    for i in range(6):
        make_picture(tmp_path / "cats" / f"{i}.{('png', 'jpg')[i % 2]}", (60 + i, 50), caption=f"cat {i}\nsecond line")
    return tmp_path / "cats"


def test_nothing_is_opened_when_nothing_has_changed(folder: Path, make_spec: MakeSpec, settled: None) -> None:
    spec = make_spec(folder)
    with opened() as files:
        first = scan([spec])
    assert len(files) == 12
    with opened() as files:
        second = scan([spec])
    assert files == []
    assert second == first
    with opened() as files:
        wild = scan([make_spec(folder, caption=CaptionSpec(wildcards=True), caption_extension=".txt")])
    assert files == []
    assert wild.records[2].caption == "cat 2\nsecond line"


def test_datasets_that_share_a_folder_read_it_once(folder: Path, make_spec: MakeSpec) -> None:
    with opened() as files:
        found = scan([make_spec(folder), make_spec(folder, resolution=(96, 96))])
    assert len(found.records) == 12
    assert len(files) == 12


def test_files_that_were_just_written_are_read_again(folder: Path, make_spec: MakeSpec) -> None:
    scan([make_spec(folder)])
    with opened() as files:
        scan([make_spec(folder)])
    assert len(files) == 12
    assert not (folder / NAME).exists()


@pytest.mark.parametrize("kept_times", [True, False])
def test_other_bytes_of_the_same_number_are_noticed(
    folder: Path, make_picture: MakePicture, make_spec: MakeSpec, settled: None, kept_times: bool
) -> None:
    path = folder / "0.bmp"
    make_picture(path, (40, 60))
    before = path.stat()
    assert scan([make_spec(folder)]).records[0].size == (40, 60)
    other = make_picture(folder.parent / "other.bmp", (80, 30)).read_bytes()
    assert len(other) == before.st_size
    time.sleep(0.02)
    with path.open("r+b") as file:
        file.write(other)
    if kept_times:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert path.stat().st_ino == before.st_ino
    with opened() as files:
        found = scan([make_spec(folder)])
    assert found.records[0].size == (80, 30)
    assert [name for name in files if not name.endswith(".bmp")] == []


def test_renamed_replaced_and_deleted_files(
    folder: Path, make_picture: MakePicture, make_spec: MakeSpec, settled: None
) -> None:
    scan([make_spec(folder)])
    (folder / "0.png").rename(folder / "00.png")
    (folder / "1.jpg").unlink()
    make_picture(folder.parent / "new.png", (33, 44)).replace(folder / "2.png")
    (folder / "3.txt").write_text("edited")
    (folder / "4.txt").unlink()
    with opened() as files:
        found = scan([make_spec(folder, class_tokens="tokens")])
    assert {(r.key, r.size, r.caption) for r in found.records} == {
        ("00.png", (60, 50), "tokens"),
        ("2.png", (33, 44), "cat 2"),
        ("3.jpg", (63, 50), "edited"),
        ("4.png", (64, 50), "tokens"),
        ("5.jpg", (65, 50), "cat 5"),
    }
    assert sorted(Path(name).name for name in files) == ["00.png", "2.png", "3.txt"]
    assert set(index.load(str(folder)).names) == {path.name for path in folder.iterdir()} - {NAME}


def test_swapped_files_are_noticed(folder: Path, make_spec: MakeSpec, settled: None) -> None:
    before = scan([make_spec(folder)]).records
    (folder / "0.png").rename(folder / "x")
    (folder / "2.png").rename(folder / "0.png")
    (folder / "x").rename(folder / "2.png")
    after = scan([make_spec(folder)]).records
    assert (after[0].size, after[2].size) == (before[2].size, before[0].size)


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "bit", "version", "folder"])
def test_damaged_and_foreign_indexes_are_ignored_and_rewritten(
    folder: Path, make_spec: MakeSpec, settled: None, damage: str
) -> None:
    first = scan([make_spec(folder)])
    path = folder / NAME
    data = path.read_bytes()
    broken = {
        "cut": data[:-20],
        "empty": b"",
        "text": b"something else\n" * 40,
        "bit": data[:-300] + bytes([data[-300] ^ 4]) + data[-299:],
        "version": data.replace(b'"version": %d' % index.VERSION, b'"version": 0'),
    }
    if damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(broken[damage])
    with opened() as files:
        assert scan([make_spec(folder)]) == first
    assert len(files) == 12
    with opened() as files:
        assert scan([make_spec(folder)]) == first
    assert files == []


@settings(deadline=None)
@given(st.binary(max_size=300), st.integers(0, 400), st.integers(0, 400))
def test_no_bytes_make_the_reader_fail(
    tmp_path_factory: pytest.TempPathFactory, junk: bytes, at: int, cut: int
) -> None:
    folder = tmp_path_factory.getbasetemp()
    whole = index._written(Index(["a\n.png"], np.ones((1, 4), np.int64), np.ones((1, 3), np.int64), ["a"]))
    (folder / NAME).write_bytes(whole[:at] + junk + whole[cut:])
    assert index.load(str(folder)).names in ([], ["a\n.png"])
    (folder / NAME).unlink()


names = st.text(st.characters(exclude_characters="\0/"), min_size=1)


@given(st.lists(st.tuples(names, st.text()), unique_by=lambda pair: pair[0]), st.data())
def test_what_is_written_is_read(pairs: list[tuple[str, str]], data: st.DataObject) -> None:
    numbers = st.integers(-(2**63), 2**63 - 1)
    small = st.integers(-1, 2**31 - 1)
    states = np.array([[data.draw(numbers) for _ in range(4)] for _ in pairs], np.int64).reshape(-1, 4)
    facts = np.array([[data.draw(small) for _ in range(3)] for _ in pairs], np.int64).reshape(-1, 3)
    kept = Index([name for name, _ in pairs], states, facts, [text for _, text in pairs])
    read = index._parse(index._written(kept))
    assert (read.names, read.texts) == (kept.names, kept.texts)
    assert np.array_equal(read.states, states)
    assert np.array_equal(read.facts, facts)


def test_a_folder_that_cannot_be_written_has_its_index_in_the_cache(
    folder: Path, make_spec: MakeSpec, settled: None
) -> None:
    (folder / NAME).mkdir()
    (folder / NAME / "in the way").touch()
    first = scan([make_spec(folder)])
    assert (folder / NAME).is_dir()
    assert list((cache_folder() / "lorasmith" / "folders").iterdir())
    with opened() as files:
        assert scan([make_spec(folder)]) == first
    assert files == []
    (folder / NAME / "in the way").unlink()
    (folder / NAME).rmdir()
    (folder / "0.png").write_bytes((folder / "2.png").read_bytes())
    assert scan([make_spec(folder)]).records[0].size == (62, 50)
    assert (folder / NAME).is_file()


def test_no_place_at_all_is_no_problem(
    folder: Path, make_spec: MakeSpec, settled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / NAME).mkdir()
    (folder / NAME / "in the way").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    assert scan([make_spec(folder)]) == scan([make_spec(folder)])


def test_damage_is_remembered_until_the_file_changes(
    folder: Path, make_picture: MakePicture, make_spec: MakeSpec
) -> None:
    remember_damages({folder / "1.jpg": "its third scan is damaged"})
    remember_damages({folder / "2.png": "bad pixels", folder / "gone.png": "bad pixels"})
    with pytest.raises(UserError) as error:
        scan([make_spec(folder)])
    assert [(Path(one.where).name, one.wrong) for one in error.value.problems] == [
        ("1.jpg", "its third scan is damaged"),
        ("2.png", "bad pixels"),
    ]
    time.sleep(0.02)
    make_picture(folder / "1.jpg", (61, 50))
    found = survey([make_spec(folder)])
    assert [Path(one.where).name for one in found.unreadable] == ["2.png"]
    assert len(found.records) == 5


def test_damage_and_headers_live_side_by_side(folder: Path, make_spec: MakeSpec, settled: None) -> None:
    scan([make_spec(folder)])
    remember_damages({folder / "1.jpg": "damaged"})
    with opened() as files:
        found = survey([make_spec(folder)])
    assert files == []
    assert [record.key for record in found.records] == ["0.png", "2.png", "3.jpg", "4.png", "5.jpg"]


def test_two_processes_at_once(folder: Path, make_spec: MakeSpec, settled: None) -> None:
    code = f"""
import time
from pathlib import Path
from library.data.sources import index
from library.data.sources.scan import scan
from library.options.specs import DatasetSpec, SubsetSpec
index.now = lambda: time.time() + 10
spec = DatasetSpec(1, (64, 64), (SubsetSpec(Path({str(folder)!r}), caption_extension=".txt"),))
for i in range(40):
    Path({str(folder)!r}, index.NAME).unlink(missing_ok=True)
    assert len(scan([spec]).records) == 6
"""
    runs = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment(), stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    for run in runs:
        _, told = run.communicate(timeout=120)
        assert run.returncode == 0, told.decode()
    scan([make_spec(folder)])
    with opened() as files:
        scan([make_spec(folder)])
    assert files == []
    assert [path.name for path in folder.iterdir() if path.name.startswith(NAME)] == [NAME]


def test_an_edit_during_a_slow_scan_is_noticed_where_times_are_whole_seconds(
    folder: Path, make_picture: MakePicture, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file system and the clock of this test: the picture is changed right after it was read, within the second in
    which it was written, and keeps its length; the reading of all takes ten seconds."""
    path = make_picture(folder / "0.bmp", (40, 60))
    other = make_picture(folder.parent / "other.bmp", (80, 30)).read_bytes()
    assert len(other) == path.stat().st_size
    second = int(path.stat().st_mtime)
    late = [0.0]
    states_of, probe = index.states_of, images.probe

    def coarse(place: str, names: list[str]) -> index.Numbers:
        found = states_of(place, names).copy()
        found[:, 1:3] = second * 10**9
        return found

    def slow(picture: str) -> object:
        found = probe(picture)
        late[0] = 10.0
        if picture.endswith(".bmp"):
            with path.open("r+b") as file:
                file.write(other)
            os.utime(path, (second, second))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(index, "states_of", coarse)
        patch.setattr(index, "now", lambda: second + 0.5 + late[0])
        patch.setattr(shelves, "probe", slow)
        assert scan([make_spec(folder)]).records[0].size == (40, 60)
        patch.setattr(shelves, "probe", probe)
        assert scan([make_spec(folder)]).records[0].size == (80, 30)


def test_a_picture_that_changes_while_it_is_read_is_not_remembered(
    folder: Path, make_spec: MakeSpec, settled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = images.probe

    def touching(picture: str) -> object:
        found = probe(picture)
        if picture.endswith("2.png"):
            os.utime(picture)
        return found

    monkeypatch.setattr(shelves, "probe", touching)
    scan([make_spec(folder)])
    assert "2.png" not in index.load(str(folder)).names
    assert "1.jpg" in index.load(str(folder)).names


def test_damage_of_a_picture_that_was_mended_meanwhile_is_forgotten(folder: Path, make_picture: MakePicture) -> None:
    paths = [folder / name for name in ("0.png", "2.png", "4.png")]
    before = {path: state for path in paths[:2] if (state := state_of(path))}
    time.sleep(0.02)
    make_picture(paths[0], (60, 50))
    remember_damages(dict.fromkeys(paths, "damaged"), before=before)
    assert index.load(str(folder)).names == ["2.png"]
    assert state_of(folder / "gone.png") is None


def test_a_header_never_takes_the_place_of_damage(folder: Path, make_spec: MakeSpec, settled: None) -> None:
    """Another process decodes a picture while this one, which doesn't know yet, writes its header down."""
    shelf = shelves.Shelf(str(folder))
    bar = LateBar("", 1)
    shelf.read_headers(["0.png", "2.png"], threads=1, progress=bar)
    remember_damages({folder / "2.png": "bad pixels"})
    shelf.close()
    shelf.close()
    assert [Path(one.where).name for one in survey([make_spec(folder)]).unreadable] == ["2.png"]
    assert set(index.load(str(folder)).names) >= {"0.png", "2.png"}


def test_damage_that_two_processes_find_at_once_is_kept_of_both(folder: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from library.data.sources.index import remember_damages
for i in range(60):
    path = Path({str(folder)!r}, sys.argv[1] + str(i))
    path.touch()
    remember_damages({{path: "damaged"}})
"""
    runs = [subprocess.Popen([sys.executable, "-c", code, name], cwd=ROOT, env=environment()) for name in "xy"]
    assert [run.wait(timeout=120) for run in runs] == [0, 0]
    assert set(index.load(str(folder)).names) == {f"{name}{i}" for name in "xy" for i in range(60)}


def test_what_killed_processes_left_is_swept(folder: Path, make_spec: MakeSpec, settled: None) -> None:
    old, young, other = (folder / f"{NAME}{ending}" for ending in (".4711.140245", ".4712.140246", ".mine"))
    for path in (old, young, other):
        path.write_text("part of an index")
        os.utime(path, (time.time() - 5000,) * 2)
    os.utime(young)
    scan([make_spec(folder)])
    assert {path.name for path in folder.iterdir() if path.name.startswith(NAME)} == {NAME, young.name, other.name}
