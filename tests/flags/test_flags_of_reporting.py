"""What the flags of messages, files and previews do to a real run: which files are there, and what stands in them."""

import base64
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from tests.flags.effects import Ran, Runs, observes, same

PNG = "data:image/png;base64,"
TEXTS = {
    "title": "A thing, learned",
    "author": "somebody",
    "description": "two words",
    "license": "CC0",
    "tags": "thing, red",
    "usage_hint": "say thing",
    "merged_from": "nothing",
    "trigger_phrase": "thing",
    "preprocessor": "none",
    "is_negative_embedding": "false",
}


def names(ran: Ran, pattern: str = "*") -> list[str]:
    return sorted(path.name for path in ran.folder.glob(pattern))


def said(ran: Ran) -> str:
    """Everything on stderr in one line."""
    return " ".join(ran.err.split())


@observes("config_file")
def test_a_config_file_sets_what_the_line_does_not(runs: Runs) -> None:
    file = runs.root / "some.toml"
    file.write_text("max_train_steps = 1\nlearning_rate = 5e-3\ntraining_comment = 'from the file'\n", encoding="utf-8")
    ran = runs("--config_file", "@/some.toml", without=("max_train_steps",))
    assert len(ran.steps) == 1
    assert ran.metadata["ss_training_comment"] == "from the file"
    assert ran.logged("lr/unet") == [pytest.approx(1e-2)]


@observes("output_config")
def test_output_config_writes_a_file_that_gives_the_same_run(runs: Runs) -> None:
    line = ("--config_file", "@/written.toml", "--output_config", "--max_train_steps", "1", "--noise_offset", "0.25")
    wrote = runs.fresh(*line)
    assert names(wrote) == []
    text = (runs.root / "written.toml").read_text(encoding="utf-8")
    assert "noise_offset = 0.25\n" in text and "max_train_steps = 1\n" in text
    usual = tuple(flag.removeprefix("--") for flag in runs.arguments() if flag.startswith("--"))
    place = runs.root / "output_of_config"
    from_file = runs.fresh("--config_file", "@/written.toml", "--output_dir", str(place), without=usual)
    assert same(from_file, runs("--max_train_steps", "1", "--noise_offset", "0.25"))


PRESET = ("--preset", "low-cost", "--min_bucket_reso", "64")


@observes("preset")
def test_a_preset_sets_and_says_the_repeats(runs: Runs) -> None:
    ran = runs(*PRESET, "--max_train_steps", "2", "--mixed_precision", "no", without=("learning_rate", "network_dim"))
    metadata = ran.metadata
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("8", "4.0")
    assert metadata["ss_noise_offset"] == "0.03" and metadata["ss_min_snr_gamma"] == "5.0"
    assert not [key for key in ran.weights if key.startswith("lora_te")]
    free = f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{runs.root / 'pictures/2_thing'}'\n"
    (runs.root / "free.toml").write_text(free, encoding="utf-8")
    whole = ("max_train_steps", "train_data_dir")
    by_itself = runs(*PRESET, "--dry_run", "--dataset_config", "@/free.toml", without=whole)
    assert "preset: --dataset_repeats 150 for 4 pictures makes about 5 epochs" in said(by_itself)


@observes("print_command")
def test_the_printed_command_is_the_run(runs: Runs) -> None:
    wanted = (*PRESET, "--mixed_precision", "no", "--lr_warmup_steps", "0")
    printed = runs.fresh(*wanted, "--print_command")
    assert names(printed) == []
    start, *words = shlex.split(printed.out.replace("\\\n", " "))
    assert [start, *words[:2]] == ["accelerate", "launch", "train_network.py"]
    words = words[2:]
    assert "--preset" not in words and words[words.index("--noise_offset") + 1] == "0.03"
    place = words.index("--output_dir")
    words[place + 1] = str(runs.root / "output_of_command")
    usual = tuple(flag.removeprefix("--") for flag in runs.arguments() if flag.startswith("--"))
    assert same(runs.fresh(*words, without=usual), runs(*wanted))


@observes("dry_run")
def test_a_dry_run_shows_and_trains_nothing(runs: Runs) -> None:
    ran = runs("--dry_run", "--max_train_steps", "7")
    assert names(ran) == []
    words = ran.out.split()
    steps = words[words.index("Steps") :]
    assert "7" in steps and "8" in steps and "memory" in ran.out
    assert "saved" not in ran.err and "loading" not in ran.err
    refused = runs("--dry_run", "--pretrained_model_name_or_path", "@/nothing", expect=2)
    assert "--pretrained_model_name_or_path: " in refused.err


@observes("console_log_level")
def test_the_level_of_messages(runs: Runs) -> None:
    quiet, usual = runs("--console_log_level", "ERROR"), runs()
    assert quiet.err == "" and "saved " in usual.err and "loading" in usual.err
    with_warning = ("--learning_rate", "1e-12", "--save_precision", "fp16")
    for level, shown in (("WARNING", True), ("ERROR", False)):
        ran = runs(*with_warning, "--console_log_level", level)
        assert ("the file changes nothing there" in said(ran)) == shown
        assert "saved " not in ran.err
    assert "saved " in runs("--console_log_level", "DEBUG").err


@observes("console_log_file")
def test_messages_go_to_a_file(runs: Runs) -> None:
    ran = runs("--console_log_file", "@/messages/log.txt")
    assert "saved" not in ran.err and "steps:" in ran.err
    lines = (runs.root / "messages/log.txt").read_text(encoding="utf-8").splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in lines)
    assert any(line.endswith(f" saved {ran.file}") for line in lines)
    again = runs("--console_log_file", "@/messages/log.txt", "--max_train_steps", "1")
    assert f"saved {again.file}" in (text := (runs.root / "messages/log.txt").read_text(encoding="utf-8"))
    assert str(ran.file) not in text


@observes("output_dir", "output_name")
def test_where_and_under_which_name(runs: Runs) -> None:
    saves = ("--save_every_n_steps", "1", "--save_every_n_epochs", "1", "--train_batch_size", "8")
    place = runs.root / "deep" / "place"
    ran = runs("--output_dir", str(place), "--output_name", "thing", *saves)
    assert ran.folder == place
    weights = ["thing-000001", "thing-step00000001", "thing-step00000002", "thing"]
    assert names(ran) == sorted([*(f"{stem}.safetensors" for stem in weights), "thing.log.jsonl"])
    unnamed = runs(*saves, without=("output_name",))
    weights = ["at-step00000001", "at-step00000002", "epoch-000001", "last"]
    assert names(unnamed) == sorted([*(f"{stem}.safetensors" for stem in weights), "last.log.jsonl"])


@observes("save_model_as")
@pytest.mark.parametrize("kind", ["pt", "ckpt"])
def test_other_formats(runs: Runs, kind: str) -> None:
    ran = runs("--save_model_as", kind)
    assert names(ran) == sorted(["x.log.jsonl", f"x.{kind}"])
    read = torch.load(ran.folder / f"x.{kind}", weights_only=True)
    expected = runs().weights
    assert read.keys() == expected.keys()
    assert all(np.array_equal(read[key].numpy(), expected[key]) for key in read)


@observes("save_precision")
@pytest.mark.parametrize(("kind", "stored"), [("fp16", "F16"), ("bf16", "BF16"), ("float", "F32")])
def test_the_precision_of_files(runs: Runs, kind: str, stored: str) -> None:
    ran = runs("--save_precision", kind)
    exact = {key: torch.from_numpy(array) for key, array in runs().weights.items()}
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[stored]
    with safe_open(ran.file, "pt") as file:
        trained = [key for key in exact if not key.endswith(".alpha")]
        assert {file.get_slice(key).get_dtype() for key in trained} == {stored}
        assert all(torch.equal(file.get_tensor(key), exact[key].to(dtype)) for key in trained)


EPOCHS = ("--train_batch_size", "4")
"""Two steps an epoch."""


@observes("save_every_n_epochs", "save_last_n_epochs", "save_last_n_epochs_state", "save_state")
def test_saves_by_epochs_and_what_is_kept_of_them(runs: Runs) -> None:
    more = (*EPOCHS, "--max_train_steps", "8", "--save_every_n_epochs", "1")
    keep = ("--save_state", "--save_last_n_epochs", "2", "--save_last_n_epochs_state", "1")
    ran = runs(*more, *keep)
    assert names(ran, "*.safetensors") == ["x-000002.safetensors", "x-000003.safetensors", "x.safetensors"]
    assert names(ran, "*-state") == ["x-000003-state", "x-state"]
    with safe_open(ran.folder / "x-000002.safetensors", "np") as file:
        assert (file.metadata()["ss_steps"], file.metadata()["ss_epoch"]) == ("4", "2")


@observes("save_every_n_steps", "save_last_n_steps", "save_last_n_steps_state")
def test_saves_by_steps_and_what_is_kept_of_them(runs: Runs) -> None:
    more = ("--max_train_steps", "5", "--save_every_n_steps", "1", "--save_state")
    ran = runs(*more, "--save_last_n_steps", "2", "--save_last_n_steps_state", "1")
    assert names(ran, "*-step*.safetensors") == [f"x-step{step:08d}.safetensors" for step in (3, 4, 5)]
    assert names(ran, "*-step*-state") == ["x-step00000004-state", "x-step00000005-state"]
    with safe_open(ran.folder / "x-step00000003.safetensors", "np") as file:
        assert file.metadata()["ss_steps"] == "3"


@observes("save_n_epoch_ratio")
def test_so_many_saves(runs: Runs) -> None:
    ran = runs(*EPOCHS, "--max_train_steps", "8", "--save_n_epoch_ratio", "2")
    assert names(ran, "*.safetensors") == ["x-000002.safetensors", "x.safetensors"]


@observes("save_state_on_train_end")
def test_a_state_at_the_end_only(runs: Runs) -> None:
    ran = runs("--save_every_n_steps", "1", "--save_state_on_train_end")
    assert names(ran, "*-state") == ["x-state"]
    assert json.loads((ran.folder / "x-state/manifest.json").read_text())["updates_done"] == 2


@observes("no_metadata")
def test_no_metadata(runs: Runs) -> None:
    bare, usual = runs("--no_metadata"), runs()
    assert same(bare, usual)
    assert bare.metadata["ss_network_module"] == "networks.lora" and bare.metadata["ss_network_dim"] == "2"
    assert "ss_learning_rate" in usual.metadata and "ss_tag_frequency" in usual.metadata
    assert not {"ss_learning_rate", "ss_tag_frequency", "ss_seed"} & bare.metadata.keys()


@observes("training_comment", *(f"metadata_{name}" for name in TEXTS), "metadata_thumbnail")
def test_texts_in_the_file(runs: Runs) -> None:
    Image.new("RGB", (4, 3), (1, 200, 3)).save(runs.root / "small.png")
    words = [word for name, text in TEXTS.items() for word in (f"--metadata_{name}", text)]
    ran = runs(*words, "--training_comment", "in between", "--metadata_thumbnail", "@/small.png")
    assert {name: ran.metadata[f"modelspec.{name}"] for name in TEXTS} == TEXTS
    assert ran.metadata["ss_training_comment"] == "in between"
    thumbnail = ran.metadata["modelspec.thumbnail"]
    assert base64.b64decode(thumbnail.removeprefix(PNG)) == (runs.root / "small.png").read_bytes()
    plain = runs().metadata
    assert plain["modelspec.title"] == "x" and not {f"modelspec.{name}" for name in TEXTS if name != "title"} & {*plain}


def prompts(runs: Runs) -> str:
    path = runs.root / "prompts.txt"
    path.write_text("a thing --w 64 --h 64 --s 3 --d 7\na place --w 64 --h 64 --s 3 --d 9\n", encoding="utf-8")
    return str(path)


def drawn(ran: Ran) -> dict[tuple[str, int, int], Path]:
    """Previews by (tag of the step or epoch, prompt, seed)."""
    pattern = re.compile(r"x_(e?\d{6})_(\d\d)_\d{14}_(\d+)\.png")
    matches = [(pattern.fullmatch(path.name), path) for path in (ran.folder / "sample").glob("x_*.png")]
    return {(match[1], int(match[2]), int(match[3])): path for match, path in matches if match}


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


@observes("sample_prompts", "sample_every_n_steps", "sample_at_first", "sample_images_per_prompt")
def test_previews_by_steps(runs: Runs) -> None:
    more = ("--sample_every_n_steps", "2", "--sample_at_first", "--sample_images_per_prompt", "2")
    ran = runs("--max_train_steps", "3", "--sample_prompts", prompts(runs), *more)
    found = drawn(ran)
    expected = ((0, 7), (0, 8), (1, 9), (1, 10))
    assert found.keys() == {(tag, prompt, seed) for tag in ("000000", "000002") for prompt, seed in expected}
    pictures = [pixels(path).tobytes() for path in found.values()]
    assert len(set(pictures)) == 8
    assert (ran.folder / "sample/x_sheet.png").is_file()
    assert same(ran, runs("--max_train_steps", "3"))


@observes("sample_every_n_epochs")
def test_previews_by_epochs(runs: Runs) -> None:
    more = ("--sample_every_n_epochs", "2", "--sample_prompts", prompts(runs))
    assert {key[0] for key in drawn(runs(*EPOCHS, "--max_train_steps", "6", *more))} == {"e000002"}


@observes("sample_sampler")
def test_the_sampler_of_previews(runs: Runs) -> None:
    more = ("--sample_at_first", "--sample_prompts", prompts(runs), "--max_train_steps", "1")
    one, other = (drawn(runs(*more, "--sample_sampler", name)) for name in ("ddim", "euler_a"))
    assert one.keys() == other.keys() and len(one) == 2
    assert all(not np.array_equal(pixels(one[key]), pixels(other[key])) for key in one)
