"""Flags of the optimizer and of the schedule: what is refused, what has no effect, what passes without a word."""

import importlib.machinery
from pathlib import Path
from typing import Any

import pytest

from library.errors import UserError
from library.options import Options, modules, parse
from library.options.optimizer_checks import chosen_optimizer
from library.options.optimizer_names import (
    OPTIMIZERS,
    SCHEDULE_NAMES,
    TORCH_NAMES,
    list_text,
    optimizer_info,
)
from library.options.optimizer_settings import parse_arguments, step_rules


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


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--use_8bit_adam --use_lion_optimizer", "each of them chooses the optimizer; give one of them"),
        ("--use_8bit_adam --optimizer_type AdamW8bit", "--use_8bit_adam, --optimizer_type: each of them chooses"),
        ("--optimizer_type DAdaptFoo", "there is no optimizer DAdaptFoo; "),
        ("--optimizer_type adam", "there is no optimizer adam; did you mean Adam?"),
        ("--optimizer_type LBFGS", "LBFGS can't be used: it needs the loss several times for a step; use AdamW"),
        ("--optimizer_type no_such_package.sub.Adam", "--optimizer_type: there is no module no_such_package; install"),
        ("--optimizer_args betas=0.9,0.99,0.999", "betas=0.9,0.99,0.999 must be two numbers"),
        ("--optimizer_args betas=0.9,1", "betas=0.9,1: 1.0 is out of range: it must be below 1"),
        ("--optimizer_args lr=0.1", "lr is no setting of an optimizer here; use --learning_rate"),
        ("--optimizer_args eps=None", "eps=None is no number"),
        ("--optimizer_type DAdaptAdan --learning_rate 1 --optimizer_args betas=0.9,0.9", "must be three numbers"),
        ("--optimizer_type Lion --optimizer_args eps=1e-8", "Lion has no setting eps"),
        ("--optimizer_type Prodigy --learning_rate 1 --optimizer_args d_ceof=2", "did you mean d_coef?"),
        (
            "--optimizer_type Prodigy --unet_lr 1 --text_encoder_lr 0.5",
            "--unet_lr: Prodigy takes one learning rate, not",
        ),
        (
            "--optimizer_type DAdaptSGD --learning_rate 1 --text_encoder_lr 1 0.5",
            "--text_encoder_lr: DAdaptSGD takes one",
        ),
        (
            "--optimizer_type Prodigy --learning_rate 1 --network_args loraplus_lr_ratio=16",
            "loraplus_lr_ratio makes several learning rates, and Prodigy takes one",
        ),
        ("--lr_scheduler adafactor", "adafactor is only for --optimizer_type Adafactor; use constant_with_warmup"),
        (
            "--optimizer_type Adafactor --lr_warmup_steps 10",
            "--lr_warmup_steps: Adafactor finds its learning rate itself",
        ),
        (
            "--optimizer_type Adafactor --optimizer_args relative_step=False --lr_scheduler adafactor",
            "adafactor is only for --optimizer_type Adafactor with relative_step=True",
        ),
        (
            "--optimizer_type Adafactor --optimizer_args relative_step=False warmup_init=True",
            "warmup_init=True can't be used with relative_step=False",
        ),
        (
            "--optimizer_type DAdaptSGD --learning_rate 1 --lr_scheduler linear --lr_warmup_steps 0.1",
            "--lr_warmup_steps: DAdaptSGD can't make a step at the learning rate 0",
        ),
        ("--lr_scheduler cosine_with_min_lr", "cosine_with_min_lr needs --lr_scheduler_min_lr_ratio"),
        (
            "--lr_scheduler piecewise_constant",
            "piecewise_constant needs step_rules; add --lr_scheduler_args step_rules=",
        ),
        ("--lr_scheduler piecewise_constant --lr_scheduler_args step_rules=1:a,2", "step_rules=1:a,2 must be factors"),
        (
            "--lr_scheduler piecewise_constant --lr_scheduler_args step_rules=1:5,0.1 --lr_warmup_steps 3",
            "piecewise_constant has no warmup",
        ),
        (
            "--lr_scheduler warmup_stable_decay --lr_warmup_steps 0.6 --lr_decay_steps 0.5",
            "warmup 0.6 and decay 0.5 are more than the whole run",
        ),
        (
            "--lr_scheduler polynomial --lr_scheduler_args lr_end=1e-3",
            "--lr_scheduler_args: lr_end=0.001 is not below the learning rate 2e-06",
        ),
        (
            "--lr_scheduler polynomial --learning_rate 1e-8",
            "--lr_scheduler: lr_end=1e-07 is not below the learning rate",
        ),
        (
            "--lr_scheduler_type CosineAnealingLR",
            "torch.optim.lr_scheduler has no CosineAnealingLR; did you mean Cosine",
        ),
        ("--lr_scheduler_type LambdaLR", "LambdaLR can't be used: it needs a function, which no flag can hold"),
        ("--lr_scheduler_type torch.optim.lr_scheduler.ReduceLROnPlateau", "use --early_stopping_patience"),
        ("--lr_scheduler_type no_such.LR", "--lr_scheduler_type: there is no module no_such"),
        ("--lr_scheduler_type StepLR --lr_warmup_steps 5", "--lr_warmup_steps: StepLR has no warmup by this flag"),
        ("--lr_scheduler_type StepLR --lr_scheduler_args step_size", "'step_size' is no key=value"),
    ],
)
def test_each_mistake_has_its_message(base: list[str], argv: str, message: str) -> None:
    (problem,) = _problems([*base, *argv.split()])
    assert message in problem


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            "--optimizer_type Prodigy --learning_rate 1e-4",
            "--learning_rate: Prodigy finds the size of its steps itself and takes learning rates about 1, 0.0001 is",
        ),
        (
            "--optimizer_type DAdaptAdan --learning_rate 1 --unet_lr 0.5",
            "--optimizer_type: DAdaptAdan is not made for several learning rates",
        ),
        (
            "--optimizer_type AdamWScheduleFree --lr_scheduler cosine",
            "--lr_scheduler: has no effect, because AdamWScheduleFree needs no schedule",
        ),
        (
            "--optimizer_type Adafactor --lr_scheduler cosine",
            "--lr_scheduler: has no effect, because Adafactor finds its learning rate itself",
        ),
        ("--optimizer_type Adafactor --learning_rate 1e-4", "--learning_rate: only says what is trained, because"),
        (
            "--optimizer_type Adafactor --optimizer_args relative_step=False --lr_scheduler constant_with_warmup",
            "--max_grad_norm: Adafactor shortens its updates itself; 0 is recommended",
        ),
        (
            "--optimizer_type Adafactor --optimizer_args relative_step=False --max_grad_norm 0",
            "--lr_scheduler: constant_with_warmup is recommended for Adafactor",
        ),
        (
            "--optimizer_type Adafactor --optimizer_args relative_step=False clip_threshold=2 --max_grad_norm 0 "
            "--lr_scheduler constant_with_warmup",
            "--optimizer_args: clip_threshold=1.0 is recommended for Adafactor",
        ),
        ("--lr_scheduler_power 2", "--lr_scheduler_power: has no effect with --lr_scheduler constant"),
        ("--lr_scheduler cosine --lr_scheduler_num_cycles 3", "has no effect with --lr_scheduler cosine"),
        ("--lr_scheduler linear --lr_decay_steps 3", "--lr_decay_steps: has no effect with --lr_scheduler linear"),
        ("--lr_scheduler warmup_stable_decay", "warmup_stable_decay without --lr_decay_steps never falls"),
        (
            "--lr_scheduler cosine --lr_scheduler_type StepLR --lr_scheduler_args step_size=3",
            "--lr_scheduler: has no effect, because lr_scheduler_type counts",
        ),
    ],
)
def test_what_has_no_effect_or_is_doubtful_is_said_in_one_line(base: list[str], argv: str, message: str) -> None:
    (notice,) = parse([*base, *argv.split()]).notices
    assert message in notice


@pytest.mark.parametrize(
    "argv",
    [
        "--use_8bit_adam",
        "--use_lion_optimizer --optimizer_args betas=(0.9,0.95)",
        "--optimizer_type pagedadamw8bit --optimizer_args min_8bit_size=1024",
        "--optimizer_type prodigy --learning_rate 1 --optimizer_args d_coef=2 beta3=None use_bias_correction=True",
        "--optimizer_type Prodigy --unet_lr 1 --text_encoder_lr 0 --lr_scheduler cosine",
        "--optimizer_type Prodigy --unet_lr 1 --network_train_unet_only",
        "--optimizer_type Prodigy --unet_lr 1 --stop_text_encoder_training -1",
        "--lr_scheduler_num_cycles 1 --lr_scheduler_power 1",
        "--optimizer_type Adafactor --optimizer_args warmup_init=True --lr_scheduler adafactor",
        "--optimizer_type AdamWScheduleFree --optimizer_args warmup_steps=10 --lr_scheduler constant",
        "--optimizer_type RAdam --optimizer_args anything=1",
        "--optimizer_type torch.optim.RAdam",
        "--optimizer_args foreach=None weight_decay=1",
        "--lr_scheduler inverse_sqrt --lr_scheduler_timescale 20 --lr_warmup_steps 3",
        "--lr_scheduler cosine_with_min_lr --lr_scheduler_min_lr_ratio 0.1 --lr_scheduler_num_cycles 3",
        "--lr_scheduler warmup_stable_decay --lr_decay_steps 20% --lr_warmup_steps 0.1",
        "--lr_scheduler piecewise_constant --lr_scheduler_args step_rules=1:10,0.1:20,0.01",
        "--lr_scheduler_type OneCycleLR --lr_scheduler_args max_lr=1 total_steps=10",
    ],
)
def test_what_is_right_passes_without_a_word(base: list[str], argv: str) -> None:
    assert parse([*base, *argv.split()]).notices == ()


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ({}, "AdamW"),
        ({"optimizer_type": "adamw8BIT"}, "AdamW8bit"),
        ({"optimizer_type": "DAdaptation"}, "DAdaptAdamPreprint"),
        ({"use_8bit_adam": True}, "AdamW8bit"),
        ({"use_lion_optimizer": True}, "Lion"),
        ({"optimizer_type": "RAdam"}, "RAdam"),
        ({"optimizer_type": "package.Some"}, "package.Some"),
        ({"optimizer_type": "unknown"}, "unknown"),
    ],
)
def test_the_chosen_optimizer(flags: dict[str, Any], name: str) -> None:
    assert chosen_optimizer(Options.model_validate({"optimizer": flags})) == name


def test_any_name_that_ends_in_schedulefree_needs_no_schedule() -> None:
    info = optimizer_info("prodigyplus.ProdigyPlusScheduleFree")
    assert (
        info is not None
        and info.schedule_free
        and (info.module, info.cls) == ("prodigyplus", "ProdigyPlusScheduleFree")
    )
    other = optimizer_info("torch.optim.Adam")
    assert other is not None and not other.schedule_free
    assert optimizer_info("torch.optim.1x") is None


@pytest.mark.parametrize("info", [info for info in OPTIMIZERS if info.extra], ids=lambda info: info.name)
def test_a_missing_package_is_told_before_anything_is_loaded(
    base: list[str], info: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = info.module.partition(".")[0]
    really = importlib.machinery.PathFinder.find_spec

    def without(name: str, path: Any = None, target: Any = None) -> Any:
        return None if name == top else really(name, path, target)

    monkeypatch.setattr(importlib.machinery.PathFinder, "find_spec", without)
    monkeypatch.setattr(modules, "_elsewhere", lambda name: None)
    (problem,) = _problems([*base, "--optimizer_type", info.name, "--learning_rate", "1"])
    assert problem == f"--optimizer_type: {top} isn't installed; pip install 'lorasmith[{info.extra}]'"
    assert f"not installed: pip install 'lorasmith[{info.extra}]'" in list_text()


def test_the_list_names_everything_once() -> None:
    lines = list_text().splitlines()
    names = [line.split()[0] for line in lines if line.startswith("  ")]
    for name in (*(info.name for info in OPTIMIZERS), *SCHEDULE_NAMES):
        assert names.count(name) == 1, name
    assert any(all(name in line for name in TORCH_NAMES) for line in lines)


def test_literals_and_words() -> None:
    read = parse_arguments(["betas=(0.9, 0.99)", "a= 1", "b=word", "c=None", "d='x=y'"], "--optimizer_args")
    assert read == {"betas": (0.9, 0.99), "a": 1, "b": "word", "c": None, "d": "x=y"}
    with pytest.raises(UserError, match="'a' has no ="):
        parse_arguments(["a"], "--optimizer_args")


def test_rules_are_taken_in_the_order_of_their_steps() -> None:
    assert step_rules("0.1:20, 1:10, 0.01") == (((10, 1.0), (20, 0.1)), 0.01)
    for wrong in ("", "1:10", "1:x,2", "1:2:3,4"):
        with pytest.raises(ValueError, match="must be factors"):
            step_rules(wrong)
