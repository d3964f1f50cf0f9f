"""Where new files can't stand, told before they are made."""

import os
from pathlib import Path

import pytest

from library.weights.outputs import output_problems


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


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folders_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "no permission" in told(tmp_path / "x.pt")[0]
