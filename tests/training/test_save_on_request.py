"""A save that somebody asks for where one is due anyway: it gets a state, and what it expires goes all the same."""

from pathlib import Path

import pytest

from library.training.requests import Requests
from tests.training.test_readings import train


def test_it_is_the_save_that_is_due_with_a_state(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = iter([None, None, None, "save", None])
    monkeypatch.setattr(Requests, "poll", lambda self: next(asked))
    saves = ("--save_every_n_steps", "1", "--save_last_n_steps", "1", "--output_name", "x")
    assert train(tiny_sd1, tmp_path, "--network_module", "networks.lora", *saves) == 0
    names = {path.name for path in (tmp_path / "output").iterdir() if path.name != "x.log.jsonl"}
    kept = {f"x-step{step:08d}.safetensors" for step in (4, 5)}
    assert names == {"x.safetensors", "x-step00000004-state", *kept}
