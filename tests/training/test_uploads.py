"""Uploads: checked before a run, sent in order, never at the cost of a run or of a local file."""

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from library.errors import UserError
from library.options.output import Hub
from library.training.state import RunState, read_state, write_state
from library.training.uploads import SPOOL, HubPlace, Uploader, fetch_state
from tests.hub_stand_in import StandIn, hub_stand_in

REPO = "models/me/lora"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with hub_stand_in() as made:
        yield made


def uploader(hub: StandIn, *, background: bool = False, states: bool = False, **place: object) -> Uploader:
    values: dict[str, Any] = {"repo": "me/lora", "token": "hf_secret", "endpoint": hub.address, **place}
    return Uploader(HubPlace(**values), states=states, background=background)


def test_a_new_repository_is_private_unless_told_otherwise(hub: StandIn) -> None:
    uploader(hub).check()
    uploader(hub, repo="me/open", public=True).check()
    uploader(hub, repo="me/sheets", kind="dataset").check()
    assert hub.private == {REPO: True, "models/me/open": False, "datasets/me/sheets": True}
    assert hub.tokens == {"Bearer hf_secret"}
    uploader(hub).check()
    assert len(hub.private) == 3


def test_a_repository_without_a_user_is_the_tokens_own(
    hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    (tmp_path / "x.safetensors").write_text("x")
    for _ in range(2):
        sender = uploader(hub, repo="lora")
        sender.check()
        sender.send(tmp_path / "x.safetensors")
        assert sender.finish() == () and sender.address == "me/lora"
    assert hub.private == {REPO: True} and hub.files[REPO] == {"x.safetensors": b"x"}
    assert hub.tokens == {"Bearer hf_secret"}
    assert capsys.readouterr().err.count("made the private repository me/lora on the hub") == 1
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(UserError, match=r"can't send files to lora: without a token.*give --huggingface_token"):
        uploader(hub, repo="lora", token=None).check()


def test_an_existing_repository_keeps_its_visibility_and_says_so(
    hub: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add(REPO, private=False)
    uploader(hub, public=False).check()
    assert "me/lora exists and stays public" in capsys.readouterr().err
    assert hub.private == {REPO: False}


def test_what_is_not_allowed_is_one_message_before_the_run(hub: StandIn) -> None:
    hub.add(REPO)
    hub.readers.add(REPO)
    with pytest.raises(UserError, match=r"can't send files to me/lora: it is not there, or not open to you.*may write"):
        uploader(hub).check()
    with pytest.raises(UserError, match="check the network"):
        uploader(hub, endpoint="http://127.0.0.1:9").check()


@pytest.mark.parametrize("background", [False, True])
def test_files_and_states_arrive_in_their_folder(hub: StandIn, tmp_path: Path, background: bool) -> None:
    hub.add(REPO)
    (tmp_path / "x.safetensors").write_bytes(b"weights")
    (tmp_path / "x-state").mkdir()
    (tmp_path / "x-state/manifest.json").write_text("{}")
    for states in (False, True):
        sender = uploader(hub, background=background, states=states, folder="runs/1")
        sender.send(tmp_path / "x.safetensors")
        sender.send(tmp_path / "x-state")
        assert sender.finish() == ()
        expected = {"runs/1/x.safetensors"} | ({"runs/1/x-state/manifest.json"} if states else set())
        assert hub.files[REPO].keys() == expected
    assert hub.files[REPO]["runs/1/x.safetensors"] == b"weights"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x-state", "x.safetensors"]


def test_in_the_background_a_file_is_sent_as_it_was_saved(hub: StandIn, tmp_path: Path) -> None:
    hub.add(REPO)
    hub.gate.clear()
    sender = uploader(hub, background=True, states=True)
    best, old, state = tmp_path / "x-best.safetensors", tmp_path / "x-000001.safetensors", tmp_path / "x-state"
    best.write_bytes(b"first best")
    old.write_bytes(b"expires")
    state.mkdir()
    (state / "manifest.json").write_text("1")
    for path in (best, old, state):
        sender.send(path)
    newer = tmp_path / "newer"
    newer.write_bytes(b"second best")
    newer.replace(best)
    old.unlink()
    shutil.rmtree(state)
    assert hub.files[REPO] == {}
    hub.gate.set()
    assert sender.finish() == ()
    assert hub.files[REPO] == {
        "x-best.safetensors": b"first best",
        "x-000001.safetensors": b"expires",
        "x-state/manifest.json": b"1",
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x-best.safetensors"]


@pytest.mark.parametrize("background", [False, True])
def test_a_failure_is_a_warning_and_is_tried_again_at_the_end(
    hub: StandIn, tmp_path: Path, background: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add(REPO)
    hub.refuses = {"once.safetensors": 1, "never.safetensors": 9, "expired.safetensors": 9}
    sender = uploader(hub, background=background)
    for name in ("once", "never", "expired"):
        (tmp_path / f"{name}.safetensors").write_text(name)
        sender.send(tmp_path / f"{name}.safetensors")
    (tmp_path / "expired.safetensors").unlink()
    lost = sender.finish()
    assert hub.files[REPO] == {"once.safetensors": b"once"}
    assert lost == (tmp_path / "never.safetensors", tmp_path / "expired.safetensors")
    assert [path.read_text() for path in lost] == ["never", "expired"]
    assert not (tmp_path / SPOOL).exists()
    said = " ".join(capsys.readouterr().err.split())
    assert f"{tmp_path}/never.safetensors was not sent to me/lora" in said
    assert f"not sent to me/lora: {tmp_path}/never.safetensors, {tmp_path}/expired.safetensors" in said
    assert "hf_secret" not in said


def test_leftovers_of_a_run_that_has_ended_are_taken_away(hub: StandIn, tmp_path: Path) -> None:
    hub.add(REPO)
    dead = tmp_path / SPOOL / f"{socket.gethostname()}-999999999-1"
    alive = tmp_path / SPOOL / f"{socket.gethostname()}-1-1"
    for folder in (dead, alive):
        folder.mkdir(parents=True)
    (tmp_path / "x.safetensors").write_text("x")
    sender = uploader(hub)
    sender.send(tmp_path / "x.safetensors")
    assert sender.finish() == ()
    assert not dead.exists() and alive.exists()


def test_a_state_goes_to_the_hub_and_comes_back(hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    hub.add(REPO)
    state = RunState(3, 1, 2.0, 4, 12, 12, (0.5,), {"seed": "4"}, {})
    write_state(tmp_path / "x-state", state, {"a": torch.ones(2)}, {"optimizer": {"step": 3}})
    sender = uploader(hub, states=True, folder="runs")
    sender.send(tmp_path / "x-state")
    assert sender.finish() == ()
    for spec in ("me/lora/runs/x-state", "me/lora/runs/x-state:main:model", "me/lora/runs/x-state:"):
        assert read_state(fetch_state(spec, "hf_secret", hub.address)) == state
    with pytest.raises(UserError, match="me/lora has no folder runs/y-state"):
        fetch_state("me/lora/runs/y-state", None, hub.address)
    with pytest.raises(UserError, match=r"can't fetch the state me/none/x: it is not there.*may read"):
        fetch_state("me/none/x", None, hub.address)
    with pytest.raises(UserError, match="is no state on the hub"):
        fetch_state("me/lora", None, hub.address)


def test_the_flags_say_where() -> None:
    flags = Hub(
        huggingface_repo_id="me/lora",
        huggingface_repo_type="dataset",
        huggingface_path_in_repo="/a/b/",
        huggingface_repo_visibility="public",
        huggingface_token="hf_x",
    )
    assert HubPlace.of(flags) == HubPlace("me/lora", "dataset", "a/b", True, "hf_x")
    made = Uploader.of(flags)
    assert made is not None and made.address == "datasets/me/lora/a/b"
    assert "hf_x" not in repr(HubPlace.of(flags))
    assert Uploader.of(Hub()) is None
