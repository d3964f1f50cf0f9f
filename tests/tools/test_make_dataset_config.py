"""tools/make_dataset_config.py: what it writes runs as it is, and says what lies in the folder."""

import tomllib
from pathlib import Path

import pytest
from safetensors import safe_open

import train_network
import train_textual_inversion
from library.options.dataset_file import read_dataset_file
from library.options.presets import names
from library.options.proposal import stands_in
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
    assert (first["num_repeats"], second["num_repeats"]) == (3, 1), "a name with a number counts"
    steps_each = 16 / dataset["datasets"][0]["batch_size"]
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


def test_the_word_stands_once_before_pictures_without_captions(tiny_sd1: Path, tmp_path: Path) -> None:
    made(tmp_path / "pictures" / "zed cat", 3, (64, 64))
    made(tmp_path / "pictures" / "2_zed cat", 2, (64, 64))
    for path in (tmp_path / "pictures").rglob("*.txt"):
        path.write_text("on a sofa")
        if path.parent.name == "2_zed cat":
            path.unlink()
    flags = ["--pretrained_model_name_or_path", tiny_sd1, "--write_to", tmp_path, "--trigger", "zed"]
    assert propose(tmp_path / "pictures", *flags) == 0
    dataset, _ = read(tmp_path, "zed")
    assert dataset["general"]["caption_prefix"] == "zed,"
    assert [subset.get("class_tokens") for subset in dataset["datasets"][0]["subsets"]] == ["cat", None]


def test_folders_of_no_repeats_and_shares_of_no_picture(
    tiny_sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(tmp_path / "pictures" / "0_no", 3, (64, 64))
    made(tmp_path / "pictures" / "5_yes", 4, (64, 64))
    flags = ["--pretrained_model_name_or_path", tiny_sd1, "--write_to", tmp_path, "--preset", "competition"]
    assert propose(tmp_path / "pictures", *flags) == 0
    assert "0_no is left out: its name says 0 repeats" in capsys.readouterr().err
    dataset, training = read(tmp_path, "pictures")
    assert [subset["num_repeats"] for subset in dataset["datasets"][0]["subsets"]] == [5]
    assert "validation_split" not in training and "early_stopping_patience" not in training
    assert train_network.main(["--config_file", str(tmp_path / "pictures.toml"), "--dry_run"]) == 0


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
    assert "bad.png: the file is empty; left out of the training" in capsys.readouterr().err
    training_file = tmp_path / "pictures.toml"
    assert "skip_bad_images = true          # 1 picture can't be read" in training_file.read_text(encoding="utf-8")
    assert train_network.main(["--config_file", str(training_file), "--dry_run"]) == 0
    capsys.readouterr()
    (tmp_path / "pictures.toml").write_text("mine")
    assert propose(tmp_path / "pictures", *model) == 2
    assert (tmp_path / "pictures.toml").read_text() == "mine"
    assert propose(tmp_path / "pictures", *model, "--overwrite") == 0
    assert (tmp_path / "pictures.toml").read_text() != "mine"
    no_model = ["--pretrained_model_name_or_path", tmp_path / "no.safetensors", "--write_to", tmp_path]
    assert propose(tmp_path / "pictures", *no_model, "--overwrite") == 2


@pytest.mark.parametrize(
    ("caption", "trigger", "named"),
    [
        ("1girl, solo, red sofa, category", "cat", False),
        ("a banana", "ana", False),
        ("a photo of Ana, sitting", "ana", True),
        ("my cat on a sofa", "my cat", True),
        ("cat_ears, tail", "cat", False),
    ],
)
def test_a_trigger_is_a_word_of_its_own(caption: str, trigger: str, named: bool) -> None:
    assert stands_in(trigger, caption) is named


def test_a_word_within_another_is_put_before_captions(tiny_sd1: Path, tmp_path: Path) -> None:
    made(tmp_path / "2_category", 2, (64, 64))
    for path in (tmp_path / "2_category").glob("*.txt"):
        path.write_text("1girl, solo, red sofa, category")
    flags = ["--pretrained_model_name_or_path", tiny_sd1, "--write_to", tmp_path, "--trigger", "cat"]
    assert propose(tmp_path / "2_category", *flags) == 0
    assert read(tmp_path, "cat")[0]["general"]["caption_prefix"] == "cat,"
    for path in (tmp_path / "2_category").glob("*.txt"):
        path.unlink()
    assert propose(tmp_path / "2_category", *flags, "--overwrite") == 0
    assert read(tmp_path, "cat")[0]["datasets"][0]["subsets"][0]["class_tokens"] == "cat category"


def test_folders_at_any_depth_and_captions_of_several_endings(
    tiny_sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    top = tmp_path / "pictures"
    made(top, 5, (64, 64))
    made(top / "a" / "b" / "deep", 3, (64, 64))
    for path in (top / "a" / "b" / "deep").glob("*.txt"):
        path.rename(path.with_suffix(".caption"))
    texts = sorted(top.glob("*.txt"))
    texts[0].write_bytes("schön".encode("latin-1"))
    texts[1].write_text("\n")
    flags = ["--pretrained_model_name_or_path", tiny_sd1, "--write_to", tmp_path]
    assert propose(top, *flags) == 0
    told = capsys.readouterr().err
    assert f"{texts[0]}: caption isn't UTF-8 text" in told and "training stops there" in told
    assert f"{texts[1]}: the caption is empty" in told
    dataset, _ = read(tmp_path, "pictures")
    assert dataset["general"]["caption_extension"] == ".txt"
    shallow, deep = dataset["datasets"][0]["subsets"]
    assert (Path(deep["image_dir"]), deep["caption_extension"]) == ((top / "a" / "b" / "deep").resolve(), ".caption")
    assert "caption_extension" not in shallow
    texts[0].write_text("schön", encoding="utf-8")
    assert train_network.main(["--config_file", str(tmp_path / "pictures.toml"), "--dry_run"]) == 0


def test_every_line_that_is_computed_has_its_reason(tiny_sd1: Path, tmp_path: Path) -> None:
    make_pictures(tmp_path / "pictures", count=2, name="x", sizes=((64, 64),))
    flags = ["--pretrained_model_name_or_path", tiny_sd1, "--write_to", tmp_path, "--trigger", "zorg"]
    assert propose(tmp_path / "pictures", *flags) == 0
    dataset = (tmp_path / "zorg-dataset.toml").read_text(encoding="utf-8")
    training = (tmp_path / "zorg.toml").read_text(encoding="utf-8")
    lines = [line for line in dataset.splitlines() if " = " in line and not line.lstrip().startswith("#")]
    told = [line for line in lines if line.split()[0] not in {"image_dir", "class_tokens"}]
    assert len(told) > 8
    assert all(" # " in line for line in told + training.rstrip().splitlines()[-3:])


WHOLE_TASKS = {"quickstart", "quickstart-embedding"}


@pytest.mark.parametrize("captions", ["sentences", "tags"])
def test_every_preset_gives_files_that_run(
    captions: str, tiny_sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_pictures(tmp_path / "pictures", count=10, name="x", sizes=((64, 64),))
    if captions == "tags":
        for path in (tmp_path / "pictures").rglob("*.txt"):
            path.write_text("1girl, solo, red sofa, window, day")
    flags = ["--pretrained_model_name_or_path", tiny_sd1, "--write_to", tmp_path, "--trigger", "zorg"]
    assert propose(tmp_path / "pictures", *flags[:4], "--preset", "pivotal") == 2
    assert "--trigger: is missing" in capsys.readouterr().err
    done = set()
    for name in names():
        code = propose(tmp_path / "pictures", *flags, "--preset", name, "--output_name", name)
        told = capsys.readouterr().err
        if name in WHOLE_TASKS:
            assert code == 2 and "is a whole task" in told
            continue
        assert code == 0, told
        dataset, training = read(tmp_path, name)
        new_word = name.startswith("embedding")
        assert ("network_module" in training) is not new_word, name
        assert training.get("token_string") == ("zorg" if new_word or name == "pivotal" else None)
        script = train_textual_inversion if new_word else train_network
        text = (tmp_path / f"{name}.toml").read_text(encoding="utf-8")
        assert f"accelerate launch {script.__name__}.py --config_file {name}.toml" in text
        assert f"python {script.__name__}.py --dry_run" in told
        assert ("was put on top of the goal's: character," in told) is (name in {"illustrious", "low-memory"})
        assert script.main(["--config_file", str(tmp_path / f"{name}.toml"), "--dry_run"]) == 0, name
        told = capsys.readouterr().err
        assert "no effect" not in told, name
        assert "zorg" in str(dataset) or new_word
        done.add(name)
    assert len(done) == len(names()) - len(WHOLE_TASKS)
