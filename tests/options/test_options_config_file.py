"""Config files: sections, precedence, keys that are wrong or belong to other programs, and --output_config."""

import tomllib
from pathlib import Path

import pytest

from library.errors import UserError
from library.options import Options, parse


@pytest.fixture
def base(tmp_path: Path) -> list[str]:
    (tmp_path / "pictures" / "10_cat").mkdir(parents=True)
    return (
        f"--pretrained_model_name_or_path model --output_dir {tmp_path}/out --network_module networks.lora "
        f"--train_data_dir {tmp_path}/pictures --resolution 512"
    ).split()


def _config(folder: Path, text: str) -> list[str]:
    (folder / "config.toml").write_text(text, encoding="utf-8")
    return ["--config_file", str(folder / "config.toml")]


def _problems(argv: list[str]) -> list[str]:
    with pytest.raises(UserError) as caught:
        parse(argv)
    return [str(problem) for problem in caught.value.problems]


def test_command_line_over_file_over_default(base: list[str], tmp_path: Path) -> None:
    file = _config(tmp_path, "network_dim = 4\nmax_train_steps = 10\nshuffle_caption = true\n")
    options = parse([*base, *file, "--network_dim", "8"])
    assert (options.network.network_dim, options.training.max_train_steps, options.training.seed) == (8, 10, None)
    assert options.dataset.shuffle_caption
    assert {"network_dim", "max_train_steps", "resolution"} <= options.explicit
    assert "seed" not in options.explicit
    assert options.where("network_dim") == "--network_dim"
    assert options.where("max_train_steps") == f"{tmp_path}/config.toml:2 max_train_steps"
    assert options.where("seed") == "--seed"


def test_a_false_in_the_file_takes_no_flag_away(base: list[str], tmp_path: Path) -> None:
    options = parse([*base, *_config(tmp_path, "shuffle_caption = false\nflip_aug = false\n"), "--shuffle_caption"])
    assert options.dataset.shuffle_caption
    assert not options.dataset.flip_aug


def test_a_switch_that_is_off_in_the_file_was_said_all_the_same(base: list[str], tmp_path: Path) -> None:
    options = parse([*base, *_config(tmp_path, "v2 = false\nzero_terminal_snr = 0\nv_parameterization = true\n")])
    assert (options.model.v2, options.loss.zero_terminal_snr, options.model.v_parameterization) == (False, False, True)
    assert {"v2", "zero_terminal_snr", "v_parameterization"} <= options.explicit
    assert "weighted_captions" not in options.explicit


def test_sections_are_flattened_and_later_ones_win(base: list[str], tmp_path: Path) -> None:
    text = "seed = 1\n[first]\nseed = 2\nnetwork_dim = 4\n[second]\nseed = 3\n"
    options = parse([*base, *_config(tmp_path, text)])
    assert (options.training.seed, options.network.network_dim) == (3, 4)
    assert options.where("seed").endswith("config.toml:6 seed")


def test_the_extension_may_be_left_out_and_a_byte_order_mark_is_no_harm(base: list[str], tmp_path: Path) -> None:
    (tmp_path / "my.settings.toml").write_bytes(b"\xef\xbb\xbfseed = 5\r\n")
    assert parse([*base, "--config_file", str(tmp_path / "my.settings")]).training.seed == 5


def test_a_misspelt_key_names_file_line_and_the_nearest_key(base: list[str], tmp_path: Path) -> None:
    problems = _problems([*base, *_config(tmp_path, '[a]\nseed = 1\n[b]\n"learning_rat" = 1e-4\nnetwrok_dim = 3\n')])
    assert problems == [
        f"{tmp_path}/config.toml:4 learning_rat: unknown option; did you mean learning_rate?",
        f"{tmp_path}/config.toml:5 netwrok_dim: unknown option; did you mean network_dim?",
    ]


def test_a_network_setting_in_the_wrong_place_is_told_where_it_belongs(base: list[str], tmp_path: Path) -> None:
    (problem,) = _problems([*base, *_config(tmp_path, "conv_dim = 4\n")])
    assert 'network_args = ["conv_dim=..."]' in problem


def test_problems_of_all_sources_come_together(tmp_path: Path) -> None:
    argv = [*_config(tmp_path, "network_dim = 0.5\nsede = 3\n"), "--colour", "--max_train_steps", "x", "--seed"]
    problems = "\n".join(_problems(argv))
    for part in (
        "--colour: unknown option", "--max_train_steps: 'x' is no whole number", "--seed: expected one argument",
        "config.toml:1 network_dim", "config.toml:2 sede: unknown option; did you mean seed?",
        "--output_dir: is missing",
        "--pretrained_model_name_or_path: is missing", "--network_module: is missing", "--train_data_dir: is missing",
    ):  # fmt: skip
        assert part in problems


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed = 1\nname = [1\nx = 2", "config.toml:"),
        ("seed = 1\nseed = 2\n", "config.toml:2: no valid TOML: cannot overwrite a value"),
        ('a = 1\noutput_dir = "C:\\User"\n', "config.toml:2: no valid TOML"),
    ],
)
def test_a_syntax_error_names_its_line(base: list[str], tmp_path: Path, text: str, message: str) -> None:
    assert any(message in problem for problem in _problems([*base, *_config(tmp_path, text)]))


def test_windows_paths_are_explained(base: list[str], tmp_path: Path) -> None:
    (problem,) = _problems([*base, *_config(tmp_path, 'logging_dir = "C:\\Users\\me"\n')])
    assert "single quotes" in problem


def test_a_missing_or_unreadable_file_is_an_error(base: list[str], tmp_path: Path) -> None:
    assert _problems([*base, "--config_file", f"{tmp_path}/no"]) == [
        f"--config_file: {tmp_path}/no.toml can't be read: there is no such file"
    ]
    (tmp_path / "config.toml").write_bytes(b"output_name = '\xff'")
    (problem,) = _problems([*base, "--config_file", str(tmp_path / "config.toml")])
    assert "UTF-8" in problem


GUI_FILE = """\
ae = ""
blocks_to_swap = 0
bucket_no_upscale = true
bucket_reso_steps = 64
cache_latents = true
caption_dropout_every_n_epochs = 0
caption_dropout_rate = 0
caption_extension = ".txt"
clip_l = ""
clip_skip = "1"
discrete_flow_shift = 3.1582
dynamo_backend = "no"
enable_bucket = true
epoch = 8
gradient_accumulation_steps = 1
guidance_scale = 3.5
huber_c = 0.1
huber_scale = 1
huber_schedule = "snr"
learning_rate = 0.0001
loss_type = "l2"
lr_scheduler = "cosine"
lr_scheduler_args = []
lr_scheduler_num_cycles = 1
lr_scheduler_power = 1
lr_warmup_steps = 80
max_bucket_reso = 2048
max_data_loader_n_workers = 0
max_grad_norm = 1
max_timestep = 1000
max_token_length = 75
max_train_steps = 1600
min_bucket_reso = 256
mixed_precision = "bf16"
network_alpha = 16
network_args = []
network_dim = 32.0
network_module = "networks.lora"
no_token_padding = false
noise_offset_type = "Original"
optimizer_args = []
optimizer_type = "AdamW"
persistent_data_loader_workers = 0
prior_loss_weight = 1
resolution = "512,512"
sample_sampler = "euler_a"
save_every_n_epochs = 1
save_model_as = "safetensors"
save_precision = "fp16"
stop_text_encoder_training = 0
t5xxl = ""
text_encoder_batch_size = 0
text_encoder_lr = [ 5e-5, 5e-5,]
timestep_sampling = "sigma"
train_batch_size = 1
train_inpainting = false
unet_lr = 0.0001
wandb_run_name = "last"
xformers = true
"""


def test_a_file_of_the_kohya_gui_works_with_one_line_for_its_own_keys(tmp_path: Path) -> None:
    (tmp_path / "pictures" / "10_cat").mkdir(parents=True)
    argv = f"--pretrained_model_name_or_path m --output_dir {tmp_path} --train_data_dir {tmp_path}/pictures".split()
    options = parse([*argv, *_config(tmp_path, GUI_FILE)])
    foreign = [line for line in options.notices if "keys of other programs" in line]
    assert len(foreign) == 1
    for name in (
        "ae",
        "blocks_to_swap",
        "epoch",
        "noise_offset_type",
        "train_inpainting",
    ):
        assert name in foreign[0]
    assert [line for line in options.notices if "max_train_steps counts" in line]
    assert (options.network.network_dim, options.model.clip_skip, options.model.max_token_length) == (32, 1, None)
    assert options.optimizer.text_encoder_lr == (5e-5, 5e-5)
    rest = [line for line in options.notices if "keys of other programs" not in line and "epoch" not in line]
    assert [line.split()[1] for line in rest] == ["wandb_run_name:"] and "without --log_with" in rest[0]


def test_output_config_round_trip(base: list[str], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n")
    argv = [
        *base, "--network_args", "conv_dim=4", "conv_alpha=1", "--text_encoder_lr", "1e-5", "--learning_rate", "1e-05",
        "--shuffle_caption", "--caption_prefix", 'a "quoted" \\ \t ünïcode\x7f', "--lr_scheduler", "cosine",
        "--lr_warmup_steps", "0.1", "--seed", "0", "--max_train_steps", "1600", "--wandb_api_key", "secret",
        "--sample_prompts", f"{tmp_path}/prompts.txt",
    ]  # fmt: skip
    expected: Options = parse(argv)
    with pytest.raises(SystemExit) as stopped:
        parse([*argv, "--output_config", "--config_file", str(tmp_path / "written")])
    assert stopped.value.code == 0
    text = (tmp_path / "written.toml").read_text(encoding="utf-8")
    content = tomllib.loads(text)
    assert "secret" not in text
    assert not {"config_file", "output_config", "max_train_steps"} & set(content)
    assert content["resolution"] == "512,512"
    again = parse(["--config_file", str(tmp_path / "written.toml")])
    assert again.effective() == {**expected.effective(), "config_file": str(tmp_path / "written.toml")}
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def test_output_config_refuses_an_existing_file_and_a_missing_name(base: list[str], tmp_path: Path) -> None:
    file = _config(tmp_path, "seed = 1\n")
    (problem,) = _problems([*base, "--output_config", *file])
    assert "exists already" in problem
    assert (tmp_path / "config.toml").read_text() == "seed = 1\n"
    (problem,) = _problems([*base, "--output_config"])
    assert "--config_file" in problem
    (problem,) = _problems([*base, "--output_config", "--config_file", f"{tmp_path}/no/such.toml"])
    assert "can't be written" in problem


def test_output_config_with_a_wrong_value_writes_nothing(base: list[str], tmp_path: Path) -> None:
    _problems([*base, "--output_config", "--config_file", f"{tmp_path}/new.toml", "--seed", "x"])
    assert not (tmp_path / "new.toml").exists()
