"""Learning-rate factors against figures taken from the schedulers that sd-scripts uses, and against those classes."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from diffusers.optimization import get_piecewise_constant_schedule
from transformers.optimization import get_scheduler

from library.errors import UserError
from library.options.optimizer import Optimizer
from library.options.optimizer_names import SCHEDULE_NAMES
from library.training.schedules import SCHEDULES, Curve, learning_rate, schedule_settings, warmup_steps

VECTORS = json.loads((Path(__file__).parents[1] / "data/vectors/schedules.json").read_text())


def test_every_name_of_the_flag_has_a_function_or_a_control_of_its_own() -> None:
    assert set(SCHEDULES) == set(SCHEDULE_NAMES) - {"adafactor"}
    assert set(SCHEDULE_NAMES) == set(get_args(Optimizer.model_fields["lr_scheduler"].annotation))


@pytest.mark.parametrize("case", VECTORS, ids=lambda case: f"{case['lr_scheduler']}-{case.get('lr_warmup_steps', 0)}")
def test_factors_equal_the_figures(case: dict) -> None:
    flags = {name: value for name, value in case.items() if name in Optimizer.model_fields}
    settings = schedule_settings(Optimizer(**flags), case["total_steps"])
    for step, expected in case["lr_at"].items():
        ours = learning_rate(settings.name, case["base_lr"], settings.curve, int(step))
        assert ours == pytest.approx(expected, rel=1e-9, abs=1e-12), f"step {step}"


def _theirs(name: str, base: float, steps: int, warmup: int, total: int, **more: Any) -> list[float]:
    """The rates of a scheduler of transformers, before each of `steps` updates."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=base)
    scheduler = get_scheduler(name, optimizer, warmup, total, more)
    rates = []
    for _ in range(steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.filterwarnings("ignore:Both num_training_steps")
@pytest.mark.parametrize(
    ("flags", "theirs"),
    [
        ({"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 7}, {}),
        ({"lr_scheduler": "linear", "lr_warmup_steps": 0.1}, {}),
        ({"lr_scheduler": "cosine", "lr_warmup_steps": 13}, {}),
        ({"lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 4}, {"num_cycles": 4}),
        ({"lr_scheduler": "polynomial", "lr_scheduler_power": 1.7, "lr_scheduler_args": ("lr_end=1e-5",)},
         {"power": 1.7, "lr_end": 1e-5}),
        ({"lr_scheduler": "inverse_sqrt", "lr_warmup_steps": 5}, {}),
        ({"lr_scheduler": "inverse_sqrt"}, {}),
        ({"lr_scheduler": "inverse_sqrt", "lr_warmup_steps": 5, "lr_scheduler_timescale": 30}, {"timescale": 30}),
        ({"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_min_lr_ratio": 0.2, "lr_scheduler_num_cycles": 3},
         {"min_lr_rate": 0.2, "num_cycles": 1.5}),
        ({"lr_scheduler": "warmup_stable_decay", "lr_warmup_steps": 9, "lr_decay_steps": 0.25},
         {"num_decay_steps": 25, "num_stable_steps": 66}),
        ({"lr_scheduler": "warmup_stable_decay", "lr_decay_steps": 20, "lr_scheduler_min_lr_ratio": 0.3,
          "lr_scheduler_num_cycles": 2}, {"num_decay_steps": 20, "num_stable_steps": 80, "min_lr_ratio": 0.3,
                                          "num_cycles": 1.0}),
    ],
    ids=lambda flags: flags.get("lr_scheduler") if isinstance(flags, dict) else None,
)  # fmt: skip
def test_rates_equal_those_of_transformers_at_every_step(flags: dict[str, Any], theirs: dict[str, Any]) -> None:
    total, base = 100, 3e-4
    settings = schedule_settings(Optimizer(**flags), total)
    name = flags["lr_scheduler"]
    expected = _theirs(name, base, total, warmup_steps(flags.get("lr_warmup_steps", 0), total), total, **theirs)
    ours = [learning_rate(name, base, settings.curve, step) for step in range(total)]
    assert ours == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_stepwise_rates_equal_those_of_diffusers() -> None:
    rules = "1:10,0.1:20,0.01:30,0.005"
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    scheduler = get_piecewise_constant_schedule(optimizer, rules)
    flags = Optimizer(lr_scheduler="piecewise_constant", lr_scheduler_args=(f"step_rules={rules}",))
    curve = schedule_settings(flags, 40).curve
    for step in range(40):
        assert learning_rate("piecewise_constant", 0.5, curve, step) == optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()


def test_a_single_rule_counts_all_the_time() -> None:
    flags = Optimizer(lr_scheduler="piecewise_constant", lr_scheduler_args=("step_rules=0.5",))
    assert learning_rate("piecewise_constant", 2.0, schedule_settings(flags, 10).curve, 3) == 1.0


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_group_of_rate_0_stays_at_0(name: str) -> None:
    curve = Curve(10, 2, end_lr=0.5, least=0.5, decay=3)
    assert [learning_rate(name, 0.0, curve, step) for step in range(12)] == [0.0] * 12


def test_a_curve_that_is_kept_stays_at_its_end() -> None:
    assert learning_rate("cosine", 1.0, Curve(10), 15) == 0.0
    assert learning_rate("polynomial", 1.0, Curve(10), 15) == pytest.approx(1e-7)
    assert learning_rate("warmup_stable_decay", 1.0, Curve(10, decay=4, least=0.25), 15) == 0.25
    assert learning_rate("cosine_with_min_lr", 1.0, Curve(10, least=0.25), 15) == 0.25


def test_warmup_and_decay_that_do_not_fit() -> None:
    flags = Optimizer(lr_scheduler="warmup_stable_decay", lr_warmup_steps=6, lr_decay_steps=0.5)
    with pytest.raises(UserError, match="6 steps of warmup and 5 of decay are more than all 10 steps"):
        schedule_settings(flags, 10)
    assert schedule_settings(flags, 12).curve.decay == 6


def test_a_class_gets_its_settings_and_no_curve_of_another() -> None:
    flags = Optimizer(lr_scheduler_type="StepLR", lr_scheduler_args=("step_size=3", "gamma=0.5"))
    settings = schedule_settings(flags, 10)
    assert (settings.scheduler_type, settings.scheduler_args) == ("StepLR", {"step_size": 3, "gamma": 0.5})
