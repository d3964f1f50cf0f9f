"""16-bit weights that are rounded by chance: right on average, exact where nothing is to round, exact on resume."""

import math

import numpy as np
import pytest
import torch

from library.options.optimizer_names import OPTIMIZERS
from library.training.optimizers import BuiltOptimizer, build_optimizer
from library.training.rounding import DTYPES, RoundedParameters, round_by_chance
from tests.training.test_optimizers import Problem, rate_of, through_a_file

TYPES = tuple(DTYPES.values())
CPU = torch.device("cpu")
SEED = 7


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_value_of_the_type_stays(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for draw in (0.0, 0.5, 1 - 2**-24):
        rounded = round_by_chance(every.float(), dtype, torch.full((2**16,), draw))
        finite = every.isfinite()
        assert torch.equal(rounded[finite].view(torch.int16), every[finite].view(torch.int16))
        assert torch.equal(rounded[~finite].isnan(), every[~finite].isnan())
        assert torch.equal(rounded[every.isinf()], every[every.isinf()])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_share_of_the_way_decides(dtype: torch.dtype) -> None:
    """In float64, with neighbours 2^(exponent - mantissa bits) apart, or 2^-24 for the smallest of float16."""
    bits, least = (10, 2.0**-24) if dtype == torch.float16 else (7, 0.0)
    generator = np.random.default_rng(3)
    values = torch.from_numpy(
        (generator.standard_normal(4000) * 10.0 ** generator.uniform(-2, 3, 4000)).astype("float32")
    )
    exact = values.double().numpy()
    spacing = np.maximum(2.0 ** (np.floor(np.log2(np.abs(exact))) - bits), least)
    low = np.floor(np.abs(exact) / spacing) * spacing
    share = (np.abs(exact) - low) / spacing
    for draw in (0.0, 0.1, 0.5, 0.9):
        rounded = round_by_chance(values, dtype, torch.full((4000,), draw)).double().numpy()
        expected = np.sign(exact) * (low + spacing * (draw < share))
        assert np.array_equal(rounded, expected)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("value", [1.0001, -0.3333, 2.5e-5, -3e-8, 1234.567])
def test_the_mean_is_the_value(dtype: torch.dtype, value: float) -> None:
    count = 200_000
    draws = torch.from_numpy(np.random.default_rng(1).random(count, dtype="float32"))
    values = torch.full((count,), value)
    rounded = round_by_chance(values, dtype, draws).double()
    step = float(rounded.max() - rounded.min())
    assert step > 0
    assert abs(float(rounded.mean()) - float(values[0].double())) < 5 * step * 0.5 / math.sqrt(count)


def test_beyond_the_largest_value_the_nearest_counts() -> None:
    values = torch.tensor([65504.0, 65510.0, 65519.0, 70000.0, -70000.0, float("nan")])
    rounded = round_by_chance(values, torch.float16, torch.zeros(6))
    assert rounded[:3].tolist() == [65504.0] * 3
    assert rounded[3:5].tolist() == [math.inf, -math.inf] and rounded[5].isnan()


def _rounded(problem: Problem, name: str, dtype: torch.dtype) -> tuple[RoundedParameters, BuiltOptimizer]:
    groups = problem.groups(rate_of(name))
    rounded = RoundedParameters(problem.parameters, dtype, SEED, CPU)
    return rounded, build_optimizer(name, rounded.groups(groups), {}, device=CPU)


def _update(problem: Problem, rounded: RoundedParameters, built: BuiltOptimizer, number: int) -> None:
    problem.loss().backward()
    rounded.before_step()
    built.optimizer.step()
    rounded.after_step(number)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", [info.name for info in OPTIMIZERS])
def test_trains_and_goes_on_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    problem, again = Problem(name), Problem(name)
    rounded, built = _rounded(problem, name, dtype)
    for number in range(3):
        _update(problem, rounded, built, number)
    assert all(parameter.dtype == dtype for parameter in problem.parameters)
    assert all(parameter.isfinite().all() for parameter in problem.parameters)
    state = through_a_file({"built": built.state_dict(), "weights": [p.detach() for p in problem.parameters]})
    rounded_again, resumed = _rounded(again, name, dtype)
    for parameter, there in zip(again.parameters, state["weights"], strict=True):
        parameter.data.copy_(there)
    resumed.load_state_dict(state["built"])
    for number in range(3, 6):
        _update(problem, rounded, built, number)
        _update(again, rounded_again, resumed, number)
    assert all(torch.equal(one, two) for one, two in zip(again.parameters, problem.parameters, strict=True))


def test_updates_far_below_a_unit_in_the_last_place_add_up() -> None:
    """bfloat16 at 1.0 has steps of 2^-8 below it; 200 updates of 1e-4 are lost by rounding to the nearest."""
    parameter = torch.nn.Parameter(torch.ones(20_000))
    rounded = RoundedParameters([parameter], torch.bfloat16, SEED, CPU)
    optimizer = torch.optim.SGD(rounded.masters, lr=1e-4)
    for number in range(200):
        parameter.grad = torch.ones_like(parameter)
        rounded.before_step()
        optimizer.step()
        rounded.after_step(number)
    assert parameter.float().mean().item() == pytest.approx(0.98, abs=5e-4)


def test_draws_depend_on_the_seed_the_update_and_the_parameter_only() -> None:
    def after(seed: int, update: int, count: int) -> torch.Tensor:
        parameters = [torch.nn.Parameter(torch.ones(3000)) for _ in range(count)]
        rounded = RoundedParameters(parameters, torch.bfloat16, seed, CPU)
        rounded.before_step()
        for master in rounded.masters:
            master.data += 1e-3
        torch.manual_seed(update + count)
        rounded.after_step(update)
        return parameters[0].detach()

    assert torch.equal(after(1, 5, 1), after(1, 5, 2))
    assert not torch.equal(after(1, 5, 1), after(1, 6, 1))
    assert not torch.equal(after(1, 5, 1), after(2, 5, 1))


def test_parameters_of_one_update_are_rounded_by_different_draws() -> None:
    parameters = [torch.nn.Parameter(torch.ones(3000)) for _ in range(2)]
    rounded = RoundedParameters(parameters, torch.bfloat16, SEED, CPU)
    rounded.before_step()
    for master in rounded.masters:
        master.data += 1e-3
    rounded.after_step(0)
    assert not torch.equal(parameters[0], parameters[1])


def test_gradients_are_added_up_in_float32() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    rounded = RoundedParameters([parameter], torch.bfloat16, SEED, CPU)
    for value in (256.0, 1.0, 1.0):
        parameter.grad = torch.tensor([value], dtype=torch.bfloat16)
        rounded.accumulate()
        assert parameter.grad is None
    rounded.before_step()
    assert rounded.masters[0].grad is not None and rounded.masters[0].grad.item() == 258.0


def test_the_loss_scaler_works_on_the_masters_and_a_skipped_step_changes_nothing() -> None:
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, 64))
    rounded = RoundedParameters([parameter], torch.float16, SEED, CPU)
    optimizer = torch.optim.SGD(rounded.masters, lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = parameter.detach().clone()

    scaler.scale((parameter.float() * 0.25).sum()).backward()
    rounded.before_step()
    scaler.unscale_(optimizer)
    gradient = rounded.masters[0].grad
    assert gradient is not None and torch.equal(gradient, torch.full((64,), 0.25))
    scaler.step(optimizer)
    scaler.update()
    rounded.after_step(0)
    torch.testing.assert_close(parameter.float(), before.float() - 0.25, atol=1e-3, rtol=0)

    kept = parameter.detach().clone()
    scaler.scale((parameter.float() * float("inf")).sum()).backward()
    rounded.before_step()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    rounded.after_step(1)
    assert torch.equal(parameter, kept)
    assert scaler.get_scale() == 512.0


@pytest.mark.parametrize("name", [info.name for info in OPTIMIZERS if info.schedule_free])
def test_looking_at_schedule_free_weights_changes_no_bit(name: str) -> None:
    problem = Problem(name)
    rounded, built = _rounded(problem, name, torch.bfloat16)
    for number in range(10):
        _update(problem, rounded, built, number)
    kept = [parameter.detach().clone() for parameter in problem.parameters]
    with rounded.evaluating(built):
        shown = problem.parameters[0].detach().clone()
        assert not torch.equal(shown, kept[0])
        assert torch.equal(shown, rounded.masters[0].to(torch.bfloat16))
    assert all(torch.equal(one, two) for one, two in zip(kept, problem.parameters, strict=True))


@pytest.mark.parametrize("name", [info.name for info in OPTIMIZERS if info.schedule_free])
def test_frozen_weights_are_what_was_shown_from_then_on(name: str) -> None:
    problem = Problem(name)
    rounded, built = _rounded(problem, name, torch.bfloat16)
    for number in range(10):
        _update(problem, rounded, built, number)
    frozen, other = problem.parameters[:2]
    kept = other.detach().clone()
    with rounded.evaluating(built):
        shown = frozen.detach().clone()
    assert not torch.equal(frozen, shown)
    rounded.freeze(built, [frozen])
    frozen.requires_grad_(False)
    assert torch.equal(other, kept)
    for number in range(10, 13):
        _update(problem, rounded, built, number)
        assert torch.equal(frozen, shown)
        with rounded.evaluating(built):
            assert torch.equal(frozen, shown)
    assert not torch.equal(other, kept)


def test_a_type_of_32_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="no 16-bit type"):
        RoundedParameters([], torch.float32, SEED, CPU)
