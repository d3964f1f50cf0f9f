"""What must hold between options, and what must exist before a run starts."""

import os
import sys
from pathlib import Path

import pytest

from library.errors import UserError
from library.options import parse
from library.options.modules import LYCORIS_ALGOS, check_network_args, find_module
from library.options.scripts import TRAIN_TEXTUAL_INVERSION


@pytest.fixture
def base(tmp_path: Path) -> list[str]:
    (tmp_path / "pictures" / "10_cat").mkdir(parents=True)
    return (
        f"--pretrained_model_name_or_path model --output_dir {tmp_path}/out --network_module networks.lora "
        f"--train_data_dir {tmp_path}/pictures --resolution 512"
    ).split()


def _problems(argv: list[str]) -> list[str]:
    with pytest.raises(UserError) as caught:
        parse(argv)
    return [str(problem) for problem in caught.value.problems]


def test_nothing_is_wrong_with_the_base_and_no_folder_is_made(base: list[str], tmp_path: Path) -> None:
    assert parse(base).notices == ()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flag", ["--pretrained_model_name_or_path", "--output_dir", "--network_module", "--train_data_dir"]
)
def test_what_a_run_can_not_do_without(base: list[str], flag: str) -> None:
    at = base.index(flag)
    (problem,) = _problems(base[:at] + base[at + 2 :])
    assert problem.startswith(f"{flag}: is missing; ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--lr_warmup_steps 10", "--lr_warmup_steps: constant has no warmup"),
        ("--network_train_unet_only --network_train_text_encoder_only", "nothing would be left to train"),
        ("--learning_rate 0", "--learning_rate: the learning rate of U-Net and text encoder is 0"),
        ("--unet_lr 0 --network_train_unet_only", "the learning rate of U-Net is 0"),
        ("--text_encoder_lr 1 1 1", "more than two learning rates"),
        ("--unet_lr 0 --text_encoder_lr 0 0", "the learning rate of U-Net and text encoder is 0"),
        (
            "--cache_text_encoder_outputs",
            "--cache_text_encoder_outputs: the outputs of text encoders that are trained can't be cached; "
            "add --network_train_unet_only",
        ),
        ("--cache_text_encoder_outputs_to_disk --text_encoder_lr 0 1", "_to_disk: the outputs of text encoders that"),
        ("--cache_text_encoder_outputs --network_train_text_encoder_only", "can't be cached; leave the cache out"),
        ("--text_memo_mb -1", "--text_memo_mb: -1 is out of range: it must be at least 0"),
        ("--deepspeed", "--deepspeed: not supported; a network's optimizer state is small"),
        ("--sample_every_n_steps 5", "--sample_every_n_steps: previews need prompts; add --sample_prompts FILE"),
        ("--sample_at_first", "--sample_at_first: previews need prompts"),
        ("--sample_at_first --sample_prompts /no/such.txt", "--sample_prompts: there is no file /no/such.txt"),
        ("--optimizer_args betas=0.9", "betas=0.9 must be two numbers"),
        ("--optimizer_args eps=True", "eps=True is no number"),
        ("--lr_scheduler polynomial --lr_scheduler_args lr_end='x'", "--lr_scheduler_args"),
        ("--log_with tensorboard", "--log_with: TensorBoard needs a folder; add --logging_dir DIR"),
        ("--network_weights /no/such.safetensors", "--network_weights: there is no file"),
        ("--dim_from_weights", "--dim_from_weights: needs --network_weights"),
        ("--resume /no/state", "--resume: there is no state folder /no/state"),
        ("--output_name a/b", "--output_name: 'a/b' is no file name"),
        ("--min_timestep 500 --max_timestep 500", "--min_timestep: no timestep lies from 500 to below 500"),
        ("--optimizer_type AdmW", "--optimizer_type: there is no optimizer AdmW; did you mean AdamW?"),
        ("--optimizer_args weight_decay", "--optimizer_args: 'weight_decay' is no key=value"),
        ("--optimizer_args weigt_decay=0.1", "AdamW has no setting weigt_decay; did you mean weight_decay?"),
        ("--optimizer_args weight_decay=lots", "'lots' is no number"),
        ("--optimizer_args eps=1 eps=2", "eps is given twice"),
        ("--lr_scheduler_args lr_end=0", "--lr_scheduler constant has no setting lr_end; it has none"),
        ("--network_args cov_dim=4", "--network_args: networks.lora has no setting cov_dim; did you mean conv_dim?"),
        ("--network_args conv_dim=4.5", "conv_dim=4.5: '4.5' is not a whole number"),
        ("--network_args conv_dim=-1", "conv_dim=-1: -1 is out of range"),
        ("--network_args module_dropout=1", "module_dropout=1: 1.0 is out of range: it must be below 1"),
        ("--network_args conv_alpha=1", "conv_alpha has no effect without conv_dim"),
        ("--network_args algo=loha", "it belongs to --network_module lycoris.kohya"),
        ("--network_args conv_dim", "'conv_dim' is no key=value"),
        (
            "--network_module lycoris.kohya --network_args algo=lohaa",
            "--network_args: LyCORIS has no algo lohaa; did you mean loha?",
        ),
        ("--network_module lycoris.kohya --network_args algo=x", "known are locon, lora, loha, lokr, ia3, dylora,"),
        ("--train_batch_size 0", "--train_batch_size: 0 is out of range: it must be at least 1"),
        ("--gradient_accumulation_steps 0", "--gradient_accumulation_steps: 0 is out of range"),
        ("--max_train_steps 0", "--max_train_steps: 0 is out of range"),
        ("--shuffle_caption true", "--shuffle_caption: takes no value, but 'true' follows"),
        ("--shuffle_caption=true", "--shuffle_caption: is a switch, which takes no value"),
        ("--cap 3", "--cap: is ambiguous; it could be --caption_separator, "),
        ("--learning_rat 1 --netwrok_dim 4", "--netwrok_dim: unknown option; did you mean --network_dim?"),
        ("--blocks_to_swap 3", "--blocks_to_swap: unknown option; it belongs to scripts for other kinds of models"),
        ("--seed 1 2", "'2' belongs to no option"),
    ],
)
def test_each_mistake_has_its_message(base: list[str], argv: str, message: str) -> None:
    (problem,) = _problems([*base, *argv.split()])
    assert message in problem


@pytest.mark.parametrize(
    "argv",
    [
        "--lr_scheduler constant_with_warmup --lr_warmup_steps 10",
        "--optimizer_type adamw --optimizer_args weight_decay=0.1 betas=0.9,0.99",
        "--lr_scheduler polynomial --lr_scheduler_args lr_end=1e-8",
        "--network_args conv_dim=4 conv_alpha=0.5 rank_dropout=0.1 module_dropout=0",
        "--unet_lr 0 --text_encoder_lr 1e-4",
        "--network_args conv_dim=None dropout=0.1",
        "--resume latest --resume_schedule keep",
        "--learning_r 1e-4 --network_di=4",
        "--min_timestep 0 --max_timestep 1",
        "--unet_lr 0 --text_encoder_lr 0 1e-4",
        "--cache_text_encoder_outputs --network_train_unet_only --text_memo_mb 0",
        "--cache_text_encoder_outputs --text_encoder_lr 0",
        "--v2 --v_parameterization --zero_terminal_snr --weighted_captions --exact_crop_conditioning",
        "--vae some/vae --text_encoder some/model --variant fp16 --ignore_model_hash",
    ],
)
def test_what_is_right_passes_without_a_word(base: list[str], argv: str) -> None:
    assert parse([*base, *argv.split()]).notices == ()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--sdpa", "--sdpa: nothing to do: "),
        ("--huber_c 0.2", "--huber_c: has no effect without --loss_type"),
        (
            "--max_train_epochs 2 --max_train_steps 9",
            "--max_train_steps: has no effect, because max_train_epochs counts",
        ),
        (
            "--lr_scheduler linear --lr_warmup_steps 10 --max_train_steps 5",
            "10 steps of warmup are more than all 5 steps",
        ),
        ("--log_prefix x", "--log_prefix: has no effect without TensorBoard (--logging_dir)"),
        ("--resume_schedule keep", "--resume_schedule: has no effect without --resume"),
        ("--text_memo_mb 64", "--text_memo_mb: has no effect while text encoders are trained"),
    ],
)
def test_what_has_no_effect_is_said_in_one_line(base: list[str], argv: str, message: str) -> None:
    (notice,) = parse([*base, *argv.split()]).notices
    assert message in notice


def test_an_output_dir_that_can_not_be_made(base: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    at = base.index("--output_dir") + 1
    for folder, message in {
        tmp_path / "file" / "a" / "b": f"can't be made: {tmp_path}/file is a file",
        tmp_path / "file": "is a file; give a folder",
    }.items():
        (problem,) = _problems([*base[:at], str(folder), *base[at + 1 :]])
        assert problem.startswith("--output_dir: ")
        assert message in problem


@pytest.mark.skipif(
    os.name != "posix" or os.geteuid() == 0, reason="permissions stop nobody here: run as a user other than root"
)
def test_an_output_dir_without_permission(base: list[str], tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    (problem,) = _problems([*base, "--output_dir", f"{tmp_path}/closed/out"])
    assert "no permission" in problem


def test_a_file_of_weights_is_no_state(base: list[str], tmp_path: Path) -> None:
    file = tmp_path / "cat.safetensors"
    file.touch()
    (problem,) = _problems([*base, "--resume", str(file)])
    assert problem.startswith(f"--resume: {file} is a file of weights, not the folder of a state; to start from these")
    assert "--network_weights (embeddings: --weights)" in problem
    with pytest.raises(UserError) as caught:
        parse([*base, "--resume", str(file)], script=TRAIN_TEXTUAL_INVERSION)
    (problem,) = [str(one) for one in caught.value.problems if one.where == "--resume"]
    assert "give them as --weights;" in problem


def test_prompts_of_an_unknown_kind(base: list[str], tmp_path: Path) -> None:
    (tmp_path / "prompts.md").write_text("a cat")
    (problem,) = _problems([*base, "--sample_prompts", f"{tmp_path}/prompts.md", "--sample_every_n_epochs", "1"])
    assert "none of .txt, .toml, .json" in problem


def test_what_is_refused_is_not_said_to_have_no_effect_too(base: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse([*base, "--dynamo_backend", "ofi"])
    (problem,) = caught.value.problems
    assert str(problem).startswith("--dynamo_backend: ofi can't be used; ") and caught.value.notices == ()


def test_ranks_from_weights_and_a_rank(base: list[str], tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"")
    argv = [*base, "--network_weights", f"{tmp_path}/w.safetensors", "--dim_from_weights", "--network_dim", "4"]
    assert parse(argv).notices == ("--network_dim: has no effect, because dim_from_weights counts",)


def test_caching_to_disk_is_caching(base: list[str]) -> None:
    argv = [*base, "--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk", "--network_train_unet_only"]
    caching = parse(argv).caching
    assert caching.cache_latents
    assert caching.cache_text_encoder_outputs


@pytest.mark.parametrize("algo", LYCORIS_ALGOS)
def test_every_algo_of_lycoris_passes(algo: str) -> None:
    where = "--network_args"
    assert not check_network_args("lycoris.kohya", [f"algo={algo.upper()}", "dora_wd=True"], where)


def test_a_network_module_is_found_without_running_it(
    base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lib" / "boom_networks" / "deep").mkdir(parents=True)
    for folder in ("boom_networks", "boom_networks/deep"):
        (tmp_path / "lib" / folder / "__init__.py").write_text("raise RuntimeError('was run')")
    (tmp_path / "lib" / "boom_networks" / "deep" / "net.py").write_text("raise RuntimeError('was run')")
    (tmp_path / "lib" / "boom_plain.py").write_text("raise RuntimeError('was run')")
    (tmp_path / "lib" / "boom_space").mkdir()
    (tmp_path / "lib" / "boom_space" / "net.py").write_text("raise RuntimeError('was run')")
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    at = base.index("--network_module") + 1
    for name in ("boom_networks.deep.net", "boom_plain", "boom_space.net"):
        assert parse([*base[:at], name, *base[at + 1 :], "--network_args", "any=1"]).network.network_module == name
    assert find_module("boom_networks.deep.no") == "there is no module boom_networks.deep.no"
    assert find_module("boom_plain.x") == "boom_plain is no package"
    assert find_module("not a module") == "'not a module' is no dotted name of a module"
    assert not [name for name in sys.modules if name.startswith("boom_")]


def test_an_unknown_network_module_names_the_nearest(base: list[str]) -> None:
    at = base.index("--network_module") + 1
    (problem,) = _problems([*base[:at], "networks.lorra", *base[at + 1 :]])
    assert problem == "--network_module: there is no module networks.lorra; did you mean networks.lora?"
