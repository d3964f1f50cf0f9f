"""What sets the rates before each update: curves, Adafactor itself, scheduler classes."""

from typing import Any

import pytest
import torch

from library.errors import UserError
from library.options.optimizer import Optimizer
from library.options.optimizer_names import OPTIMIZERS, SCHEDULE_NAMES, TORCH_SCHEDULES
from library.training.optimizers import BuiltOptimizer, build_optimizer
from library.training.rate_control import RateControl, build_rates
from library.training.schedules import learning_rate, schedule_settings
from tests.training.test_optimizers import Problem, rate_of, through_a_file

TOTAL = 12
NAMED: dict[str, dict[str, Any]] = {
    "constant": {},
    "cosine_with_min_lr": {"lr_warmup_steps": 2, "lr_scheduler_min_lr_ratio": 0.1},
    "warmup_stable_decay": {"lr_warmup_steps": 2, "lr_decay_steps": 4},
    "piecewise_constant": {"lr_scheduler_args": ("step_rules=1:3,0.5:6,0.1",)},
    **{
        name: {"lr_warmup_steps": 3}
        for name in (
            *("constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt"),
        )
    },
}
CLASSES = {
    "ConstantLR": ("factor=0.5", "total_iters=3"),
    "CosineAnnealingLR": ("T_max=10",),
    "CosineAnnealingWarmRestarts": ("T_0=4",),
    "CyclicLR": ("base_lr=0.001", "max_lr=0.01", "step_size_up=3"),
    "ExponentialLR": ("gamma=0.9",),
    "LinearLR": ("total_iters=6",),
    "MultiStepLR": ("milestones=[2,5]",),
    "OneCycleLR": ("max_lr=0.01", "total_steps=20"),
    "PolynomialLR": ("total_iters=9",),
    "StepLR": ("step_size=2", "gamma=0.5"),
}


def _built(problem: Problem, name: str = "AdamW", **arguments: Any) -> BuiltOptimizer:
    return build_optimizer(name, problem.groups(0.01, 0.002), arguments)


def _updates(problem: Problem, built: BuiltOptimizer, rates: RateControl, start: int, end: int) -> list[list[float]]:
    used = []
    for update in range(start, end):
        rates.before_update(update)
        used.append([group["lr"] for group in built.optimizer.param_groups])
        problem.step(built)
        rates.after_update()
        assert rates.rates() == used[-1]
    return used


def _resumes_exactly(flags: Optimizer) -> list[list[float]]:
    """Nine updates in one go and in two parts give the same bits; returns the rates of the nine."""
    settings = schedule_settings(flags, TOTAL)
    problem, again = Problem("x"), Problem("x")
    built, resumed = _built(problem), _built(again)
    rates = build_rates(built, settings)
    used = _updates(problem, built, rates, 0, 5)
    state = through_a_file({"optimizer": built.state_dict(), "rates": rates.state_dict()})
    for parameter, there in zip(again.parameters, problem.parameters, strict=True):
        parameter.data.copy_(there.detach())
    used += _updates(problem, built, rates, 5, 9)

    rates_again = build_rates(resumed, settings)
    resumed.load_state_dict(state["optimizer"])
    rates_again.load_state_dict(state["rates"])
    assert _updates(again, resumed, rates_again, 5, 9) == used[5:]
    assert all(torch.equal(one, two) for one, two in zip(again.parameters, problem.parameters, strict=True))
    return used


def test_every_schedule_is_tried() -> None:
    assert set(NAMED) == set(SCHEDULE_NAMES) - {"adafactor"}
    assert set(TORCH_SCHEDULES) == set(CLASSES)


@pytest.mark.parametrize("name", NAMED)
def test_named_schedules_train_and_go_on_bit_for_bit(name: str) -> None:
    flags = Optimizer.model_validate({"lr_scheduler": name, **NAMED[name]})
    used = _resumes_exactly(flags)
    curve = schedule_settings(flags, TOTAL).curve
    assert used == [[learning_rate(name, base, curve, step) for base in (0.01, 0.002)] for step in range(9)]


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize("name", TORCH_SCHEDULES)
def test_scheduler_classes_train_and_go_on_bit_for_bit(name: str) -> None:
    used = _resumes_exactly(Optimizer(lr_scheduler_type=name, lr_scheduler_args=CLASSES[name]))
    assert len({rates[0] for rates in used}) > 1


def test_a_class_goes_as_torch_does() -> None:
    used = _resumes_exactly(
        Optimizer(lr_scheduler_type="torch.optim.lr_scheduler.StepLR", lr_scheduler_args=CLASSES["StepLR"])
    )
    assert [rates[1] for rates in used] == [0.002 * 0.5 ** (step // 2) for step in range(9)]


def test_a_changed_rate_counts_after_a_resume_with_a_curve_and_is_refused_with_a_class() -> None:
    for flags in (
        Optimizer(lr_scheduler="linear"),
        Optimizer(lr_scheduler_type="StepLR", lr_scheduler_args=("step_size=2",)),
    ):
        settings = schedule_settings(flags, TOTAL)
        problem = Problem("x")
        built = _built(problem)
        rates = build_rates(built, settings)
        _updates(problem, built, rates, 0, 3)
        other = build_optimizer("AdamW", problem.groups(0.1), {})
        changed = build_rates(other, settings)
        other.load_state_dict(built.state_dict())
        if flags.lr_scheduler_type:
            with pytest.raises(UserError, match="learning rates were"):
                changed.load_state_dict(rates.state_dict())
        else:
            changed.load_state_dict(rates.state_dict())
            changed.before_update(3)
            assert other.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 9 / 12)


def test_schedule_free_ones_keep_the_rate_that_the_run_has_now() -> None:
    problem = Problem("x")
    built = _built(problem, "AdamWScheduleFree")
    rates = build_rates(built, schedule_settings(Optimizer(lr_scheduler="cosine", lr_warmup_steps=5), TOTAL))
    assert _updates(problem, built, rates, 0, 8) == [[0.01, 0.002]] * 8
    other = build_optimizer("AdamWScheduleFree", problem.groups(0.5), {})
    control = build_rates(other, schedule_settings(Optimizer(), TOTAL))
    other.load_state_dict(built.state_dict())
    control.before_update(8)
    assert [group["lr"] for group in other.optimizer.param_groups] == [0.5, 0.5]


@pytest.mark.parametrize("warmup", [False, True])
def test_adafactor_shows_the_rates_that_it_finds(warmup: bool) -> None:
    problem = Problem("x")
    built = _built(problem, "Adafactor", **({"warmup_init": True} if warmup else {}))
    rates = build_rates(built, schedule_settings(Optimizer(lr_scheduler="cosine"), TOTAL))
    assert rates.rates() == [0.0, 0.0]
    for step in range(1, 4):
        sizes = [problem.parameters[number].detach().double().square().mean().sqrt().item() for number in (0, 2)]
        rates.before_update(step - 1)
        problem.step(built)
        rates.after_update()
        relative = min(1e-6 * step if warmup else 1e-2, step**-0.5)
        assert rates.rates() == pytest.approx([max(1e-3, size) * relative for size in sizes], rel=1e-5)
    assert rates.state_dict() == {}


def test_adafactor_with_a_rate_follows_a_schedule() -> None:
    problem = Problem("x")
    built = _built(problem, "Adafactor", relative_step=False)
    flags = Optimizer(lr_scheduler="constant_with_warmup", lr_warmup_steps=4)
    rates = build_rates(built, schedule_settings(flags, TOTAL))
    assert _updates(problem, built, rates, 0, 5) == [[0.01 * part, 0.002 * part] for part in (0, 0.25, 0.5, 0.75, 1)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [info.name for info in OPTIMIZERS])
def test_rates_of_0_before_and_after_the_curve_leave_finite_weights(name: str) -> None:
    problem = Problem(name)
    built = build_optimizer(name, problem.groups(rate_of(name)), {})
    flags = Optimizer(lr_scheduler="linear", lr_warmup_steps=3 if built.info.steps_at_0 else 0)
    rates = build_rates(built, schedule_settings(flags, 6))
    for update in range(8 if built.info.steps_at_0 else 6):
        rates.before_update(update)
        problem.step(built)
        rates.after_update()
    assert all(parameter.isfinite().all() for parameter in problem.parameters)
    if built.info.steps_at_0 and not (built.info.schedule_free or built.finds_its_rate):
        assert rates.rates() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lr_scheduler": "adafactor"}, "AdamW can't be used with adafactor"),
        ({"lr_scheduler_type": "NoSuchLR"}, "torch.optim.lr_scheduler has no NoSuchLR"),
        ({"lr_scheduler_type": "no_such.LR"}, "no_such can't be imported"),
        ({"lr_scheduler_type": "torch.nn.Linear"}, "is no scheduler: it has no step"),
        (
            {"lr_scheduler_type": "StepLR", "lr_scheduler_args": ("stepsize=2",)},
            "takes no 'stepsize'; did you mean step_size?",
        ),
        ({"lr_scheduler_type": "StepLR"}, "StepLR needs step_size; add --lr_scheduler_args step_size=..."),
        (
            {"lr_scheduler_type": "OneCycleLR", "lr_scheduler_args": ("max_lr=0.01", "total_steps=-1")},
            "--lr_scheduler_args: OneCycleLR refuses them: ",
        ),
    ],
)
def test_schedules_that_can_not_be_made(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        build_rates(_built(Problem("x")), schedule_settings(Optimizer(**flags), TOTAL))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "arguments", "step", "why"),
    [
        ("CosineAnnealingLR", ("T_max=abc",), 1, "TypeError"),
        ("StepLR", ("step_size=0",), 1, "ZeroDivisionError"),
        ("OneCycleLR", ("max_lr=0.01", "total_steps=2"), 3, "ValueError Tried to step 3 times"),
    ],
)
def test_a_step_that_a_schedule_can_not_make_is_told(
    name: str, arguments: tuple[str, ...], step: int, why: str
) -> None:
    flags = Optimizer(lr_scheduler_type=name, lr_scheduler_args=arguments)
    problem = Problem("x")
    built = _built(problem)
    rates = build_rates(built, schedule_settings(flags, TOTAL))
    _updates(problem, built, rates, 0, step - 1)
    with pytest.raises(UserError) as caught:
        _updates(problem, built, rates, step - 1, step)
    assert f"--lr_scheduler_args: {name} fails with them after step {step}: {why}" in str(caught.value)


class AnySettings(torch.optim.lr_scheduler.LRScheduler):
    """Halves the rate after so many steps; its first parameter has another name, its settings have none."""

    def __init__(self, which: torch.optim.Optimizer, **settings: int) -> None:
        self.after = settings["after"]
        super().__init__(which)

    def get_lr(self) -> list[float | torch.Tensor]:
        return [base * (0.5 if self.last_epoch >= self.after else 1) for base in self.base_lrs]


def test_a_class_that_takes_any_setting_gets_it() -> None:
    flags = Optimizer(lr_scheduler_type=f"{__name__}.AnySettings", lr_scheduler_args=("after=2",))
    problem = Problem("x")
    built = _built(problem)
    used = _updates(problem, built, build_rates(built, schedule_settings(flags, TOTAL)), 0, 4)
    assert [rates[0] for rates in used] == [0.01, 0.01, 0.005, 0.005]
