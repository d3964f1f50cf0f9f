"""Lines and refusals about data that come from what the whole run asks for; all of them in a dry run."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from library.errors import nearest
from tests.pictures import make_pictures

Dry = Callable[..., tuple[int, str, str]]


@pytest.fixture
def dry(tiny_sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Dry:
    """A dry run over six pictures; lines of their dataset file may be given. Exit code, stdout, stderr."""
    from train_network import main

    make_pictures(tmp_path / "pictures", count=6)

    def run(*flags: str, dataset: str = "", subset: str = "") -> tuple[int, str, str]:
        image_dir = f"image_dir = '{tmp_path}/pictures/2_thing'"
        (tmp_path / "d.toml").write_text(
            f"[[datasets]]\nresolution = 64\n{dataset}\n[[datasets.subsets]]\n{image_dir}\n{subset}\n"
        )
        base = ["--pretrained_model_name_or_path", str(tiny_sd1), "--output_dir", str(tmp_path / "out"), "--dry_run"]
        data = ["--dataset_config", str(tmp_path / "d.toml"), "--caption_extension", ".txt"]
        capsys.readouterr()
        code = main([*base, *data, "--network_module", "networks.lora", "--max_train_steps", "6", *flags])
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("flags", "dataset", "subset", "said"),
    [
        (("--masked_loss",), "", "", "--masked_loss: has no effect, no picture has a mask"),
        (("--validate_every_n_steps", "2"), "", "", "has no effect without held-out pictures"),
        (("--cache_latents",), "", "keep_in_memory = true", "keep_in_memory: has no effect with cached latents"),
        ((), "", "face_crop_aug_range = [1.0, 2.0]", "face_crop_aug_range has no effect, no name tells a face"),
        ((), "", "image_column = 'x'", "image_column: has no effect, pictures come from a folder"),
        ((), "aspect_ratio_buckets = [64, 32, 96, 32]", "", "resolution: has no effect on buckets"),
        (
            (),
            "",
            "custom_attributes = {diff_output_preservaton = true}",
            "means nothing here",
        ),
        (("--max_crop_loss", "0.3"), "", "", "more than 0.3 (max_crop_loss)"),
    ],
)
def test_a_line_tells_what_finds_nothing_to_do(
    dry: Dry, flags: tuple[str, ...], dataset: str, subset: str, said: str
) -> None:
    code, _, told = dry(*flags, dataset=dataset, subset=subset)
    assert code == 0, told
    assert told.count(said) >= 1
    assert said not in dry()[2]


def test_an_attribute_that_is_no_switch_is_refused(dry: Dry) -> None:
    code, _, told = dry(subset="custom_attributes = {diff_output_preservation = 'no'}")
    assert code == 2
    assert "diff_output_preservation is 'no'; write true or false" in told


def test_the_tables_tell_of_the_validation(dry: Dry) -> None:
    code, shown, _ = dry("--validate_every_n_steps", "2", dataset="validation_split = 0.34")
    assert code == 0
    assert "validation: 2 pictures held out; 4 passes of 2 batches, each at 4 timesteps" in shown
    assert "validation:" not in dry()[1]


def test_a_folder_that_can_not_take_latents(dry: Dry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "pictures" / "2_thing"
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder)
    code, _, told = dry("--cache_latents_to_disk")
    assert code == 2
    assert f"{folder} can't be written to, and picture00 has no latents there" in told
    for picture in [path for path in folder.iterdir() if path.suffix in (".png", ".jpg")]:
        (folder / f"{picture.stem}_te_outputs.npz").touch()
    assert dry("--cache_latents_to_disk")[0] == 2
    for picture in [path for path in folder.iterdir() if path.suffix in (".png", ".jpg")]:
        (folder / f"{picture.stem}_64x64_128x128_sd.npz").touch()
    assert dry("--cache_latents_to_disk")[0] == 0
    assert dry("--cache_latents")[0] == 0


def test_a_repainted_picture_of_the_same_length_is_not_resumed(
    tiny_sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from train_network import main

    make_pictures(tmp_path / "pictures", count=2)
    line = [
        *("--pretrained_model_name_or_path", str(tiny_sd1), "--train_data_dir", str(tmp_path / "pictures")),
        *("--output_dir", str(tmp_path / "out"), "--output_name", "x", "--network_module", "networks.lora"),
        *("--network_dim", "2", "--resolution", "64", "--caption_extension", ".txt", "--max_train_steps", "2"),
        *("--seed", "1", "--save_state", "--save_every_n_steps", "1"),
    ]
    assert main(line) == 0
    resumed = [*line, "--resume", str(tmp_path / "out" / "x-step00000001-state")]
    assert main(resumed) == 0
    picture = tmp_path / "pictures" / "2_thing" / "picture01.png"
    content = bytearray(picture.read_bytes())
    content[-30] ^= 1
    picture.write_bytes(bytes(content))
    capsys.readouterr()
    assert main(resumed) == 2
    assert "--resume (pictures)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rank", "told"), [({"RANK": "1", "LOCAL_RANK": "1"}, False), ({"RANK": "1", "LOCAL_RANK": "0"}, True)]
)
def test_each_machine_tells_its_own_problems_once(
    rank: dict[str, str], told: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from train_network import main

    for name, value in rank.items():
        monkeypatch.setenv(name, value)
    assert main(["--train_data_dir", "/nowhere"]) == 2
    assert ("there is no such folder" in capsys.readouterr().err) == told


@pytest.mark.parametrize(
    ("flags", "advice"),
    [
        (["--image_dir", "x"], "it is a key of the file of --dataset_config, in [[datasets.subsets]]"),
        (["--dataset_name", "x"], "it is a key of the file of --dataset_config"),
        (["--config_file", "@d.toml"], "this is a dataset file; give it with --dataset_config"),
    ],
)
def test_what_belongs_into_a_dataset_file(
    flags: list[str], advice: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from train_network import main

    (tmp_path / "d.toml").write_text("[[datasets]]\nresolution = 64\n")
    assert main([word.replace("@", f"{tmp_path}/") for word in flags]) == 2
    assert advice in capsys.readouterr().err


def test_a_beginning_of_a_name_is_nearest() -> None:
    assert nearest("caption_ext", ["caption_preset", "caption_extension"]) == "did you mean caption_extension?"
