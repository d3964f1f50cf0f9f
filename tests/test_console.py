"""Messages: on stderr, or in a file that is made anew, where errors are told in both places."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from library import console
from library.errors import Problem, UserError
from tests.programs import ROOT, environment


@pytest.fixture(autouse=True)
def back_to_stderr() -> Iterator[None]:
    yield
    console.write_to(None)
    console.set_level("INFO")


def told(path: Path) -> list[str]:
    """The lines of the file, without their times."""
    lines = path.read_text(encoding="utf-8").splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in lines)
    return [line[20:] for line in lines]


def test_messages_go_to_the_file_and_bars_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "log.txt"
    console.write_to(path)
    console.say("one [red]line[/red]")
    console.warn("strange: \udc80 ö")
    console.error("the end")
    for _ in console.track(range(3), "counting", 3):
        console.say("within")
    assert told(path) == ["one [red]line[/red]", "warning: strange: ? ö", "error: the end", *["within"] * 3]
    shown = capsys.readouterr().err
    assert "error: the end" in shown and "counting" in shown
    assert "one" not in shown and "strange" not in shown and "within" not in shown


def test_the_file_is_made_anew_and_left_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log.txt"
    path.write_text("an old run\n", encoding="utf-8")
    console.write_to(path)
    console.set_level("WARNING")
    console.say("unimportant")
    console.tell_at_once("unimportant, too")
    console.warn("important")
    console.write_to(None)
    console.warn("elsewhere")
    assert told(path) == ["warning: important"]
    assert capsys.readouterr().err == "warning: elsewhere\n"


def test_without_a_line_nothing_is_written(tmp_path: Path) -> None:
    old = tmp_path / "log.txt"
    old.write_text("an old run\n", encoding="utf-8")
    for path in (tmp_path / "new" / "log.txt", old):
        console.write_to(path)
        console.set_level("ERROR")
        console.say("unimportant")
        console.write_to(None)
    assert [one.name for one in tmp_path.iterdir()] == ["log.txt"]
    assert old.read_text(encoding="utf-8") == "an old run\n"


def test_a_folder_that_can_not_be_made_after_all_is_made_up_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    console.write_to(tmp_path / "file" / "log.txt")
    console.say("told all the same")
    assert capsys.readouterr().err == "told all the same\n"


def test_a_file_that_can_not_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"--console_log_file: .* can't be written"):
        console.write_to(tmp_path)
    console.write_to(Path("/dev/full"))
    console.say("told all the same")
    assert "told all the same" in capsys.readouterr().err


def test_what_a_signal_handler_says_reaches_the_file(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    code = f"from pathlib import Path; from library import console; console.write_to(Path({str(path)!r})); "
    code += "console.tell_at_once('stopping after this step')"
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert told(path) == ["stopping after this step"] and run.stderr == ""


def test_what_is_wrong_with_a_file_given_twice_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    problems = [
        Problem("a.safetensors", "is damaged"),
        Problem("b", "is no file"),
        Problem("a.safetensors", "is damaged"),
    ]
    assert console.complain(UserError(problems)) == 2
    assert capsys.readouterr().err.splitlines() == ["error: a.safetensors: is damaged", "error: b: is no file"]


def test_a_tool_whose_output_is_lost_has_failed(tmp_path: Path) -> None:
    save_file({"a": np.ones(1)}, tmp_path / "a.safetensors", {"k": "v"})
    command = [sys.executable, str(ROOT / "tools" / "show_metadata.py"), str(tmp_path / "a.safetensors")]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, env=environment(), stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: stdout: No space left on device"
