"""`--scale_lr`: the factor, what it multiplies, and who wins over it."""

import shlex
from pathlib import Path

import pytest

from library.errors import UserError
from library.options import Options, parse
from library.options.scripts import TRAIN_TEXTUAL_INVERSION
from tests.pictures import make_pictures


@pytest.fixture
def base(tmp_path: Path) -> list[str]:
    """A run of both, with rates of all kinds."""
    pictures = make_pictures(tmp_path / "made", count=3, repeats=1)
    words = "--pretrained_model_name_or_path m --network_module networks.lora --token_string blorptoken "
    words += f"--train_data_dir {pictures} --output_dir {tmp_path}/out --resolution 64 --caption_prefix blorptoken "
    words += "--learning_rate 1e-4 --unet_lr 2e-4 --text_encoder_lr 1e-5 2e-5 --embedding_lr 1e-3 --train_batch_size 2"
    return shlex.split(words + " --gradient_accumulation_steps 3")


def rates(options: Options) -> tuple[object, ...]:
    names = ("learning_rate", "unet_lr", "text_encoder_lr", "embedding_lr")
    return tuple(options.value(name) for name in names)


def test_every_rate_is_multiplied_by_the_pictures_of_a_step(base: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = parse([*base, "--scale_lr"])
    assert rates(options) == (
        pytest.approx(1e-4 * 12),
        pytest.approx(2e-4 * 12),
        (pytest.approx(1e-5 * 12), pytest.approx(2e-5 * 12)),
        pytest.approx(1e-3 * 12),
    )
    (line,) = [line for line in options.notices if "learning rates times" in line]
    assert line.startswith("--scale_lr: learning rates times 2 (batch) x 3 (accumulation) x 2 (processes) = 12: ")
    assert "--text_encoder_lr 0.00012 0.00024" in line
    assert rates(parse(base)) == (1e-4, 2e-4, (1e-5, 2e-5), 1e-3)


def test_rates_that_were_not_given_follow_the_learning_rate(base: list[str]) -> None:
    bare = base[: base.index("--unet_lr")] + base[base.index("--train_batch_size") :]
    assert rates(parse([*bare, "--scale_lr"])) == (pytest.approx(6e-4), None, None, None)


def test_a_printed_command_and_a_written_file_scale_once(
    base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse([*base, "--scale_lr", "--print_command"])
    printed = shlex.split(capsys.readouterr().out.replace("\\\n", " "))[3:]
    with pytest.raises(SystemExit):
        parse([*base, "--scale_lr", "--output_config", "--config_file", str(tmp_path / "c.toml")])
    wanted = rates(parse([*base, "--scale_lr"]))
    assert rates(parse(printed)) == wanted
    assert rates(parse(["--config_file", str(tmp_path / "c.toml")])) == wanted


@pytest.mark.parametrize(
    ("file", "typed", "scaled"),
    [
        ("scale_lr = true", "", True),
        ("scale_lr = true", "--no_scale_lr", False),
        ("no_scale_lr = true", "--scale_lr", True),
        ("no_scale_lr = false", "--scale_lr", True),
        ("scale_lr = false", "", False),
    ],
)
def test_what_is_typed_wins_over_a_file(base: list[str], tmp_path: Path, file: str, typed: str, scaled: bool) -> None:
    (tmp_path / "c.toml").write_text(file)
    options = parse([*base, "--config_file", str(tmp_path / "c.toml"), *typed.split()])
    assert options.optimizer.learning_rate == pytest.approx(6e-4 if scaled else 1e-4)


def test_both_at_once_an_optimizer_without_rates_and_batches_that_differ_are_refused(
    base: list[str], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="--scale_lr: contradicts --no_scale_lr; leave out one"):
        parse([*base, "--scale_lr", "--no_scale_lr"])
    alone = [*base[: base.index("--learning_rate")], "--learning_rate", "1"]
    with pytest.raises(UserError, match="--scale_lr: Prodigy finds the size of its steps itself"):
        parse([*alone, "--scale_lr", "--optimizer_type", "Prodigy"])
    pictures = base[base.index("--train_data_dir") + 1]
    one = f"[[datasets]]\nbatch_size = %d\n[[datasets.subsets]]\nimage_dir = '{pictures}/1_thing'\n"
    (tmp_path / "d.toml").write_text(one % 2 + one % 4)
    with pytest.raises(UserError, match="--scale_lr: the datasets have batches of 2 and 4 pictures"):
        parse([*base, "--scale_lr", "--dataset_config", str(tmp_path / "d.toml")])
    (tmp_path / "d.toml").write_text(one % 2 + one % 4 + "validation_split = 1.0\n")
    held_out = parse([*base, "--scale_lr", "--dataset_config", str(tmp_path / "d.toml")])
    assert held_out.optimizer.learning_rate == pytest.approx(6e-4)


def test_a_dataset_class_has_the_batches_of_the_flag(base: list[str]) -> None:
    words = [word for word in base if word not in ("--train_data_dir", base[base.index("--train_data_dir") + 1])]
    options = parse([*words, "--scale_lr", "--dataset_class", "mine.Pictures"])
    assert options.optimizer.learning_rate == pytest.approx(6e-4)


def test_the_script_of_embeddings_scales_its_rates(base: list[str]) -> None:
    words = [word for word in base if word not in ("--network_module", "networks.lora")]
    words = words[: words.index("--unet_lr")] + words[words.index("--embedding_lr") :]
    options = parse([*words, "--scale_lr"], script=TRAIN_TEXTUAL_INVERSION)
    assert options.optimizer.learning_rate == pytest.approx(6e-4)
    assert options.embeddings.embedding_lr == pytest.approx(6e-3)
