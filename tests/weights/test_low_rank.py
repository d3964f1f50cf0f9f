"""The algebra of two factors is that of the whole matrix, in float64, whatever their sizes."""

from math import sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor

from library.errors import UserError
from library.weights.loras.forms import Factors
from library.weights.loras.low_rank import (
    concatenated,
    distance,
    inner,
    norm,
    numerical_rank,
    shortened,
    singular_values,
    svd_of,
    truncated,
)

SIDES = some.integers(1, 12)
RANKS = some.integers(1, 16)
SEEDS = some.integers(0, 2**31)
few = settings(max_examples=40, deadline=None)


def drawn(out: int, wide: int, rank: int, seed: int, scale: float = 0.5) -> Factors:
    """Random factors in float64; rank may be above both sides."""
    generator = torch.Generator().manual_seed(seed)
    up, down = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((out, rank), (rank, wide)))
    return Factors(up, down, (out, wide), scale)


def close(one: Tensor, other: Tensor, to: float = 1e-10) -> bool:
    """Equal within `to` of the norm of the second."""
    return float((one - other).norm()) <= to * max(float(other.norm()), 1e-12)


@few
@given(SIDES, SIDES, RANKS, SEEDS)
def test_decomposition_is_that_of_the_product(out: int, wide: int, rank: int, seed: int) -> None:
    """The vectors are orthonormal, the values those of the matrix, and there are min(out, in, rank) of them."""
    found = drawn(out, wide, rank, seed)
    svd, whole = svd_of(found), found.product()
    count = min(out, wide, rank)
    assert svd.s.shape == (count,)
    assert torch.allclose(svd.s, torch.linalg.svdvals(whole)[:count], rtol=1e-9, atol=1e-12)
    assert close(svd.u * svd.s @ svd.vh, whole)
    ones = torch.eye(count, dtype=torch.float64)
    assert close(svd.u.T @ svd.u, ones)
    assert close(svd.vh @ svd.vh.T, ones)


@few
@given(SIDES, SIDES, RANKS, RANKS, SEEDS)
def test_truncation_is_that_of_the_whole_matrix(out: int, wide: int, rank: int, kept: int, seed: int) -> None:
    """Within 1e-5 relative of a truncated SVD of the full product, or both are the product itself."""
    found = drawn(out, wide, rank, seed)
    u, s, vh = torch.linalg.svd(found.product(), full_matrices=False)
    expected = u[:, :kept] * s[:kept] @ vh[:kept]
    new = truncated(svd_of(found), kept, found.shape)
    assert new.rank <= min(kept, out, wide, rank)
    assert new.scale == 1.0
    assert close(new.product(), expected, 1e-5)


@few
@given(SIDES, SIDES, RANKS, RANKS, SEEDS)
def test_the_short_way_gives_the_same(out: int, wide: int, rank: int, kept: int, seed: int) -> None:
    """Forming only the vectors that stay: the same product, orthonormal rows below, and the same values."""
    found = drawn(out, wide, rank, seed)
    new, values = shortened(found, lambda values: min(kept, len(values)))
    svd = svd_of(found)
    assert close(new.product(), truncated(svd, kept, found.shape).product(), 1e-8)
    assert close(new.down @ new.down.T, torch.eye(new.rank, dtype=torch.float64), 1e-6)
    assert torch.allclose(values, svd.s, rtol=1e-9, atol=1e-12)
    assert torch.allclose(singular_values(found), svd.s, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_the_short_way_of_factors_that_lack_rank(seed: int) -> None:
    """Values that are zero, or far below the first, leave finite factors with orthonormal rows."""
    found = drawn(9, 7, 3, seed)
    loose = Factors(torch.cat([found.up, found.up], dim=1), torch.cat([found.down, found.down]), found.shape)
    faint = concatenated((found, drawn(9, 7, 1, seed + 9)), (1.0, 1e-9))
    for one in (loose, faint, Factors(torch.zeros(9, 2), torch.ones(2, 7), (9, 7))):
        new, _ = shortened(one, len)
        assert close(new.product(), one.product().double())
        assert close(new.down @ new.down.T, torch.eye(new.rank, dtype=torch.float64))


@few
@given(SIDES, SIDES, some.integers(1, 4), some.integers(1, 6), SEEDS)
def test_a_product_of_lower_rank_loses_nothing(out: int, wide: int, low: int, more: int, seed: int) -> None:
    """Factors of rank low + more whose product has rank low at most: resized to low they give the same."""
    inside, mixed = drawn(out, wide, low, seed), drawn(low, low + more, low + more, seed + 1, scale=1.0)
    loose = Factors(inside.up @ mixed.product(), torch.linalg.pinv(mixed.product()) @ inside.down, (out, wide), 0.5)
    svd = svd_of(loose)
    assert numerical_rank(loose, 1e-8) <= low
    assert close(truncated(svd, low, loose.shape).product(), loose.product(), 1e-7)


@few
@given(SIDES, SIDES, some.tuples(RANKS, RANKS), some.tuples(some.floats(-2, 2), some.floats(-2, 2)), SEEDS)
def test_concatenated_is_the_sum(
    out: int, wide: int, ranks: tuple[int, int], weights: tuple[float, float], seed: int
) -> None:
    """Ratios count once, and so do scales, which differ."""
    one, other = drawn(out, wide, ranks[0], seed, scale=0.25), drawn(out, wide, ranks[1], seed + 1, scale=3.0)
    both = concatenated((one, other), weights)
    assert both.rank == sum(ranks)
    expected = weights[0] * one.product() + weights[1] * other.product()
    assert float((both.product() - expected).abs().max()) <= 1e-10 * (1 + float(expected.norm()))


@few
@given(SIDES, SIDES, RANKS, SEEDS)
def test_a_minus_a_is_zero(out: int, wide: int, rank: int, seed: int) -> None:
    found = drawn(out, wide, rank, seed)
    nothing = concatenated((found, found), (1.0, -1.0))
    svd = svd_of(nothing)
    assert numerical_rank(nothing) == 0
    assert float(svd.s[0]) <= svd.floor
    assert distance(found, found) == 0


@few
@given(SIDES, SIDES, RANKS, RANKS, SEEDS)
def test_norms_and_products_are_those_of_the_matrices(out: int, wide: int, rank: int, other: int, seed: int) -> None:
    one, two = drawn(out, wide, rank, seed), drawn(out, wide, other, seed + 1, scale=-2.0)
    first, second = one.product(), two.product()
    size = float(first.norm() * second.norm())
    assert norm(one) == pytest.approx(float(first.norm()), rel=1e-9)
    assert inner(one, two) == pytest.approx(float((first * second).sum()), abs=1e-9 * size)
    assert distance(one, two) == pytest.approx(float((first - second).norm()), rel=1e-6)


@pytest.mark.parametrize("apart", [1e-3, 1e-7, 1e-11])
def test_small_distances_keep_their_digits(apart: float) -> None:
    """A difference of Gram matrices alone would be noise below 1e-8 of the norm."""
    found, other = drawn(40, 30, 4, 0), drawn(40, 30, 1, 1)
    moved = concatenated((found, other), (1.0, apart))
    assert distance(found, moved) == pytest.approx(apart * norm(other), rel=1e-3)


def test_numerical_rank_counts_what_is_above_the_greatest_times_eps() -> None:
    values = torch.tensor([1.0, 1e-3, 1e-6], dtype=torch.float64)
    found = Factors(torch.diag(values), torch.eye(3, dtype=torch.float64), (3, 3))
    assert [numerical_rank(found, eps) for eps in (1e-10, 1e-5, 1e-2)] == [3, 2, 1]
    assert numerical_rank(Factors(torch.zeros(3, 2), torch.ones(2, 3), (3, 3))) == 0


def test_a_zero_change_stays_zero_with_finite_factors() -> None:
    new = truncated(svd_of(Factors(torch.zeros(5, 3), torch.randn(3, 4), (5, 4))), 2, (5, 4))
    assert new.rank == 2
    assert not new.product().any()
    assert bool(new.down.isfinite().all())
    assert norm(new) == 0


def test_kernels_are_flattened_into_the_lower_factor() -> None:
    """A convolution's product has the weight's shape, and 1x1 kernels add to linear layers of the same sizes."""
    found = Factors(torch.randn(6, 2), torch.randn(2, 36), (6, 4, 3, 3), 2.0)
    assert close(truncated(svd_of(found), 2, found.shape).product(), found.product().double(), 1e-5)
    linear, conv = (
        Factors(torch.ones(6, 1), torch.ones(1, 4), (6, 4)),
        Factors(torch.ones(6, 1), torch.ones(1, 4), (6, 4, 1, 1)),
    )
    both = concatenated((linear, conv), (1.0, 1.0))
    assert (both.shape, both.product().unique().tolist()) == ((6, 4, 1, 1), [2.0])
    with pytest.raises(UserError, match=r"\[6, 4\] and \[6, 4, 3, 3\] don't go together"):
        concatenated((found, linear), (1.0, 1.0), "lora_unet_x")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_named(bad: float) -> None:
    broken = Factors(torch.full((3, 2), bad), torch.ones(2, 3), (3, 3))
    for work in (lambda: svd_of(broken, "lora_unet_x"), lambda: concatenated((broken,), (1.0,), "lora_unet_x")):
        with pytest.raises(UserError, match="lora_unet_x: holds numbers that are not finite"):
            work()
    assert norm(broken) != norm(broken) or norm(broken) == float("inf")


def test_half_precision_factors_are_computed_in_double() -> None:
    """Values as large as a float16 holds don't overflow in their squares."""
    large = Factors(torch.full((8, 1), 6e4, dtype=torch.float16), torch.full((1, 8), 6e4, dtype=torch.float16), (8, 8))
    expected = 8 * float(large.up[0, 0].double()) ** 2
    assert norm(large) == pytest.approx(expected, rel=1e-12)
    assert float(svd_of(large).s[0]) == pytest.approx(expected, rel=1e-12)
    assert sqrt(inner(large, large)) == pytest.approx(expected, rel=1e-12)
