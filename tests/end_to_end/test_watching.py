"""What a run shows and heeds while it goes: wishes left as files, held-out pictures, early stops, presets, and a start
in the middle; and that none of it changes what is learned."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from library.options import presets
from tests.pictures import make_pictures
from tests.programs import ROOT, SCRIPT, environment


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures that an epoch shows twice: 6 steps of two."""
    return make_pictures(tmp_path_factory.mktemp("pictures"), count=6, repeats=2)


def arguments(model: Path, pictures: Path, output: Path, *more: object) -> list[str]:
    return [
        *("--pretrained_model_name_or_path", str(model), "--output_dir", str(output)),
        *("--train_data_dir", str(pictures)),
        *("--output_name", "run", "--network_module", "networks.lora", "--network_dim", "2", "--resolution", "64"),
        *("--caption_extension", ".txt", "--cache_latents", "--train_batch_size", "2", "--learning_rate", "1e-2"),
        *("--seed", "5", "--max_data_loader_n_workers", "0", *map(str, more)),
    ]


def main(arguments: list[str]) -> int:
    import train_network

    return train_network.main(arguments)


def lines(output: Path) -> list[dict[str, Any]]:
    """The log of the run, without the times."""
    written = (output / "run.log.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "time"} for line in written]


def logged(output: Path, name: str) -> dict[int, float]:
    return {line["step"]: line[name] for line in lines(output) if name in line}


RISING = ("--lr_scheduler", "piecewise_constant", "--lr_scheduler_args", "step_rules=1:6,100")
"""Six steps that teach, and then ones that are far too long."""


def same(one: Path, other: Path) -> bool:
    return contents(one) == contents(other)


def contents(path: Path) -> dict[str, bytes]:
    """Tensors as bytes, of whatever type."""
    raw = path.read_bytes()
    size = 8 + int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8:size]), raw[size:]
    return {name: data[slice(*about["data_offsets"])] for name, about in header.items() if name != "__metadata__"}


def until(what: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Wait for something that the process does."""
    deadline = time.monotonic() + 120
    while not what():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)


def wish(process: subprocess.Popen[str], file: Path) -> None:
    """Leave a file while the process holds still, for longer than it takes it to look again."""
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(0.6)
    file.touch()
    os.kill(process.pid, signal.SIGCONT)


def test_save_now_and_stop(tiny_sd1: Path, pictures: Path, tmp_path: Path) -> None:
    steps, output = 20, tmp_path / "parts"
    flags = ("--max_train_steps", steps, "--lr_scheduler", "cosine", "--network_dropout", "0.1", "--flip_aug")
    command = arguments(tiny_sd1, pictures, output, *flags)
    output.mkdir()
    (output / "stop").touch()
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *command], env=environment(), stderr=subprocess.PIPE, text=True
    )
    with process:
        log = output / "run.log.jsonl"
        until(lambda: log.is_file() and len(log.read_text().splitlines()) > 2, process)
        wish(process, output / "save_now")
        until(lambda: list(output.glob("run-step*-state")), process)
        wish(process, output / "stop")
        _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert f"{output / 'stop'} is from before this run and was removed" in said
    assert not (output / "stop").exists() and not (output / "save_now").exists()
    states = sorted(output.glob("run-step*-state"))
    asked, stopped = (int(folder.name[8:16]) for folder in states)
    assert 2 < asked < stopped < steps
    assert [path.name for path in sorted(output.glob("*.safetensors"))] == [
        f"run-step{step:08d}.safetensors" for step in (asked, stopped)
    ]
    assert f"stopped after step {stopped} of {steps}; to go on:" in said
    assert str(states[1]) in said.partition("to go on:")[2]

    assert main(arguments(tiny_sd1, pictures, tmp_path / "whole", *flags, "--save_every_n_steps", asked)) == 0
    assert same(tmp_path / f"whole/run-step{asked:08d}.safetensors", output / f"run-step{asked:08d}.safetensors")
    assert main([*command, "--resume", "latest"]) == 0
    assert same(tmp_path / "whole/run.safetensors", output / "run.safetensors")
    assert lines(tmp_path / "whole") == lines(output)


def test_the_best_weights_are_kept_and_an_early_stop_is_one(
    tiny_sd1: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--validation_split", "0.34", "--validate_every_n_steps", "2", "--save_every_n_steps", "2", "--save_state")
    command = arguments(tiny_sd1, pictures, tmp_path, *flags, "--max_train_steps", "14", *RISING)
    assert main([*command, "--early_stopping_patience", "2"]) == 0
    said = capsys.readouterr().err
    losses = logged(tmp_path, "loss/validation/step_average")
    last, best = max(losses), min(list(losses)[1:], key=lambda step: losses[step])
    assert last == best + 4 < 14
    assert f"stopping early at step {last} of 14: no better for too long" in said
    assert "to go on:" not in said
    assert same(tmp_path / "run.safetensors", tmp_path / f"run-step{last:08d}.safetensors")
    assert same(tmp_path / "run-best.safetensors", tmp_path / f"run-step{best:08d}.safetensors")
    assert not same(tmp_path / "run-best.safetensors", tmp_path / f"run-step{best + 2:08d}.safetensors")
    with safe_open(tmp_path / "run-best.safetensors", "np") as file:
        assert file.metadata()["ss_steps"] == str(best)
    assert json.loads((tmp_path / "run-state/manifest.json").read_text())["updates_done"] == last

    assert main([*command, "--early_stopping_patience", "2", "--resume", "latest"]) == 2
    refused = " ".join(capsys.readouterr().err.split())
    assert "--resume: this run stopped early: 2 validations in a row were no better than the best one" in refused
    assert "raise --early_stopping_patience" in refused
    assert main([*command, "--early_stopping_patience", "3", "--resume", "latest"]) == 0
    assert max(logged(tmp_path, "loss/current")) > last


PROMPTS = "a thing --w 64 --h 64 --s 1 --d 1\n"
EXACT = {
    "schedule-free": ("--optimizer_type", "AdamWScheduleFree"),
    "prodigy": ("--optimizer_type", "Prodigy", "--learning_rate", "1", "--optimizer_args", "d0=1e-3"),
    "full_bf16": ("--mixed_precision", "bf16", "--full_bf16", "--lr_scheduler", "cosine"),
}


@pytest.mark.parametrize("flags", EXACT.values(), ids=EXACT.keys())
def test_exact_resume_with_looking_in_between(
    tiny_sd1: Path, pictures: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    """Stopped in the middle of an epoch with workers, gone on without; what is looked at in between changes nothing."""
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    looks = (
        *("--validate_every_n_steps", "2", "--sample_prompts", tmp_path / "prompts.txt"),
        *("--sample_every_n_steps", "2"),
    )
    common = ("--validation_split", "0.34", "--max_train_steps", "5", "--network_dropout", "0.1", "--flip_aug", *flags)

    def run(name: str, workers: int, *more: object) -> Path:
        output = tmp_path / name
        line = [word for word in arguments(tiny_sd1, pictures, output, *common, *more) if word != "--cache_latents"]
        assert main([*line, "--max_data_loader_n_workers", str(workers)]) == 0
        return output

    whole = run("whole", 0, *looks)
    parts = run("parts", 2, *looks, "--save_state", "--save_every_n_steps", "3")
    first = sorted(path.name[:10] for path in (parts / "sample").glob("run_0*.png"))
    assert first == ["run_000002", "run_000004"]
    state = parts / "run-step00000003-state"
    again = run("parts", 0, *looks, "--resume", state)
    assert same(whole / "run.safetensors", again / "run.safetensors")
    assert lines(whole) == lines(again)
    assert set(logged(again, "loss/validation/step_average")) == {0, 2, 4, 5}
    if "AdamWScheduleFree" in flags:
        blind = run("blind", 0, "--validate_every_n_epochs", "99")
        assert same(whole / "run.safetensors", blind / "run.safetensors")


def preset_values(name: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for one in name.split(","):
        found |= tomllib.loads((presets.FOLDER / f"{one}.toml").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize(
    ("preset", "family"),
    [
        ("character", "sd1"),
        ("style-soft", "sd1"),
        ("style-strong", "sd1"),
        ("low-cost", "sd1"),
        ("competition", "sd1"),
        ("low-cost,low-memory", "sd1"),
        ("character,illustrious", "sdxl"),
    ],
)
def test_a_preset_trains(
    tiny_models: Callable[[str], Path], pictures: Path, tmp_path: Path, preset: str, family: str
) -> None:
    given = {
        "pretrained_model_name_or_path": tiny_models(family),
        "train_data_dir": pictures,
        "output_dir": tmp_path,
        "output_name": "run",
        "caption_extension": ".txt",
        "resolution": "64,64",
        "network_dim": 4,
        "network_alpha": 2,
        "max_train_steps": 2,
        "min_bucket_reso": 32,
        "max_bucket_reso": 128,
        "bucket_reso_steps": 16,
        "max_data_loader_n_workers": 0,
        "seed": 3,
    }
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    assert main(["--preset", preset, *words]) == 0
    tensors = load_file(tmp_path / "run.safetensors")
    assert any(tensor.any() for key, tensor in tensors.items() if "lora_up" in key)
    with safe_open(tmp_path / "run.safetensors", "np") as file:
        metadata = file.metadata()
    wanted = {f"ss_{name}": value for name, value in preset_values(preset).items() if name not in given}
    compared = {name for name in wanted if name in metadata}
    for name in compared:
        expected = wanted[name]
        if name == "ss_network_args":
            expected = dict(pair.split("=") for pair in expected)
        held = read(metadata[name])
        assert held.items() >= expected.items() if isinstance(expected, dict) else held == expected, name
    least = {"ss_mixed_precision", "ss_noise_offset", "ss_min_snr_gamma", "ss_unet_lr", "ss_lr_scheduler"}
    assert least <= compared
    if "network_train_unet_only" in preset_values(preset):
        assert not any(key.startswith("lora_te") for key in tensors)
    if preset == "competition":
        assert (tmp_path / "run-best.safetensors").is_file()


def read(text: str) -> Any:
    """A value of the metadata."""
    try:
        return {"True": True, "False": False, "None": None}[text]
    except KeyError:
        try:
            return json.loads(text)
        except ValueError:
            return text


@pytest.fixture(scope="module")
def unlearned(tiny_sd1: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of 2 1/2 epochs whose rates are too small to change a loss: that tells pictures, noise and timestep."""
    output = tmp_path_factory.mktemp("unlearned")
    assert main(arguments(tiny_sd1, pictures, output, *TINY_RATES)) == 0
    yield output


TINY_RATES = ("--max_train_steps", "15", "--lr_scheduler", "cosine", "--learning_rate", "1e-20", "--flip_aug")


@pytest.mark.parametrize(("flags", "first"), [(("--initial_step", "9"), 9), (("--initial_epoch", "3"), 12)])
def test_a_start_in_the_middle(
    tiny_sd1: Path, pictures: Path, unlearned: Path, tmp_path: Path, flags: tuple[str, str], first: int
) -> None:
    saves = ("--save_every_n_steps", "14", "--save_every_n_epochs", "2")
    assert main(arguments(tiny_sd1, pictures, tmp_path, *TINY_RATES, *flags, *saves)) == 0
    assert list(logged(tmp_path, "loss/current")) == list(range(first + 1, 16))
    for name in ("loss/current", "lr/unet", "lr/textencoder"):
        whole, part = logged(unlearned, name), logged(tmp_path, name)
        assert part == {step: value for step, value in whole.items() if step > first}
        assert len(set(whole.values())) == len(whole) == 15
    with safe_open(tmp_path / "run.safetensors", "np") as file:
        assert file.metadata()["ss_steps"] == "15"
    names = {path.name for path in tmp_path.glob("run-*.safetensors")}
    expected = {"run-step00000014.safetensors"} | ({"run-000002.safetensors"} if first < 12 else set())
    assert names == expected


def test_what_is_seen_before_a_start_in_the_middle_is_the_base_models(
    tiny_sd1: Path, pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ("--validation_split", "0.3", "--initial_epoch", "2", "--max_train_epochs", "2")
    assert main(arguments(tiny_sd1, pictures, tmp_path, *flags)) == 0
    first, *_ = [line for line in capfd.readouterr().err.splitlines() if "validation at step" in line]
    assert "(training" not in first and "best" not in first
    assert len(logged(tmp_path, "loss/validation/epoch_divergence")) == 1
    steps = logged(tmp_path, "loss/current")
    with safe_open(tmp_path / "run-best.safetensors", "np") as file:
        assert int(file.metadata()["ss_steps"]) in steps


def test_weights_of_a_step_go_on_where_they_were(tiny_sd1: Path, pictures: Path, tmp_path: Path) -> None:
    flags = ("--max_train_steps", "8", "--lr_scheduler", "linear", "--flip_aug")
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert main(arguments(tiny_sd1, pictures, whole, *flags, "--save_every_n_steps", "5")) == 0
    weights = whole / "run-step00000005.safetensors"
    start = ("--network_weights", weights, "--initial_step", "5")
    assert main(arguments(tiny_sd1, pictures, part, *flags, *start)) == 0
    assert logged(part, "loss/current")[6] == logged(whole, "loss/current")[6]
    assert logged(part, "lr/unet") == {step: rate for step, rate in logged(whole, "lr/unet").items() if step > 5}


@pytest.mark.slow
def test_the_advisor_names_where_a_real_run_learned_by_heart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The quickstart on two of its twelve pictures, the others held out, at more than four times its rate."""
    monkeypatch.chdir(ROOT)
    steps = 320
    held_out = ("--validation_split", "0.8", "--validation_seed", "1", "--validate_every_n_steps", "20")
    rate = ("--learning_rate", "4.5e-3", "--lr_scheduler", "constant", "--lr_warmup_steps", "0", "--noise_offset", "0")
    length = ("--max_train_steps", str(steps), "--train_batch_size", "2", "--dataset_repeats", "10")
    quiet = ("--validate_every_n_epochs", "1000", "--logging_dir", "", "--sample_every_n_steps", "0")
    first = tomllib.loads((presets.FOLDER / "quickstart.toml").read_text(encoding="utf-8"))
    assert first["training"]["learning_rate"] * 4 < 4.5e-3
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a large blorp on a blue background --w 128 --h 128 --s 1 --d 1\n")
    line = ["--config_file", "library/presets/quickstart.toml", "--output_dir", str(tmp_path), "--output_name", "run"]
    saves = ("--save_every_n_steps", "40", "--sample_prompts", str(prompts))
    assert main([*line, *held_out, *rate, *length, *quiet, *saves]) == 0

    losses = logged(tmp_path, "loss/validation/step_average")
    trained = logged(tmp_path, "loss/current")
    best = min(list(losses)[1:], key=lambda step: losses[step])
    assert 20 <= best <= 240
    assert losses[steps] > 1.2 * losses[best]
    assert sum(trained[step] for step in range(best + 1, best + 41)) / 40 < 0.8 * losses[best]

    said = capsys.readouterr().err
    advice = said[said.index("validation loss: from") :].splitlines()
    assert advice[0].startswith(f"validation loss: from {losses[0]:.4f} to its lowest, ")
    rise = re.search(r"it began to rise at about step (\d+) and ended at|it rose suddenly after step (\d+), ", said)
    assert rise, advice
    assert 40 <= int(rise[1] or rise[2]) < steps
    (tries,) = [words for words in advice if words.startswith("try first: ")]
    named = re.findall(r"(\S+\.safetensors) \(step (\d+), (?:about )?([\d.]+)\)", tries)
    assert named[0] == ("run-best.safetensors", str(best), f"{losses[best]:.4f}")
    assert len(named) == 3
    for name, step, loss in named:
        with safe_open(tmp_path / name, "np") as file:
            assert file.metadata()["ss_steps"] == step
        assert float(loss) < losses[steps]
