"""Each criterion keeps exactly as many singular values as it needs, or one more where that is asked for."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as some

from library.weights.loras.ranks import DYNAMIC, Criterion, Method, chosen, fitted, needed, retained

VALUES = torch.tensor([4, 2, 1, 0.5, 0.25], dtype=torch.float64)
SPECTRA = some.lists(some.floats(1e-3, 1e3), min_size=1, max_size=12).map(
    lambda values: torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
)
few = settings(max_examples=80, deadline=None)


@pytest.mark.parametrize(("method", "parameter"), [("sv_ratio", 4), ("sv_cumulative", 0.75), ("sv_fro", 0.9)])
def test_one_less_than_sd_scripts_keeps(method: Method, parameter: float) -> None:
    """For these values sd-scripts keeps three by each method, and two are enough: 4 > 4/4, 6 of 7.75, 20 of 21.3."""
    assert needed(VALUES, Criterion(method, parameter)) == 2
    assert needed(VALUES, Criterion(method, parameter, legacy=True)) == 3


@pytest.mark.parametrize(
    ("method", "parameter", "rank"),
    [
        ("sv_ratio", 1, 1),
        ("sv_ratio", 2, 1),
        ("sv_ratio", 2.1, 2),
        ("sv_ratio", 16.1, 5),
        ("sv_cumulative", 4 / 7.75, 1),
        ("sv_cumulative", 0.52, 2),
        ("sv_cumulative", 1, 5),
        ("sv_fro", 0.8, 1),
        ("sv_fro", 1, 5),
    ],
)
def test_edges_of_the_criteria(method: Method, parameter: float, rank: int) -> None:
    assert needed(VALUES, Criterion(method, parameter)) == rank


@few
@given(SPECTRA, some.floats(0.01, 1))
def test_fro_is_the_smallest_rank_that_keeps_its_share(values: torch.Tensor, share: float) -> None:
    rank = needed(values, Criterion("sv_fro", share))
    assert retained(values, rank) >= share * (1 - 1e-9)
    assert rank == 1 or retained(values, rank - 1) < share * (1 + 1e-9)


@few
@given(SPECTRA, some.floats(0.01, 1))
def test_cumulative_is_the_smallest_rank_that_keeps_its_share(values: torch.Tensor, share: float) -> None:
    rank = needed(values, Criterion("sv_cumulative", share))
    whole = float(values.sum())
    assert float(values[:rank].sum()) >= share * whole * (1 - 1e-9)
    assert rank == 1 or float(values[: rank - 1].sum()) < share * whole * (1 + 1e-9)


@few
@given(SPECTRA, some.floats(1, 1e4))
def test_ratio_keeps_what_is_above_its_bound(values: torch.Tensor, ratio: float) -> None:
    rank, bound = needed(values, Criterion("sv_ratio", ratio)), float(values[0]) / ratio
    assert bool((values[1:rank] > bound).all())
    assert bool((values[rank:] <= bound).all())


@few
@given(SPECTRA, some.sampled_from(DYNAMIC), some.floats(0.01, 1), some.floats(1e-3, 1e3), some.booleans())
def test_scale_changes_no_rank(values: torch.Tensor, method: Method, share: float, scale: float, legacy: bool) -> None:
    """Alpha multiplies all values alike."""
    criterion = Criterion(method, 1 / share if method == "sv_ratio" else share, legacy)
    bound = float(values[0]) * share
    assume(not any(abs(float(value) - bound) < 1e-9 * bound for value in values))
    assume(float(values[0]) * min(scale, 1) > 1e-5)
    assert needed(values * 2.0**8, criterion) == needed(values, criterion)


@few
@given(SPECTRA, some.sampled_from(DYNAMIC), some.floats(0.01, 1))
def test_legacy_keeps_one_more_where_there_is_one(values: torch.Tensor, method: Method, share: float) -> None:
    parameter = 1 / share if method == "sv_ratio" else share
    exact = needed(values, Criterion(method, parameter))
    assert needed(values, Criterion(method, parameter, legacy=True)) == min(exact + 1, len(values))


def test_limits_cap_and_one_is_the_least() -> None:
    assert [chosen(VALUES, Criterion(), limit) for limit in (1, 3, 9, None)] == [1, 3, 5, 5]
    assert chosen(VALUES, Criterion("sv_fro", 1.0), 2) == 2
    zero = torch.zeros(4, dtype=torch.float64)
    assert [needed(zero, Criterion(method, 1.0)) for method in DYNAMIC] == [1, 1, 1]
    assert retained(zero, 1) == 1.0


def test_tiny_changes_have_rank_one_in_sd_scripts_alone() -> None:
    """A change may be small and still have a rank."""
    tiny = VALUES * 1e-8
    assert needed(tiny, Criterion("sv_fro", 1.0)) == 5
    assert needed(tiny, Criterion("sv_fro", 1.0, legacy=True)) == 1


@pytest.mark.parametrize(
    ("method", "parameter"),
    [("sv_ratio", 0.5), ("sv_ratio", float("nan")), ("sv_ratio", float("inf")), ("sv_fro", 0), ("sv_cumulative", 1.5)],
)
def test_parameters_outside_their_range_are_problems(method: Method, parameter: float) -> None:
    assert Criterion(method, parameter).problem("--dynamic_param") is not None


@pytest.mark.parametrize(("method", "parameter"), [("sv_ratio", 1), ("sv_fro", 1), ("sv_cumulative", 0.1)])
def test_parameters_inside_their_range_are_none(method: Method, parameter: float) -> None:
    assert Criterion(method, parameter).problem("--dynamic_param") is None


@few
@given(some.lists(SPECTRA, min_size=1, max_size=6), some.sampled_from(DYNAMIC), some.integers(0, 80))
def test_a_fitted_criterion_is_the_greatest_that_stays_below_the_limit(
    spectra: list[torch.Tensor], method: Method, limit: int
) -> None:
    """Its size is at most the limit; a little more of its parameter is above, if it isn't all already."""

    def size(criterion: Criterion) -> int:
        return sum(needed(values, criterion) for values in spectra)

    spread = 2 * max(float(values[0] / values[-1]) for values in spectra)
    found = fitted(size, Criterion(method), limit, spread)
    if found is None:
        assert size(Criterion(method, 1.0 if method == "sv_ratio" else 1e-6)) > limit
        return
    assert size(found) <= limit
    whole = sum(map(len, spectra))
    more = Criterion(method, found.parameter * (1 + 1e-4) if method == "sv_ratio" else min(found.parameter + 1e-5, 1.0))
    assert size(found) == whole or size(more) > limit or more.parameter == 1.0
