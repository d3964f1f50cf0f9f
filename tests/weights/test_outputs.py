"""Where new files can't stand, told before they are made."""

import os
import shutil
from pathlib import Path

import pytest

from library.tool_script import run
from library.weights.outputs import folder_problems, inside_problems, new_folder, output_problems, tell_replaced


def told(path: Path) -> list[str]:
    return [str(problem) for problem in output_problems(path, "--save_to", (".safetensors", ".pt"))]


def test_new_files_in_folders_that_are_not_there_yet(tmp_path: Path) -> None:
    assert told(tmp_path / "new" / "folder" / "x.pt") == []
    assert told(Path("x.safetensors")) == []
    assert list(tmp_path.iterdir()) == []


def test_what_speaks_against_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    assert told(tmp_path / "x.bin") == [f"--save_to {tmp_path}/x.bin: ends in .bin; use .safetensors or .pt"]
    assert told(tmp_path / "x") == [f"--save_to {tmp_path}/x: has no ending; use .safetensors or .pt"]
    assert "is a folder" in told(tmp_path / "folder.pt")[0]
    assert f"{tmp_path}/file is no folder" in told(tmp_path / "file" / "x.pt")[0]
    assert f"{tmp_path}/link is no folder" in told(tmp_path / "link" / "x.pt")[0]


def test_folders_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o500)
    if os.geteuid() == 0:
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path).stat().st_mode & 0o222 != 0)
    assert "no permission" in told(tmp_path / "x.pt")[0]


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "new") as folder:
        folder.mkdir()
        (folder / "half").write_text("written")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    (tmp_path / "new").mkdir()
    assert not list(folder_problems(tmp_path / "new", "dst"))
    with new_folder(tmp_path / "new") as folder:
        folder.mkdir()
        (folder / "file").write_text("all")
    assert [one.name for one in tmp_path.rglob("*")] == ["new", "file"]
    (problem,) = folder_problems(tmp_path / "new", "dst")
    assert "isn't empty" in problem.wrong


def test_new_folders_in_what_they_are_made_of(tmp_path: Path) -> None:
    assert not list(inside_problems(tmp_path / "no", tmp_path / "no" / "x", "dst"))
    assert not list(inside_problems(tmp_path / "a", tmp_path / "b", "dst"))
    (problem,) = inside_problems(tmp_path, tmp_path / "a" / "b", "dst")
    assert problem.wrong == f"lies within {tmp_path}"


def test_replaced_files_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x"
    tell_replaced(file, [file])
    file.touch()
    tell_replaced(file, [tmp_path / "y"])
    assert not capsys.readouterr().err
    tell_replaced(file, [tmp_path / "y", tmp_path / "." / "x"])
    assert "it is replaced" in capsys.readouterr().err


def test_a_folder_that_cannot_be_copied_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def full(source: str, target: str) -> None:
        raise OSError(28, "No space left on device", source, None, target)

    old = tmp_path / "old"
    old.mkdir()
    for name in ("a", "b"):
        (old / name).touch()
    assert run(lambda: shutil.copytree(old, tmp_path / "new", copy_function=full)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path}/new/") and line.endswith(": No space left on device")
