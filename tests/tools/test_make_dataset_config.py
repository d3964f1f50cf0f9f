"""tools/make_dataset_config.py: what it writes runs as it is, and says what lies in the folder."""

import tomllib
from pathlib import Path

import pytest
from safetensors import safe_open

import train_network
from library.options.dataset_file import read_dataset_file
from tests.pictures import make_pictures
from tests.programs import tool


def propose(*words: object) -> int:
    return tool("make_dataset_config")([str(word) for word in words])


def made(folder: Path, count: int, size: tuple[int, int]) -> None:
    """Pictures with captions directly in a folder."""
    inner = make_pictures(folder.parent / "made", count=count, name=folder.name, sizes=(size,))
    (inner / f"2_{folder.name}").rename(folder)
    inner.rmdir()


def read(folder: Path, name: str) -> tuple[dict, dict]:
    """The dataset file and the training file."""
    texts = [(folder / f"{name}{end}.toml").read_text(encoding="utf-8") for end in ("-dataset", "")]
    dataset, training = map(tomllib.loads, texts)
    return dataset, training


@pytest.mark.parametrize("goal", ["character", "style"])
def test_what_it_writes_runs_unchanged(goal: str, tiny_sd1: Path, tmp_path: Path) -> None:
    make_pictures(tmp_path / "pictures", count=3, name="mycat", sizes=((64, 64), (96, 64)))
    flags = ["--pretrained_model_name_or_path", tiny_sd1, "--trigger", "mycat", "--goal", goal, "--steps", "4"]
    flags += ["--write_to", tmp_path, "--output_dir", tmp_path / "output"]
    assert propose(tmp_path / "pictures", *flags) == 0
    dataset, training = read(tmp_path, "mycat")
    assert read_dataset_file(tmp_path / "mycat-dataset.toml", "").problems == []
    assert train_network.main(["--config_file", str(tmp_path / "mycat.toml")]) == 0
    with safe_open(tmp_path / "output" / "mycat.safetensors", "pt") as file:
        metadata = file.metadata()
    assert int(metadata["ss_num_epochs"]) == training["max_train_epochs"]
    assert abs(int(metadata["ss_steps"]) - 4) <= training["max_train_epochs"]
    assert metadata["ss_network_dim"] == str(training["network_dim"]) == {"character": "32", "style": "64"}[goal]
    assert dataset["datasets"][0]["resolution"] == 64


def test_folders_captions_and_repeats_are_seen(
    tiny_sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    top = tmp_path / "pictures"
    for number, name in enumerate(("3_mycat cat", "plain")):
        made(top / name, 4, (1200, 1100))
        for path in (top / name).glob("*.??g"):
            path.with_suffix(".txt").unlink(missing_ok=True)
            if number == 0:
                path.with_suffix(".caption").write_text("mycat, sitting, red sofa, window, day")
    flags = ["--pretrained_model_name_or_path", tiny_sdxl, "--trigger", "mycat", "--write_to", tmp_path]
    assert propose(top, *flags, "--steps", "300", "--output_name", "my cat") == 0
    dataset, training = read(tmp_path, "my-cat")
    assert dataset["general"]["caption_extension"] == ".caption"
    assert dataset["general"]["shuffle_caption"] is True and dataset["general"]["keep_tokens"] == 1
    assert "caption_prefix" not in dataset["general"], "the word stands in the captions"
    assert dataset["datasets"][0]["resolution"] == 1024
    first, second = dataset["datasets"][0]["subsets"]
    assert (first["class_tokens"], second["class_tokens"]) == ("mycat cat", "mycat")
    steps_each = first["num_repeats"] * 8 / dataset["datasets"][0]["batch_size"]
    assert 280 <= steps_each * training["max_train_epochs"] <= 320
    assert training["gradient_checkpointing"] is True
    assert "8 pictures in 2 folders" in capsys.readouterr().err


def test_numbers_of_folders_stay_and_epochs_follow(tiny_sd1: Path, tmp_path: Path) -> None:
    for name in ("3_a", "5_b"):
        made(tmp_path / "pictures" / name, 2, (64, 64))
    flags = ["--pretrained_model_name_or_path", tiny_sd1, "--write_to", tmp_path, "--steps", "80"]
    assert propose(tmp_path / "pictures", *flags) == 0
    dataset, training = read(tmp_path, "pictures")
    assert [subset["num_repeats"] for subset in dataset["datasets"][0]["subsets"]] == [3, 5]
    assert training["max_train_epochs"] == 10, "80 steps of 2 samples, 16 samples an epoch"


def test_a_missing_word_is_put_before_captions(tiny_sd1: Path, tmp_path: Path) -> None:
    make_pictures(tmp_path / "pictures", count=2, name="x", sizes=((64, 64),))
    flags = ["--pretrained_model_name_or_path", tiny_sd1, "--write_to", tmp_path, "--trigger", "zorg"]
    assert propose(tmp_path / "pictures", *flags) == 0
    dataset, _ = read(tmp_path, "zorg")
    assert dataset["general"]["caption_prefix"] == "zorg,"


def test_bad_input_and_files_that_are_there(tiny_sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--pretrained_model_name_or_path", tiny_sd1, "--write_to", tmp_path]
    assert propose(tmp_path / "none", *model, "--steps", "0") == 2
    told = capsys.readouterr().err
    assert "there is no folder" in told and "--steps: 0" in told
    (tmp_path / "pictures").mkdir()
    assert propose(tmp_path / "pictures", *model) == 2
    assert "no pictures there" in capsys.readouterr().err
    make_pictures(tmp_path / "pictures", count=2, name="x", sizes=((64, 64),))
    (tmp_path / "pictures" / "bad.png").write_bytes(b"")
    assert propose(tmp_path / "pictures", *model, "--preset", "caracter") == 2
    assert "did you mean character?" in capsys.readouterr().err
    assert propose(tmp_path / "pictures", *model) == 0
    assert "bad.png: the file is empty" in capsys.readouterr().err
    (tmp_path / "pictures.toml").write_text("mine")
    assert propose(tmp_path / "pictures", *model) == 2
    assert (tmp_path / "pictures.toml").read_text() == "mine"
    assert propose(tmp_path / "pictures", *model, "--overwrite") == 0
    assert (tmp_path / "pictures.toml").read_text() != "mine"
    no_model = ["--pretrained_model_name_or_path", tmp_path / "no.safetensors", "--write_to", tmp_path]
    assert propose(tmp_path / "pictures", *no_model, "--overwrite") == 2
