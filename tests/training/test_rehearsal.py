"""What optimizers and schedules refuse is told before a model is loaded, by a dry run as by the run."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from library.models.inspect import inspect
from library.options import parse
from library.training import session
from library.training.expected import expected_groups
from library.training.learning_rates import learning_rates
from library.training.optimizers import build_optimizer
from tests.networks.tiny_families import Finder, load_text_encoder, load_unet
from tests.pictures import make_pictures
from train_network import main

UNET_ONLY = "--network_train_unet_only"
STEPS = 4


def line(model: Path, place: Path, *more: str) -> list[str]:
    """A command line for a run of a few steps."""
    if not (place / "pictures").is_dir():
        make_pictures(place / "pictures", count=1)
    return [
        *("--pretrained_model_name_or_path", str(model), "--train_data_dir", str(place / "pictures"), "--seed", "1"),
        *("--output_dir", str(place / "output"), "--network_dim", "2", "--resolution", "64"),
        *("--caption_extension", ".txt", "--max_train_steps", str(STEPS), *more),
        *(() if "--network_module" in more else ("--network_module", "networks.lora")),
    ]


REFUSED: list[tuple[str, str]] = [
    ("--optimizer_type torch.optim.Nope", "--optimizer_type: torch.optim has no Nope"),
    ("--optimizer_type torch.nn.Linear", "--optimizer_type: torch.nn.Linear is no torch.optim.Optimizer"),
    ("--optimizer_type torch.optim.AdamW --optimizer_args foo=1", "--optimizer_args: torch.optim.AdamW takes no 'foo'"),
    ("--optimizer_type Adam --optimizer_args weightdecay=0.1", "did you mean weight_decay?"),
    ("--optimizer_type Adam --optimizer_args betas=3", "--optimizer_args: Adam can't train this"),
    ("--optimizer_type SGD --optimizer_args nesterov=True", "--optimizer_args: SGD can't train this"),
    ("--optimizer_type Muon", "Muon only supports 2D"),
    ("--lr_scheduler_type StepLR", "--lr_scheduler_args: StepLR needs step_size; add --lr_scheduler_args step_size="),
    ("--lr_scheduler_type StepLR --lr_scheduler_args stepsize=3", "did you mean step_size?"),
    ("--lr_scheduler_type StepLR --lr_scheduler_args step_size=0", "StepLR fails with them after step 1: ZeroDivision"),
    ("--lr_scheduler_type CosineAnnealingLR", "CosineAnnealingLR needs T_max"),
    (
        "--lr_scheduler_type CosineAnnealingLR --lr_scheduler_args T_max=abc",
        "--lr_scheduler_args: CosineAnnealingLR fails with them after step 1: TypeError",
    ),
    ("--lr_scheduler_type MultiStepLR --lr_scheduler_args milestones=1,2 gamm=0.1", "did you mean gamma?"),
    ("--lr_scheduler_type CyclicLR --lr_scheduler_args base_lr=1e-4", "CyclicLR needs max_lr"),
    (
        "--lr_scheduler_type OneCycleLR --lr_scheduler_args max_lr=1e-3 total_steps=2",
        "--lr_scheduler_args: OneCycleLR fails with them after step 3: ValueError Tried to step 3 times",
    ),
    (
        "--lr_scheduler warmup_stable_decay --lr_warmup_steps 2 --lr_decay_steps 5",
        "--lr_decay_steps: 2 steps of warmup and 5 of decay are more than all 4 steps",
    ),
    (f"{UNET_ONLY} --network_args block_dims={','.join('0' * 25)}", "--network_args: nothing is left to train"),
    (
        f"{UNET_ONLY} --network_args down_lr_weight=zeros mid_lr_weight=0 up_lr_weight=zeros block_dims=0,"
        + ",".join("1" * 23)
        + ",0",
        "--network_args: nothing is left to train, because the ranks or the weights of all its blocks are 0",
    ),
    ("--network_module networks.oft --unet_lr 0", "--learning_rate: there is nothing to train"),
]


@pytest.mark.parametrize("dry", [True, False], ids=["dry run", "run"])
@pytest.mark.parametrize(("flags", "said"), REFUSED, ids=lambda value: value[:60])
def test_told_before_the_model_is_loaded(
    flags: str,
    said: str,
    dry: bool,
    tiny_sd1: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(session, "load_model", load)
    assert main(line(tiny_sd1, tmp_path, *flags.split(), *(["--dry_run"] if dry else []))) == 2
    errors = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error: ")]
    assert len(errors) == 1 and said in errors[0], errors


@pytest.mark.parametrize(
    "flags",
    [
        "--optimizer_type Adam --optimizer_args betas=0.8,0.9",
        f"--optimizer_type Muon {UNET_ONLY} --network_module lycoris.kohya",
        "--lr_scheduler_type CosineAnnealingLR --lr_scheduler_args T_max=4",
        f"--lr_scheduler_type OneCycleLR --lr_scheduler_args max_lr=1e-3 total_steps={STEPS}",
        f"--lr_scheduler_type OneCycleLR --lr_scheduler_args max_lr=[1e-3,1e-4] total_steps={STEPS}",
        "--lr_scheduler_type CyclicLR --lr_scheduler_args base_lr=(0.1,) max_lr=(0.2,) --network_module lycoris.kohya",
    ],
)
def test_what_can_be_trained_passes(flags: str, tiny_sd1: Path, tmp_path: Path) -> None:
    assert main(line(tiny_sd1, tmp_path, *flags.split(), "--dry_run")) == 0


def test_a_schedule_that_has_just_enough_steps_trains(tiny_sd1: Path, tmp_path: Path) -> None:
    flags = ("--lr_scheduler_type", "OneCycleLR", "--lr_scheduler_args", "max_lr=1e-3", f"total_steps={STEPS}")
    assert main(line(tiny_sd1, tmp_path, *flags)) == 0


ZEROS = f"block_dims={','.join('0' * 25)}"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (ZEROS, "--network_args: the U-Net isn't trained, because the ranks or the weights of all its blocks are 0"),
        ("block_dims=0,1" + ",0" * 23, ""),
    ],
)
def test_a_part_that_is_left_out_is_told(
    given: str, said: str, tiny_sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line(tiny_sd1, tmp_path, "--network_args", given, "--dry_run")) == 0
    heard = capsys.readouterr().err
    assert said in heard and ("isn't trained" in heard) == bool(said)


BY_BLOCK = (
    "networks.lora",
    ("down_lr_weight=linear", "mid_lr_weight=0.5", "up_lr_weight=zeros", "loraplus_lr_ratio=2"),
)
SETTINGS: list[tuple[str, tuple[str, ...]]] = [
    BY_BLOCK,
    ("networks.lora", ()),
    ("networks.lora", ("conv_dim=2", "loraplus_lr_ratio=4")),
    ("networks.lora", ("conv_dim=2", "dora=true", "loraplus_unet_lr_ratio=4")),
    ("networks.lora_fa", ("conv_dim=2",)),
    ("networks.dylora", ("unit=2",)),
    ("networks.oft", ("enable_conv=true",)),
]


@pytest.mark.parametrize(
    ("family", "module", "given"),
    [*(("sd1", *one) for one in SETTINGS), ("sdxl", *BY_BLOCK), ("sd2", *BY_BLOCK)],
    ids=str,
)
def test_groups_are_those_of_the_network(
    family: str, module: str, given: tuple[str, ...], tiny_models: Finder, tmp_path: Path
) -> None:
    folder = tiny_models(family)
    args = ["--network_args", *given] if given else []
    flags = ("--network_module", module, "--unet_lr", "3e-4", "--learning_rate", "1e-4", *args)
    options = parse(line(folder, tmp_path, *flags))
    model = inspect(str(folder))
    rates = learning_rates(options, len(model.text_encoder_configs))
    unet, text_encoder = load_unet(folder), load_text_encoder(folder)
    network = importlib.import_module(module).create_network(
        1.0, 2, None, None, text_encoder, unet, **options.network_arguments()
    )
    network.apply_to(text_encoder, unet, any(rates.text_encoders), True)
    groups, names = network.prepare_optimizer_params_with_multiple_te_lrs(list(rates.text_encoders), rates.unet, 1.0)
    found = expected_groups(options, model, rates)
    assert found is not None
    assert [(group.name, group.rate) for group in found] == [
        (name, group["lr"]) for name, group in zip(names, groups, strict=True)
    ]
    for mine, theirs in zip(found, groups, strict=True):
        assert sorted(mine.shapes) == sorted(tuple(one.shape) for one in theirs["params"])


@pytest.mark.parametrize("setting", ["conv_dim=4", "block_dims=" + ",".join("1" * 25)])
def test_ranks_beside_those_of_a_file_are_refused(
    setting: str,
    tiny_sd1: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(line(tiny_sd1, tmp_path, "--output_name", "x")) == 0
    weights = ("--network_weights", str(tmp_path / "output/x.safetensors"), "--dim_from_weights")
    again = [one for one in line(tiny_sd1, tmp_path, *weights) if one not in ("--network_dim", "2")]
    capsys.readouterr()
    assert main([*again, "--dry_run"]) == 0
    assert main([*again, "--network_args", setting, "--dry_run"]) == 2
    name = setting.partition("=")[0]
    assert f"--network_args {name}: can't be combined with --dim_from_weights" in capsys.readouterr().err


def test_the_step_of_a_stand_in_is_made_where_the_run_will_train(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from library.training import rehearsal
    from library.training.prepare import prepare

    seen: list[torch.device] = []

    def spy(name: str, groups: Any, arguments: Any, **more: Any) -> Any:
        seen.extend(one.device for group in groups for one in group["params"])
        return build_optimizer(name, groups, arguments, **more)

    monkeypatch.setattr(rehearsal, "build_optimizer", spy)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    rehearsal.rehearse(prepare(parse(line(tiny_sd1, tmp_path))))
    assert seen and {one.type for one in seen} == {"cpu"}


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--optimizer_type", "--optimizer_type: RuntimeError no such device; check its settings"),
        ("--lr_scheduler_type", "--lr_scheduler_type: RuntimeError no such device; check its settings"),
    ],
)
def test_a_package_that_breaks_when_it_is_imported_is_told(
    flag: str,
    said: str,
    tiny_sd1: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "breaks_at_import.py").write_text("raise RuntimeError('no such device')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(line(tiny_sd1, tmp_path, flag, "breaks_at_import.Class", "--dry_run")) == 2
    assert said in capsys.readouterr().err


def test_a_long_run_is_followed_to_its_end(tiny_sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--lr_scheduler_type", "OneCycleLR", "--lr_scheduler_args", "max_lr=1e-3", "total_steps=20000")
    assert main(line(tiny_sd1, tmp_path, *flags, "--dry_run", "--max_train_steps", "20001")) == 2
    assert "fails with them after step 20001: ValueError Tried to step 20001 times" in capsys.readouterr().err
