"""Where numbers go: TensorBoard, wandb without a network, and which options either is told."""

import struct
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from library.errors import UserError
from library.options.network import Network
from library.options.output import Output
from library.options.registry import Options
from library.options.reporting import Logging
from library.training.distributed import join_processes
from library.training.json_log import log_path
from library.training.tracking import LossAverage, NoTracker, Several, build_tracker

pytest.importorskip("wandb")
SECRET = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr("sys.argv", ["train_network.py", "--wandb_api_key", SECRET])
    join_processes()
    yield
    end_wandb()


def end_wandb() -> None:
    """Have wandb's own process finish its files, as at the end of a program."""
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


def options(tmp_path: Path, **more: Any) -> Options:
    output = Output(output_dir=tmp_path / "out", output_name="cat")
    return Options(logging=Logging(**more), output=output, network=Network(network_dim=8))


def log_some(tracked: Options, tmp_path: Path) -> None:
    tracker = build_tracker(tracked, tmp_path / "out", True, None)
    tracker.log({"loss/validation/epoch_average": 0.75}, 0)
    tracker.log({"loss/current": 0.5, "lr/unet": 0.25}, 1)
    tracker.log({"loss/current": 0.375, "lr/unet": 0.125}, 2)
    tracker.log({"loss/epoch_average": 0.4375}, 1)
    tracker.close()
    end_wandb()


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [(one.step, one.value) for one in events.Scalars(name)] for name in events.Tags()["scalars"]}


def chunks(path: Path) -> Iterator[bytes]:
    """The records of wandb's own file: LevelDB's log format after a header of seven bytes."""
    raw, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(raw):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", raw[at : at + 7])
        whole += raw[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield whole
            whole = b""


def kept(folder: Path) -> list[Any]:
    """What wandb kept of its only run."""
    proto: Any = import_module("wandb.proto.wandb_internal_pb2")
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    records = []
    for chunk in chunks(path):
        record = proto.Record()
        record.ParseFromString(chunk)
        records.append(record)
    return records


def history(folder: Path) -> list[dict[str, str]]:
    rows = [record.history.item for record in kept(folder) if record.WhichOneof("record_type") == "history"]
    named = [{(item.key or "/".join(item.nested_key)): item.value_json for item in row} for row in rows]
    return [{name: value for name, value in row.items() if not name.startswith("_")} for row in named]


@pytest.mark.parametrize(
    ("script", "given", "name"),
    [
        ("train_network", None, "network_train"),
        ("train_textual_inversion", None, "textual_inversion"),
        ("train_textual_inversion", "mine", "mine"),
    ],
)
def test_trackers_call_a_run_by_its_script(script: str, given: str | None, name: str, tmp_path: Path) -> None:
    tracked = options(tmp_path, logging_dir=tmp_path / "logs", log_tracker_name=given)
    log_some(tracked.model_copy(update={"script": script}), tmp_path)
    (folder,) = (tmp_path / "logs").iterdir()
    assert "loss/current" in scalars(folder / name)


def test_nothing_but_the_log_where_nothing_is_asked_for(tmp_path: Path) -> None:
    log_some(options(tmp_path), tmp_path)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["cat.log.jsonl"]
    assert isinstance(build_tracker(options(tmp_path, log_with="all"), tmp_path, False, None), NoTracker)


def test_tensorboard_in_its_folder_with_settings(tmp_path: Path) -> None:
    config = tmp_path / "trackers.toml"
    config.write_text("[tensorboard]\nfilename_suffix = '.mine'\n[wandb]\nname = 'x'\n", encoding="utf-8")
    more = {"log_prefix": "first-", "log_tracker_name": "tracked", "log_tracker_config": str(config)}
    log_some(options(tmp_path, logging_dir=tmp_path / "logs", log_config=True, **more), tmp_path)
    (folder,) = (tmp_path / "logs").iterdir()
    assert folder.name.startswith("first-20") and len(folder.name) == len("first-") + 14
    (events,) = (folder / "tracked").glob("events*")
    assert events.name.endswith(".mine")
    assert scalars(folder / "tracked") == {
        "loss/validation/epoch_average": [(0, 0.75)],
        "loss/current": [(1, 0.5), (2, 0.375)],
        "lr/unet": [(1, 0.25), (2, 0.125)],
        "loss/epoch_average": [(1, 0.4375)],
    }
    told = next((folder / "tracked").glob("*/hparams.yml")).read_text(encoding="utf-8")
    assert "network_dim: 8" in told and str(tmp_path) not in told
    assert not (tmp_path / "out" / "wandb").exists()


def test_wandb_without_a_network(tmp_path: Path) -> None:
    more = {"log_with": "wandb", "wandb_run_name": "mine", "log_tracker_name": "cats", "wandb_api_key": SECRET}
    log_some(options(tmp_path, log_config=True, **more), tmp_path)
    assert history(tmp_path / "out") == [
        {"loss/validation/epoch_average": "0.75", "epoch": "0"},
        {"loss/current": "0.5", "lr/unet": "0.25", "step": "1"},
        {"loss/current": "0.375", "lr/unet": "0.125", "step": "2"},
        {"loss/epoch_average": "0.4375", "epoch": "1"},
    ]
    records = kept(tmp_path / "out")
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert (run.project, run.display_name) == ("cats", "mine")
    metrics = {record.metric.name: record.metric.step_metric for record in records if record.metric.name}
    assert metrics["loss/current"] == "step" and metrics["loss/epoch_average"] == "epoch"
    sent = {item.key: item.value_json for record in records for item in record.config.update}
    assert sent["network_dim"] == "8" and "output_dir" not in sent
    everything = b"".join(path.read_bytes() for path in (tmp_path / "out" / "wandb").rglob("*") if path.is_file())
    assert SECRET.encode() not in everything


def test_previews_are_shown_in_wandb(tmp_path: Path) -> None:
    picture = tmp_path / "sample.png"
    Image.new("RGB", (16, 8), (200, 10, 30)).save(picture)
    tracker = build_tracker(options(tmp_path, log_with="all", logging_dir=tmp_path / "logs"), tmp_path, True, None)
    tracker.log({"loss/current": 0.5}, 1)
    tracker.show({"sample_0": picture}, 1)
    tracker.close()
    end_wandb()
    _, shown = history(tmp_path / "logs")
    assert (shown["step"], shown["sample_0/width"], shown["sample_0/height"]) == ("1", "16", "8")
    (copy,) = (tmp_path / "logs" / "wandb").rglob("*.png")
    assert Image.open(copy).getpixel((3, 3)) == (200, 10, 30)


def test_all_of_them_and_a_table_wins_over_the_flag(tmp_path: Path) -> None:
    config = tmp_path / "trackers.toml"
    config.write_text("[wandb]\nname = 'from the table'\ntags = ['a']\n", encoding="utf-8")
    more = {"logging_dir": tmp_path / "logs", "log_tracker_config": str(config), "wandb_run_name": "from the flag"}
    log_some(options(tmp_path, log_with="all", **more), tmp_path)
    (run,) = [record.run for record in kept(tmp_path / "logs") if record.WhichOneof("record_type") == "run"]
    assert (run.project, run.display_name, list(run.tags)) == ("network_train", "from the table", ["a"])
    assert [item.key for item in run.config.update] == ["_wandb"]
    (folder,) = (tmp_path / "logs").glob("20*")
    assert "loss/current" in scalars(folder / "network_train")
    assert log_path(tmp_path / "out", "cat").is_file()


def test_a_tracker_that_does_not_start_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(UserError, match=r"--log_with: wandb doesn't start: .*API key.*; see `wandb login`"):
        build_tracker(options(tmp_path, log_with="wandb"), tmp_path / "out", True, None)
    config = tmp_path / "trackers.toml"
    config.write_text("[wandb]\nnonsense = 1\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"--log_tracker_config: wandb doesn't start: TypeError.*nonsense"):
        build_tracker(options(tmp_path, log_with="wandb", log_tracker_config=str(config)), tmp_path, True, None)


def test_a_tracker_that_fails_ends_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    class Failing(NoTracker):
        def log(self, values: Mapping[str, float], step: int) -> None:
            raise OSError("no space left")

    class Listing(NoTracker):
        def __init__(self) -> None:
            self.steps: list[int] = []

        def log(self, values: Mapping[str, float], step: int) -> None:
            self.steps.append(step)

    listing = Listing()
    tracker = Several({"tensorboard": Failing(), "other": listing})
    tracker.log({"a": 1.0}, 1)
    tracker.log({"a": 1.0}, 2)
    tracker.close()
    assert listing.steps == [1, 2]
    assert capsys.readouterr().err.count("warning: tensorboard failed, the run goes on without it") == 1


def test_the_average_is_that_of_the_last_epoch_of_updates() -> None:
    late = LossAverage(4)
    assert [late.add(update, float(update)) for update in (3, 4, 5, 6, 7)] == [3.0, 3.5, 4.0, 4.5, 5.5]
    assert LossAverage(4, LossAverage(4, (None, 2.0)).losses).average == 2.0
    average = LossAverage(3, (1.0,))
    assert [average.add(step, loss) for step, loss in ((2, 3.0), (3, 5.0), (4, 4.0))] == [2.0, 3.0, 4.0]
    assert average.losses == [4.0, 3.0, 5.0]
