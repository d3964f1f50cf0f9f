"""`touch save_now` and `touch stop`: seen once, soon, and never before the run began."""

from pathlib import Path

import pytest

from library.training.requests import Requests


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_wish_is_seen_once_and_its_file_goes(tmp_path: Path) -> None:
    clock = Clock()
    requests = Requests(tmp_path, clock=clock)
    assert requests.poll() is None
    for name, wish in (("save_now", "save"), ("stop", "stop")):
        (tmp_path / name).touch()
        clock.now += 1
        assert requests.poll() == wish
        clock.now += 1
        assert requests.poll() is None
        assert not (tmp_path / name).exists()


def test_stop_counts_before_save_and_leaves_nothing_behind(tmp_path: Path) -> None:
    requests = Requests(tmp_path, interval=0)
    (tmp_path / "save_now").touch()
    (tmp_path / "stop").touch()
    assert requests.poll() == "stop"
    assert requests.poll() is None
    assert list(tmp_path.iterdir()) == []


def test_it_looks_at_most_every_interval(tmp_path: Path) -> None:
    clock = Clock()
    requests = Requests(tmp_path, interval=0.5, clock=clock)
    assert requests.poll() is None
    (tmp_path / "save_now").touch()
    clock.now += 0.4
    assert requests.poll() is None
    clock.now += 0.1
    assert requests.poll() == "save"


def test_files_from_before_the_run_do_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "stop").touch()
    requests = Requests(tmp_path, interval=0)
    assert "is from before this run and was removed" in capsys.readouterr().err
    assert requests.poll() is None


def test_folders_of_that_name_and_a_missing_output_folder_are_no_wishes(tmp_path: Path) -> None:
    (tmp_path / "stop").mkdir()
    assert Requests(tmp_path, interval=0).poll() is None
    assert (tmp_path / "stop").is_dir()
    assert Requests(tmp_path / "later", interval=0).poll() is None


def test_a_file_that_stays_counts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = Requests(tmp_path, interval=0)
    (tmp_path / "save_now").touch()

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    assert requests.poll() == "save"
    assert requests.poll() is None
    assert "can't be removed (Permission denied)" in capsys.readouterr().err
