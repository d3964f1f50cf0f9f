"""What the flags of logs, of the Hugging Face hub and of processes do: what trackers, servers and torch get."""

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import PartialState

from tests.flags.effects import Runs, observes, same
from tests.hub_stand_in import StandIn, hub_stand_in
from tests.training.test_tracking import end_wandb, history, kept, scalars

KEY = "0123456789abcdef0123456789abcdef01234567"
REPO = "models/me/thing"


@observes("logging_dir", "log_prefix", "log_tracker_name", "log_config")
def test_tensorboard(runs: Runs) -> None:
    more = ("--log_prefix", "first-", "--log_tracker_name", "mine", "--log_config", "--train_batch_size", "4")
    ran = runs("--logging_dir", "@/logs", *more, "--max_train_steps", "4")
    (folder,) = (runs.root / "logs").iterdir()
    assert re.fullmatch(r"first-\d{14}", folder.name)
    shown = scalars(folder / "mine")
    for name in ("loss/current", "loss/average", "lr/unet", "lr/textencoder"):
        assert [step for step, _ in shown[name]] == [line["step"] for line in ran.steps]
        assert [value for _, value in shown[name]] == pytest.approx(ran.logged(name), rel=1e-6)
    assert [epoch for epoch, _ in shown["loss/epoch_average"]] == [1, 2]
    told = next((folder / "mine").glob("*/hparams.yml")).read_text(encoding="utf-8")
    assert "network_dim: 2\n" in told and "learning_rate: 0.01\n" in told and str(runs.root) not in told


def test_norms_of_what_is_trained_in_16_bits(runs: Runs) -> None:
    ran = runs("--log_norms", "--mixed_precision", "bf16", "--full_bf16", "--max_grad_norm", "0")
    blocks = [name for name in ran.lines[0] if name.startswith("norm/gradient/")]
    assert blocks and all(line > 0 for name in blocks for line in ran.logged(name)[-1:])


@observes("log_norms")
def test_norms_per_block(runs: Runs) -> None:
    ran, usual = runs("--log_norms"), runs()
    assert same(ran, usual)
    blocks = [name.removeprefix("norm/gradient/") for name in ran.steps[0] if name.startswith("norm/gradient/")]
    assert len(blocks) > 5 and not [name for name in usual.steps[0] if "norm/weight/" in name]
    for line in ran.steps:
        whole = sum(line[f"norm/gradient/{block}"] ** 2 for block in blocks) ** 0.5
        assert whole == pytest.approx(line["norm/grad_norm"], rel=1e-4)
        assert 0 < line["norm/avg_grad_norm"] < whole
        assert 0 < line["norm/avg_key_norm"] < line["norm/avg_combined_norm"]
        assert all(line[f"norm/weight/{block}"] > 0 for block in blocks)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    end_wandb()
    yield
    end_wandb()


@observes("log_with", "wandb_run_name", "log_tracker_config")
@pytest.mark.usefixtures("offline")
def test_wandb_and_all(runs: Runs) -> None:
    (runs.root / "trackers.toml").write_text("[wandb]\ntags = ['small']\n[tensorboard]\nfilename_suffix = '.mine'\n")
    (runs.root / "prompt.txt").write_text("a thing --w 64 --h 64 --s 2 --d 7\n")
    previews = ("--sample_prompts", "@/prompt.txt", "--sample_every_n_steps", "2")
    table = ("--log_tracker_config", "@/trackers.toml", "--logging_dir", "@/all")
    ran = runs.fresh("--log_with", "all", "--wandb_run_name", "nice", *table, *previews)
    end_wandb()
    (run,) = [record.run for record in kept(runs.root / "all") if record.WhichOneof("record_type") == "run"]
    assert (run.project, run.display_name, list(run.tags)) == ("network_train", "nice", ["small"])
    rows = history(runs.root / "all")
    losses = {int(row["step"]): float(row["loss/current"]) for row in rows if "loss/current" in row}
    assert list(losses) == [line["step"] for line in ran.steps]
    assert list(losses.values()) == pytest.approx(ran.losses)
    (shown,) = [row for row in rows if "sample_0/width" in row]
    assert (shown["step"], shown["sample_0/width"]) == ("2", "64")
    (events,) = (runs.root / "all").glob("2*/network_train/events*")
    assert events.name.endswith(".mine")


@contextmanager
def wandb_stand_in(keys: set[str]) -> Iterator[str]:
    """The address of a server in wandb's place, which welcomes everybody and notes the keys that it is given."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:  # the base class calls it so
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            _, _, encoded = (self.headers.get("Authorization") or "").partition(" ")
            keys.add(base64.b64decode(encoded).decode())
            viewer = {"id": "1", "username": "me", "entity": "me", "flags": "{}", "teams": {"edges": []}}
            raw = json.dumps({"data": {"viewer": viewer}}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@observes("wandb_api_key")
@pytest.mark.usefixtures("offline")
def test_the_key_is_that_of_the_login(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The login is one at a server on this machine; the run itself is then offline by its table of settings."""
    monkeypatch.delenv("WANDB_MODE")
    (runs.root / "offline.toml").write_text("[wandb]\nmode = 'offline'\n")
    more = ("--log_tracker_config", "@/offline.toml")
    keys: set[str] = set()
    with wandb_stand_in(keys) as address:
        monkeypatch.setenv("WANDB_BASE_URL", address)
        ran = runs.fresh("--log_with", "wandb", "--wandb_api_key", KEY, *more)
        end_wandb()
    assert keys - {""} == {f"api:{KEY}"}
    assert "--wandb_api_key: " in ran.err
    everything = b"".join(path.read_bytes() for path in ran.folder.rglob("*") if path.is_file())
    assert len(kept(ran.folder)) > 2 and KEY.encode() not in everything and KEY not in ran.err


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with hub_stand_in() as made:
        monkeypatch.setattr(constants, "ENDPOINT", made.address)
        files = made.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        yield made


UPLOAD = ("--huggingface_repo_id", "me/thing", "--huggingface_token", "hf_mine")


@observes("huggingface_repo_id", "huggingface_token", "huggingface_repo_visibility")
def test_files_are_sent_to_a_repository(runs: Runs, hub: StandIn) -> None:
    ran = runs.fresh(*UPLOAD, "--save_every_n_steps", "1", "--save_state_on_train_end")
    assert hub.files[REPO] == {path.name: path.read_bytes() for path in ran.folder.glob("*.safetensors")}
    assert len(hub.files[REPO]) == 3 and hub.private == {REPO: True} and hub.tokens == {"Bearer hf_mine"}
    open_one = ("--huggingface_repo_id", "me/open", "--huggingface_token", "hf_mine")
    runs.fresh(*open_one, "--huggingface_repo_visibility", "public")
    assert hub.private["models/me/open"] is False


def test_files_in_folders_are_sent_into_folders(runs: Runs, hub: StandIn) -> None:
    token = ("--token_string", "blorpy", "--caption_prefix", "blorpy ", "--save_embedding_as", "webui", "diffusers")
    ran = runs.fresh(*UPLOAD, *token, "--network_train_unet_only")
    names = ("x.safetensors", "x-blorpy.safetensors", "webui/x-blorpy.pt", "diffusers/x-blorpy.safetensors")
    assert hub.files[REPO] == {name: (ran.folder / name).read_bytes() for name in names}
    assert not list(ran.folder.rglob(".uploading"))


def test_a_repository_of_ones_own_is_named_like_the_output_folder(runs: Runs, hub: StandIn) -> None:
    folder = runs.root / "pushed"
    runs.fresh("--push_to_hub", "--hub_token", "hf_mine", "--output_dir", str(folder))
    assert hub.files == {"models/me/pushed": {"x.safetensors": (folder / "x.safetensors").read_bytes()}}


@observes("huggingface_path_in_repo", "huggingface_repo_type", "save_state_to_huggingface", "resume_from_huggingface")
def test_a_state_is_sent_and_resumed_from_there(runs: Runs, hub: StandIn) -> None:
    place = ("--huggingface_path_in_repo", "runs/1", "--huggingface_repo_type", "dataset")
    states = ("--save_state", "--save_every_n_steps", "1", "--save_state_to_huggingface")
    runs.fresh(*UPLOAD, *place, *states)
    stored = hub.files["datasets/me/thing"]
    parts = ("manifest.json", "optimizer.pt", "trained.safetensors")
    assert {f"runs/1/x-step00000001-state/{name}" for name in parts} | {"runs/1/x.safetensors"} <= stored.keys()
    assert all(name.startswith("runs/1/") for name in stored)
    spec = "me/thing/runs/1/x-step00000001-state:main:dataset"
    ran = runs.fresh("--resume", spec, "--resume_from_huggingface", "--huggingface_token", "hf_mine")
    assert "at step 1 of 2" in ran.err and len(ran.steps) == 1
    assert same(ran, runs())


@observes("async_upload")
def test_training_goes_on_while_files_are_sent(runs: Runs, hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server takes nothing before the last weights are written: only a run that doesn't wait comes that far."""
    from library.training.uploads import Uploader

    hub.gate.clear()
    finish, before = Uploader.finish, []

    def finish_and_note(self: Uploader) -> Any:
        before.append(dict(hub.files[REPO]))
        hub.gate.set()
        return finish(self)

    monkeypatch.setattr(Uploader, "finish", finish_and_note)
    ran = runs.fresh(*UPLOAD, "--async_upload", "--save_every_n_steps", "1")
    assert before == [{}]
    assert hub.files[REPO] == {path.name: path.read_bytes() for path in ran.folder.glob("*.safetensors")}


@observes("ddp_timeout")
def test_processes_join_with_the_timeout(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run that is one of two gives to torch when it joins the other one; test_distributed.py has processes that
    really wait so long."""

    class JoinedError(Exception):
        pass

    given: list[timedelta] = []

    def join(*, timeout: timedelta, **_: object) -> None:
        given.append(timeout)
        raise JoinedError

    monkeypatch.setattr(torch.distributed, "init_process_group", join)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    for flags in (("--ddp_timeout", "7"), ()):
        PartialState._reset_state()
        try:
            with pytest.raises(JoinedError):
                runs.fresh(*flags)
        finally:
            PartialState._reset_state()
    assert given == [timedelta(minutes=7), timedelta(minutes=30)]
