"""Values of files are remembered for exactly those files, and a broken memory is only forgetful."""

import os
from pathlib import Path

import pytest

from library.known_files import KnownFiles


@pytest.fixture
def reads() -> list[Path]:
    """What was read, in order."""
    return []


def old(path: Path, text: str = "one") -> Path:
    """A file that was written some time ago."""
    path.write_text(text)
    os.utime(path, (1_000_000, 1_000_000))
    return path


def value(path: Path, reads: list[Path], subject: str = "subject") -> str:
    def read(wanted: Path) -> str:
        reads.append(wanted)
        return wanted.read_text()

    return KnownFiles(subject).value(path, read)


def test_a_value_holds_until_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[Path]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file, other = old(tmp_path / "a"), old(tmp_path / "b")
    assert [value(file, reads) for _ in range(3)] == ["one"] * 3
    assert reads == [file]
    value(other, reads)
    value(file, reads, "another_subject")
    assert len(reads) == 3
    other.replace(file)
    assert value(file, reads) == "one"
    assert len(reads) == 4, "the same name, size, text and time, but another file"


def test_a_file_that_has_just_changed_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[Path]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "a").write_text("one")
    value(tmp_path / "a", reads)
    value(tmp_path / "a", reads)
    assert len(reads) == 2


def test_a_file_that_changes_while_it_is_read_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = old(tmp_path / "a")

    def read(path: Path) -> str:
        found = path.read_text()
        old(path, "two")
        return found

    assert KnownFiles("subject").value(file, read) == "one"
    assert KnownFiles("subject").value(file, Path.read_text) == "two"


@pytest.mark.parametrize("text", ["", "[]", "{", '{"x": 3}', '{"x": [[1], 2, 3]}'])
def test_a_damaged_memory_knows_nothing(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[Path]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "lorasmith").mkdir()
    (tmp_path / "lorasmith/subject.json").write_text(text)
    file = old(tmp_path / "a")
    assert value(file, reads) == value(file, reads) == "one"
    assert len(reads) == 1


@pytest.mark.parametrize("named", [True, False])
def test_a_folder_that_cannot_be_had_is_no_error(
    named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[Path]
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    (tmp_path / "lorasmith").write_text("a file in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path) if named else "")
    monkeypatch.setattr(Path, "home", homeless)
    file = old(tmp_path / "a")
    assert value(file, reads) == value(file, reads) == "one"
    assert len(reads) == 2
