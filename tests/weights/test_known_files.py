"""Values of files are remembered for exactly those files, and a broken memory is only forgetful."""

from pathlib import Path

import pytest

from library.known_files import KnownFiles


def test_a_value_holds_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file, other = tmp_path / "a", tmp_path / "b"
    file.write_text("one")
    other.write_text("one")
    KnownFiles("subject").add(file, "value")
    assert KnownFiles("subject").get(file) == "value"
    assert KnownFiles("subject").get(other) is None
    assert KnownFiles("other_subject").get(file) is None
    other.replace(file)
    assert KnownFiles("subject").get(file) is None, "the same name, size and text, but another file"


@pytest.mark.parametrize("text", ["", "[]", "{", '{"x": 3}', '{"x": [[1], 2, 3]}'])
def test_a_damaged_memory_knows_nothing(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "lorasmith").mkdir()
    (tmp_path / "lorasmith/subject.json").write_text(text)
    file = tmp_path / "a"
    file.write_text("one")
    assert KnownFiles("subject").get(file) is None
    KnownFiles("subject").add(file, "value")
    assert KnownFiles("subject").get(file) == "value"


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lorasmith").write_text("a file in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    KnownFiles("subject").add(tmp_path / "lorasmith", "value")
    assert KnownFiles("subject").get(tmp_path / "lorasmith") is None
