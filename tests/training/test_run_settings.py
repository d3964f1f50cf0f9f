"""Which flags a resumed run must share: every one is classified, and each kind is seen to work."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from library.options import parse
from library.options.registry import FLAGS
from library.options.scripts import TRAIN_TEXTUAL_INVERSION
from library.training.prepare import prepare
from library.training.run_settings import CLASSIFIED, IRRELEVANT, MAY_CHANGE, MUST_BE_EQUAL, TOTAL
from library.training.same_run import differences
from tests.pictures import make_pictures

KINDS = {"must be equal": set(MUST_BE_EQUAL), "may change": set(MAY_CHANGE), "irrelevant": set(IRRELEVANT)}


def test_every_honoured_flag_of_the_training_is_of_exactly_one_kind() -> None:
    wanted = {flag.name for flag in FLAGS.values() if flag.group in CLASSIFIED and flag.kind == "honoured"}
    counts = {name: [kind for kind, names in KINDS.items() if name in names] for name in wanted}
    assert {name: kinds for name, kinds in counts.items() if len(kinds) != 1} == {}
    assert set().union(*KINDS.values()) == wanted


def test_groups_that_are_not_classified_are_those_of_files_and_messages() -> None:
    groups = {flag.group for flag in FLAGS.values()}
    assert groups - set(CLASSIFIED) == {"config", "output", "sampling", "logging", "hub", "processes"}


@pytest.fixture
def settings(tiny_sd1: Path, tmp_path: Path) -> Callable[..., tuple[dict[str, str], dict[str, str]]]:
    """Settings of a run with more flags: those that must be equal, and those that may change."""
    make_pictures(tmp_path / "pictures", count=3, name="thing mycat blorp")

    def make(*more: str) -> tuple[dict[str, str], dict[str, str]]:
        common = ["--pretrained_model_name_or_path", str(tiny_sd1), "--train_data_dir", str(tmp_path / "pictures")]
        common += ["--output_dir", str(tmp_path), "--network_module", "networks.lora", "--resolution", "64"]
        prepared = prepare(parse([*common, "--seed", "1", "--caption_extension", ".txt", *more]))
        return prepared.settings, prepared.may_change

    return make


def test_every_setting_stands_for_a_flag(settings: Callable[..., tuple[dict[str, str], dict[str, str]]]) -> None:
    found, _ = settings()
    assert set(MUST_BE_EQUAL.values()) - {TOTAL} == found.keys() - {"pictures"}


@pytest.mark.parametrize(
    ("line", "setting"),
    [
        ("--network_dim 8", "network"),
        ("--network_args conv_dim=4", "network"),
        ("--network_train_unet_only", "network"),
        ("--text_encoder_lr 0", "network"),
        ("--optimizer_type Lion", "optimizer"),
        ("--optimizer_args weight_decay=0.5", "optimizer"),
        ("--mixed_precision bf16", "precision"),
        ("--mixed_precision bf16 --full_bf16", "precision"),
        ("--train_batch_size 3", "batch size over all processes"),
        ("--gradient_accumulation_steps 2", "gradient_accumulation_steps"),
        ("--lr_scheduler_type StepLR --lr_scheduler_args step_size=2", "lr_scheduler_type"),
        ("--zero_terminal_snr", "zero terminal SNR"),
        ("--latent_sampling sample", "latent_sampling"),
        ("--flip_aug", "data"),
        ("--seed 2", "seed"),
        ("--token_string mycat", "embeddings"),
    ],
)
def test_what_would_make_another_run_changes_a_setting(
    settings: Callable[..., tuple[dict[str, str], dict[str, str]]], line: str, setting: str
) -> None:
    first, _ = settings()
    second, _ = settings(*line.split())
    assert first[setting] != second[setting]


@pytest.mark.parametrize(
    ("started", "line", "told"),
    [
        ("", "--network_alpha 2", "--resume (network): alpha was 1, now 2; resume with the same network"),
        ("", "--network_dim 8 --network_dropout 0.1", "dim was none, now 8, dropout was none, now 0.1; "),
        ("--network_args conv_dim=4", "--network_args conv_dim=8", "(network): --network_args conv_dim was 4, now 8; "),
        ("--network_args conv_dim=4", "", "(network): --network_args conv_dim was 4, now none; "),
        ("--network_args dropout=0.1", "--network_args dropout=0.1 --network_dropout 0.2", " dropout was none, now "),
        ("", "--network_train_unet_only", "parts were unet and text_encoder, now unet, text encoders were trained, n"),
        ("", "--train_batch_size 3", "the run was started with 1, this one has 3; resume with the same batch size"),
        ("", "--flip_aug", "--resume (data): names, sizes, repeats or captions of pictures, buckets, or settings of"),
        ("", "--optimizer_type Lion", "--resume (optimizer): the run was started with AdamW, this one has Lion; "),
        ("--optimizer_type Lion", "", "--resume (optimizer): the run was started with Lion, this one has AdamW; "),
        (
            "",
            "--token_string mycat",
            "--resume (embeddings): token_string was none, now mycat (1 vector), embedding_no",
        ),
        (
            "--token_string mycat blorp --num_vectors_per_token 2",
            "--token_string mycat --num_vectors_per_token 2",
            "token_string was mycat (2 vectors) and blorp (2 vectors), now mycat (2 vectors); resume with the same emb",
        ),
        ("--token_string mycat", "", "token_string was mycat (1 vector), now none, embedding_norm was off, now none; "),
        (
            "--token_string mycat",
            "--token_string mycat --embedding_norm clamp",
            "--resume (embeddings): embedding_norm was off, now clamp; resume with the same embeddings",
        ),
    ],
)
def test_the_refusal_says_what_differs_and_shows_no_hash(
    settings: Callable[..., tuple[dict[str, str], dict[str, str]]], started: str, line: str, told: str
) -> None:
    first, _ = settings(*started.split())
    second, _ = settings(*line.split())
    (problem,) = differences(first, second)
    assert told in str(problem)
    assert not re.search(r"[0-9a-f]{16}", str(problem)) and "{" not in str(problem)
    assert not list(differences(first, first))


def test_files_are_told_of_in_words(settings: Callable[..., tuple[dict[str, str], dict[str, str]]]) -> None:
    now, _ = settings()
    network = json.loads(now["network"])
    started = now | dict.fromkeys(("pictures", "base model", "base weights"), "0123456789abcdef")
    started["network"] = json.dumps(network | {"dim_from_weights": "0123456789abcdef"})
    of_weights = now | {"network": json.dumps(network | {"dim_from_weights": "fedcba9876543210"})}
    told = [str(problem) for problem in differences(started, of_weights)]
    assert [line.partition(")")[0] for line in told] == [
        f"--resume ({name}" for name in ("base model", "base weights", "network", "pictures")
    ]
    assert "the file of --dim_from_weights is another one; " in told[2]
    assert not any("0123456789abcdef" in line for line in told)
    (problem,) = differences(now, of_weights)
    assert "(network): --dim_from_weights was not given, now it is; " in str(problem)


@pytest.mark.parametrize(
    "line", ["--learning_rate 1e-3", "--lr_scheduler cosine", "--noise_offset 0.1", "--loss_type l1", "--clip_skip 2"]
)
def test_what_may_change_changes_only_its_line(
    settings: Callable[..., tuple[dict[str, str], dict[str, str]]], line: str
) -> None:
    first, lines = settings()
    second, others = settings(*line.split())
    assert first == second
    name, value = line.removeprefix("--").split()
    assert {key for key in lines if lines[key] != others[key]} == {name}
    assert others[name] == str(type(FLAGS[name].default or 0.0)(value)) or others[name] == value


def test_the_order_of_arguments_and_what_changes_nothing_are_left_out(
    settings: Callable[..., tuple[dict[str, str], dict[str, str]]],
) -> None:
    first = settings("--network_args", "conv_dim=4", "conv_alpha=2", "--optimizer_args", "eps=1e-6", "weight_decay=0")
    second = settings(
        *("--network_args", "conv_alpha=2", "conv_dim=4", "--optimizer_args", "weight_decay=0", "eps=1e-6"),
        *(
            "--cache_latents",
            "--max_data_loader_n_workers",
            "0",
            "--gradient_checkpointing",
            "--save_every_n_steps",
            "2",
        ),
    )
    assert first == second
    kept = ("--lr_scheduler_type", "StepLR", "--lr_scheduler_args", "step_size=2")
    assert settings(*kept)[0] != settings(*kept, "--learning_rate", "1e-3")[0]
    assert settings("--use_8bit_adam")[0] == settings("--optimizer_type", "AdamW8bit")[0]


TOKEN = ("--token_string", "mycat")


def test_what_vectors_start_from_may_be_gone_and_their_rate_may_change(
    settings: Callable[..., tuple[dict[str, str], dict[str, str]]],
) -> None:
    first, lines = settings(*TOKEN)
    assert settings(*TOKEN, "--init_word", "cat", "--save_embedding_as", "webui")[0] == first
    assert settings(*TOKEN, "--initial_phrase", "cat")[0] == first
    second, others = settings(*TOKEN, "--embedding_lr", "3e-3", "--ti_train_steps_ratio", "0.5")
    assert second == first
    assert {name: others[name] for name in lines if lines[name] != others[name]} == {
        "embedding_lr": "0.003",
        "ti_train_steps_ratio": "0.5",
    }
    kept = (*TOKEN, "--lr_scheduler_type", "StepLR", "--lr_scheduler_args", "step_size=2")
    assert settings(*kept)[0] != settings(*kept, "--embedding_lr", "3e-3")[0]


def test_frozen_embeddings_are_known_by_their_files(
    settings: Callable[..., tuple[dict[str, str], dict[str, str]]], tiny_sd1: Path, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import save_file

    width = json.loads((tiny_sd1 / "text_encoder/config.json").read_text())["hidden_size"]
    file = tmp_path / "style.safetensors"

    def with_file(value: float) -> dict[str, str]:
        save_file({"emb_params": torch.full((2, width), value)}, file)
        return settings("--base_embeddings", f"mycat={file}")[0]

    zeros, ones, without = with_file(0.0), with_file(1.0), settings()[0]
    assert zeros == with_file(0.0)
    (problem,) = differences(zeros, ones)
    told = "--resume (embeddings): the file of --base_embeddings mycat is another one; resume with the same embeddings"
    assert str(problem) == told
    (problem,) = differences(zeros, without)
    assert "(embeddings): --base_embeddings mycat was given, now it is not; " in str(problem)
    (problem,) = differences(without, zeros)
    assert "(embeddings): --base_embeddings mycat was not given, now it is; " in str(problem)


def test_a_state_from_before_there_were_embeddings_is_one_without_any(
    settings: Callable[..., tuple[dict[str, str], dict[str, str]]],
) -> None:
    now, _ = settings()
    started = {name: value for name, value in now.items() if name != "embeddings"}
    assert not list(differences(started, now))
    assert list(differences(started, settings(*TOKEN)[0]))


def test_without_a_network_its_other_flags_are_no_setting(tiny_sd1: Path, tmp_path: Path) -> None:
    make_pictures(tmp_path / "pictures", count=1, name="mycat")
    line = ["--pretrained_model_name_or_path", str(tiny_sd1), "--train_data_dir", str(tmp_path / "pictures")]
    line += ["--output_dir", str(tmp_path), "--resolution", "64", "--caption_extension", ".txt", *TOKEN]
    found = prepare(parse(line, script=TRAIN_TEXTUAL_INVERSION)).settings
    assert json.loads(found["network"]) == {"module": None}
    assert json.loads(found["embeddings"]) == {"token_string": ["mycat (1 vector)"], "embedding_norm": "off"}
