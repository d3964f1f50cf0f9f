"""Every optimizer and every kind of schedule goes through a state folder, and goes on with the very same bits."""

from pathlib import Path
from typing import Any

import pytest
import torch

from library.options.optimizer_names import known_names, optimizer_info, relative_step
from library.training.optimizers import BuiltOptimizer, build_optimizer
from library.training.rate_control import ClassRates
from library.training.state import RunState, load_tensors, write_state

STATE = RunState(2, 1, 2.0, 3, 4, 4, (), {}, {})
CPU = torch.device("cpu")


def parameters() -> list[torch.nn.Parameter]:
    """One that 8-bit optimizers keep in 8 bits (4096 numbers and more), one that they don't."""
    made = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=made)) for shape in ((64, 80), (80, 4))]


def step(built: BuiltOptimizer, number: int) -> None:
    made = torch.Generator().manual_seed(number)
    for parameter in built.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=made)
    built.optimizer.step()


def build(name: str, trained: list[torch.nn.Parameter]) -> BuiltOptimizer:
    info = optimizer_info(name)
    assert info is not None
    if info.needs == "cuda":
        pytest.skip(f"{name} needs CUDA")
    rate = {} if relative_step(info, info.defaults) else {"lr": 0.01}
    groups = [{"params": trained, **rate}] if info.one_rate else [{"params": [one], **rate} for one in trained]
    return build_optimizer(name, groups, {}, device=CPU)


@pytest.mark.parametrize("name", known_names())
def test_the_next_steps_are_the_same_bits(name: str, tmp_path: Path) -> None:
    first = parameters()
    built = build(name, first)
    for number in range(2):
        step(built, number)
    kept = {str(place): one.detach() for place, one in enumerate(first)}
    write_state(tmp_path / "x-state", STATE, kept, {"optimizer": built.state_dict()})
    second = parameters()
    again = build(name, second)
    tensors, other = load_tensors(tmp_path / "x-state")
    with torch.no_grad():
        for place, one in enumerate(second):
            one.copy_(tensors[str(place)])
    again.load_state_dict(other["optimizer"])
    before = [one.detach().clone() for one in second]
    for number in range(2, 5):
        step(built, number)
        step(again, number)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert not all(torch.equal(one, old) for one, old in zip(second, before, strict=True))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("StepLR", {"step_size": 2, "gamma": 0.3}),
        ("MultiStepLR", {"milestones": (2, 3), "gamma": 0.3}),
        ("CosineAnnealingWarmRestarts", {"T_0": 3}),
        ("OneCycleLR", {"max_lr": 0.2, "total_steps": 9}),
        ("CyclicLR", {"base_lr": 0.01, "max_lr": 0.2, "step_size_up": 3, "cycle_momentum": False}),
    ],
)
def test_classes_of_schedules_too(name: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    def made() -> tuple[BuiltOptimizer, ClassRates]:
        built = build("AdamW", parameters())
        return built, ClassRates(built.optimizer, f"torch.optim.lr_scheduler.{name}", arguments)

    def go(built: BuiltOptimizer, rates: ClassRates, updates: range) -> list[list[float]]:
        seen = []
        for number in updates:
            rates.before_update(number)
            step(built, number)
            seen.append(rates.rates())
            rates.after_update()
        return seen

    built, rates = made()
    go(built, rates, range(2))
    both = {"optimizer": built.state_dict(), "rates": rates.state_dict()}
    write_state(tmp_path / "x-state", STATE, {"a": torch.ones(1)}, both)
    expected = go(built, rates, range(2, 7))
    built, rates = made()
    _, other = load_tensors(tmp_path / "x-state")
    built.load_state_dict(other["optimizer"])
    rates.load_state_dict(other["rates"])
    assert go(built, rates, range(2, 7)) == expected
    assert len({values[0] for values in expected}) > 1
