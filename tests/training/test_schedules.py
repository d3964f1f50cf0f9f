"""Learning-rate factors against figures taken from the schedulers that sd-scripts uses."""

import json
from pathlib import Path

import pytest

from library.training.schedules import SCHEDULES, Curve, learning_rate, warmup_steps

VECTORS = json.loads((Path(__file__).parents[1] / "data/vectors/schedules.json").read_text())
OURS = [case for case in VECTORS if case["lr_scheduler"] in SCHEDULES]


def test_every_schedule_has_figures() -> None:
    assert {case["lr_scheduler"] for case in OURS} == set(SCHEDULES)


@pytest.mark.parametrize("case", OURS, ids=lambda case: f"{case['lr_scheduler']}-{case.get('lr_warmup_steps', 0)}")
def test_factors_equal_the_figures(case: dict) -> None:
    total = case["total_steps"]
    curve = Curve(
        total,
        warmup_steps(case.get("lr_warmup_steps", 0), total),
        case.get("lr_scheduler_num_cycles", 1),
        case.get("lr_scheduler_power", 1.0),
    )
    for step, expected in case["lr_at"].items():
        ours = learning_rate(case["lr_scheduler"], case["base_lr"], curve, int(step))
        assert ours == pytest.approx(expected, rel=1e-9, abs=1e-12), f"step {step}"


def test_a_curve_that_is_kept_stays_at_its_end() -> None:
    assert learning_rate("cosine", 1.0, Curve(10), 15) == 0.0
    assert learning_rate("polynomial", 1.0, Curve(10), 15) == pytest.approx(1e-7)
