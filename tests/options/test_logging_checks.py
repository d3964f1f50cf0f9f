"""Trackers and log files are looked at before anything is loaded."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from library.options.logging_checks import logged_options, notices, problems, wanted_trackers
from library.options.model import Model
from library.options.network import Network
from library.options.optimizer import Optimizer
from library.options.output import Hub, Output
from library.options.registry import FLAGS, Options
from library.options.reporting import Config, Logging


def said(**logging: Any) -> list[str]:
    return [str(problem) for problem in problems(Options(logging=Logging(**logging)))]


@pytest.mark.parametrize(
    ("flags", "trackers"),
    [
        ({}, ()),
        ({"logging_dir": Path("logs")}, ("tensorboard",)),
        ({"log_with": "wandb", "logging_dir": Path("logs")}, ("wandb",)),
        ({"log_with": "wandb"}, ("wandb",)),
        ({"log_with": "all", "logging_dir": Path("logs")}, ("tensorboard", "wandb")),
    ],
)
def test_which_trackers_are_wanted(flags: dict[str, Any], trackers: tuple[str, ...]) -> None:
    assert wanted_trackers(Options(logging=Logging(**flags))) == trackers
    if importlib.util.find_spec("wandb"):
        assert said(**flags) == []


@pytest.mark.parametrize("log_with", ["tensorboard", "all"])
def test_tensorboard_needs_a_folder(log_with: str) -> None:
    assert "--log_with: TensorBoard needs a folder; add --logging_dir DIR" in said(log_with=log_with)


def test_a_missing_package_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert said(log_with="wandb") == [
        "--log_with: wandb isn't installed; pip install 'lorasmith[wandb]', or use --log_with tensorboard"
    ]
    assert said(logging_dir=Path("logs")) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "--log_tracker_config: there is no file "),
        ("[wandb", "is no TOML file: "),
        ("\xff", "is no TOML file: "),
        ("[wanbd]\nname = 1", " wanbd: is no table of a tracker; did you mean wandb?"),
        ("wandb = 3", " wandb: must be a table; such as [wandb]"),
        (
            "[tensorboard]\nflush_sec = 3",
            " tensorboard.flush_sec: TensorBoard has no such setting; did you mean",
        ),
        ("[comet]\n", " comet: is no table of a tracker; known are [tensorboard], [wandb]"),
    ],
)
def test_settings_of_trackers(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "trackers.toml"
    if text is not None:
        path.write_text(text, encoding="latin-1")
    (problem,) = said(log_tracker_config=str(path))
    assert message in problem


def test_good_settings_of_trackers(tmp_path: Path) -> None:
    path = tmp_path / "trackers.toml"
    path.write_text("[tensorboard]\nflush_secs = 3\n[wandb]\nentity = 'me'\n", encoding="utf-8")
    assert said(log_tracker_config=str(path)) == []


def test_the_thumbnail_is_a_picture(tmp_path: Path) -> None:
    def wrong(value: object) -> list[str]:
        return [str(problem) for problem in problems(Options(output=Output(metadata_thumbnail=str(value))))]

    Image.new("RGB", (4, 3)).save(tmp_path / "small.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "small.txt").write_bytes((tmp_path / "small.png").read_bytes())
    assert wrong(tmp_path / "small.png") == wrong("data:image/png;base64,AAAA") == []
    advice = "give the path of a PNG, JPEG or WebP, or a data URL"
    assert wrong(tmp_path / "no.png") == [f"--metadata_thumbnail: there is no file {tmp_path}/no.png; {advice}"]
    for name in ("text.png", "small.txt"):
        told = f"--metadata_thumbnail: {tmp_path}/{name} is no picture that can be read; {advice}"
        assert wrong(tmp_path / name) == [told]
    (told,) = wrong("iVBORw0KGgo" * 1000)
    assert "--metadata_thumbnail: " in told and len(told) < 400


def test_the_file_of_messages(tmp_path: Path) -> None:
    def wrong(path: Path) -> list[str]:
        return [str(problem) for problem in problems(Options(config=Config(console_log_file=str(path))))]

    (tmp_path / "file").touch()
    assert wrong(tmp_path / "file") == wrong(tmp_path / "new" / "log.txt") == []
    assert wrong(tmp_path) == [f"--console_log_file: {tmp_path} is a folder; give a file"]
    assert wrong(tmp_path / "file" / "log.txt") == [
        f"--console_log_file: {tmp_path}/file/log.txt can't be made: {tmp_path}/file is no folder"
    ]
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"log_prefix": "x"}, "--log_prefix: has no effect without TensorBoard (--logging_dir)"),
        ({"log_prefix": "x", "log_with": "wandb"}, "--log_prefix: has no effect without TensorBoard (--logging_dir)"),
        ({"log_tracker_name": "x"}, "--log_tracker_name: has no effect without --logging_dir or --log_with wandb"),
        ({"log_tracker_config": "x"}, "--log_tracker_config: has no effect without --logging_dir or --log_with wandb"),
        ({"log_config": True}, "--log_config: has no effect without --logging_dir or --log_with wandb"),
        (
            {"wandb_run_name": "x", "log_with": "tensorboard", "logging_dir": Path("x")},
            "--wandb_run_name: has no effect without --log_with wandb or all",
        ),
        (
            {"wandb_api_key": "x", "log_with": "wandb"},
            "--wandb_api_key: other users of this machine can see command lines; better set WANDB_API_KEY",
        ),
    ],
)
def test_what_has_no_effect_and_what_others_can_see(flags: dict[str, Any], line: str) -> None:
    assert list(notices(Options(logging=Logging(**flags)))) == [line]


def test_no_line_where_everything_counts() -> None:
    flags = Logging(log_with="all", logging_dir=Path("x"), log_prefix="a", log_config=True, wandb_run_name="b")
    assert list(notices(Options(logging=flags))) == []
    hidden = Options(
        logging=Logging(log_with="wandb", wandb_api_key="x"), places={"wandb_api_key": "job.toml:3 wandb_api_key"}
    )
    assert list(notices(hidden)) == []


def test_trackers_are_told_no_secrets_and_no_paths() -> None:
    told = logged_options(
        Options(
            model=Model(pretrained_model_name_or_path="/home/me/model.safetensors", vae="/home/me/vae"),
            network=Network(
                network_dim=16,
                network_args=("preset=/home/me/lyco.toml", "algo=loha"),
                base_weights=("/home/me/other.safetensors",),
            ),
            optimizer=Optimizer(optimizer_args=("betas=0.9,0.99", "weight_decay=0.1"), text_encoder_lr=(1e-5,)),
            output=Output(output_dir=Path("/home/me/out"), output_name="cat"),
            logging=Logging(logging_dir=Path("/home/me/logs"), wandb_api_key="secret1"),
            hub=Hub(huggingface_token="secret2"),
            config=Config(console_log_file="/home/me/log.txt"),
        )
    )
    assert "/home/me" not in str(told) and "secret" not in str(told)
    assert told["network_args"] == "algo=loha"
    assert told["optimizer_args"] == "betas=0.9,0.99 weight_decay=0.1"
    assert (told["network_dim"], told["output_name"], told["seed"]) == (16, "cat", None)
    assert all(value is None or type(value) in (bool, int, float, str) for value in told.values())
    assert {name for name, flag in FLAGS.items() if flag.secret or flag.shape == "path"}.isdisjoint(told)
