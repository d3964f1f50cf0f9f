"""What a user may write for a value, in a config file and on the command line, and what it means."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from library.errors import UserError
from library.options import Options, parse


@pytest.fixture
def base(tmp_path: Path) -> list[str]:
    """Arguments of a run in which nothing is wrong."""
    (tmp_path / "pictures" / "10_cat").mkdir(parents=True)
    return (
        f"--pretrained_model_name_or_path model --output_dir {tmp_path}/out --network_module networks.lora "
        f"--train_data_dir {tmp_path}/pictures --resolution 512"
    ).split()


@pytest.fixture
def with_config(base: list[str], tmp_path: Path) -> Callable[..., Options]:
    """Parses a config file's text, and further arguments, on top of `base`."""

    def read(text: str, *argv: str) -> Options:
        (tmp_path / "config.toml").write_text(text, encoding="utf-8")
        return parse([*base, "--config_file", str(tmp_path / "config.toml"), *argv])

    return read


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("network_dim = 32.0", "network_dim", 32),
        ('network_dim = "32.0"', "network_dim", 32),
        ('clip_skip = "1"', "clip_skip", 1),
        ("shuffle_caption = 1", "shuffle_caption", True),
        ("shuffle_caption = 0", "shuffle_caption", False),
        ("enable_bucket = false", "enable_bucket", False),
        ("persistent_data_loader_workers = 0", "persistent_data_loader_workers", False),
        ('learning_rate = "1e-4"', "learning_rate", 1e-4),
        ("network_alpha = 4", "network_alpha", 4.0),
        ("max_token_length = 75", "max_token_length", None),
        ('max_token_length = "225"', "max_token_length", 225),
        ('dynamo_backend = "no"', "dynamo_backend", "inductor"),
        ("network_args = []", "network_args", None),
        ("optimizer_args = []", "optimizer_args", None),
        ("lr_scheduler_args = []", "lr_scheduler_args", None),
        ('network_args = ["conv_dim=4", "conv_alpha=1"]', "network_args", ("conv_dim=4", "conv_alpha=1")),
        ("text_encoder_lr = 1e-5", "text_encoder_lr", (1e-5,)),
        ("text_encoder_lr = [1e-5, 2e-5]", "text_encoder_lr", (1e-5, 2e-5)),
        ('text_encoder_lr = "5e-5"', "text_encoder_lr", (5e-5,)),
        ("text_encoder_lr = []", "text_encoder_lr", None),
        ("sample_every_n_epochs = 0", "sample_every_n_epochs", None),
        ("save_every_n_epochs = 2", "save_every_n_epochs", 2),
        ('vae = ""', "vae", None),
        ('output_name = "my lora"', "output_name", "my lora"),
        ("output_name = 7", "output_name", "7"),
        ('keep_tokens_separator = "|||"', "keep_tokens_separator", "|||"),
        ("seed = 0", "seed", 0),
    ],
)
def test_lossless_conversions_are_silent(with_config: Callable[..., Options], line: str, name: str, value: Any) -> None:
    options = with_config(line)
    assert options.value(name) == value
    assert type(options.value(name)) is type(value)
    assert options.notices == ()


_SIZES = {
    "640": (640, 640),
    "640.0": (640, 640),
    '"640"': (640, 640),
    '"640, 768"': (640, 768),
    "[640, 768]": (640, 768),
    "[640]": (640, 640),
}


def test_resolution_is_a_number_a_text_or_a_list(tmp_path: Path) -> None:
    (tmp_path / "pictures" / "1_x").mkdir(parents=True)
    for written, size in _SIZES.items():
        config = (
            f"resolution = {written}\npretrained_model_name_or_path = 'm'\noutput_dir = '{tmp_path}/out'\n"
            f"network_module = 'networks.lora'\ntrain_data_dir = '{tmp_path}/pictures'\n"
        )
        (tmp_path / "c.toml").write_text(config)
        assert parse(["--config_file", str(tmp_path / "c.toml")]).dataset.resolution == size


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("80", 80), ("0", 0), ("0.1", 0.1), ("1", 1), ("1.0", 1.0), ("80.0", 80), ('"0.1"', 0.1), ('"10%"', 0.1),
        ('"100%"', 1.0), ('"80"', 80), ('"1e3"', 1000), ("0.0", 0),
    ],
)  # fmt: skip
def test_warmup_is_steps_or_a_ratio(with_config: Callable[..., Options], written: str, value: float) -> None:
    schedule = 'lr_scheduler = "cosine"\nmax_train_steps = 5000\n'
    from_file = with_config(f"{schedule}lr_warmup_steps = {written}").optimizer.lr_warmup_steps
    from_flag = with_config(schedule, "--lr_warmup_steps", written.strip('"')).optimizer.lr_warmup_steps
    assert from_file == from_flag == value
    assert type(from_file) is type(from_flag) is type(value)


@pytest.mark.parametrize("written", ["1.5", "80.5", "-1", "120%", "many", "nan", "inf"])
def test_warmup_that_is_neither_is_an_error(base: list[str], written: str) -> None:
    with pytest.raises(UserError, match="--lr_warmup_steps: "):
        parse([*base, "--lr_scheduler", "cosine", "--lr_warmup_steps", written])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("network_dim = 32.5", "config.toml:2 network_dim: 32.5 is not a whole number"),
        ('network_dim = "many"', "config.toml:2 network_dim: 'many' is no whole number"),
        ("network_dim = true", "config.toml:2 network_dim: true is no whole number"),
        ("network_dim = 0", "config.toml:2 network_dim: 0 is out of range: it must be at least 1"),
        ("network_dim = [4]", "config.toml:2 network_dim: is a list; wanted: whole number"),
        ("network_args = {conv_dim = 4}", "config.toml:2 network_args: is a table; wanted: texts"),
        ("shuffle_caption = 2", "config.toml:2 shuffle_caption: 2 is neither true nor false"),
        ('shuffle_caption = "yes"', "config.toml:2 shuffle_caption: 'yes' is neither true nor false"),
        ('learning_rate = "fast"', "config.toml:2 learning_rate: 'fast' is no number"),
        ("learning_rate = nan", "config.toml:2 learning_rate: nan is no number"),
        ("learning_rate = -1.0", "config.toml:2 learning_rate: -1.0 is out of range: it must be at least 0"),
        ("text_encoder_lr = [1e-4, -1]", "config.toml:2 text_encoder_lr: -1.0 is out of range"),
        ('mixed_precision = "bp16"', "config.toml:2 mixed_precision: 'bp16' is not among no, fp16, bf16; did you mean"),
        ("max_token_length = 100", "config.toml:2 max_token_length: 100 is not among 150 or 225"),
        ("output_name = 1.5", "config.toml:2 output_name: 1.5 is no text; write it in quotes"),
        ("output_name = true", "config.toml:2 output_name: true is no text"),
        ("clip_skip = 1979-05-27", "config.toml:2 clip_skip: 1979-05-27 is no whole number"),
        ("caption_dropout_rate = 1.5", "config.toml:2 caption_dropout_rate: 1.5 is out of range: it must be at most 1"),
        ("network_dropout = 1", "config.toml:2 network_dropout: 1.0 is out of range: it must be below 1"),
        ("train_data_dir = 5.5", "is no text"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_an_error_with_its_line(base: list[str], tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "config.toml").write_text(f"# settings\n{line}\n")
    rest = base if not line.startswith("train_data_dir") else base[:6]
    with pytest.raises(UserError) as caught:
        parse([*rest, "--config_file", str(tmp_path / "config.toml")])
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["512x768", "0", "512,768,3", "a", "", "-5"])
def test_a_wrong_resolution_is_an_error(base: list[str], text: str) -> None:
    with pytest.raises(UserError) as caught:
        parse([*base[:-2], "--resolution", text])
    (problem,) = caught.value.problems
    assert problem.where == "--resolution"
    assert "size" in problem.wrong


def test_numbers_on_the_command_line(base: list[str]) -> None:
    options = parse([*base, "--noise_offset", "0.05", "--network_dim", "8", "--network_alpha", "1e0", "--unet_lr", "0"])
    assert (options.loss.noise_offset, options.network.network_dim) == (0.05, 8)
    assert (options.network.network_alpha, options.optimizer.unet_lr) == (1.0, 0.0)
