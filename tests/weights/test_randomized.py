"""Randomized decompositions against whole ones in float64, and the error that they state against the matrix itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from library.errors import UserError
from library.weights.loras.randomized import Cut, clamped, cut, error_of


def decaying(rows: int, columns: int, power: float, seed: int = 0) -> torch.Tensor:
    """A float32 matrix with singular values 1, 1/2^power, 1/3^power, ..."""
    draws = torch.Generator().manual_seed(seed)
    short = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, short, generator=draws, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, short, generator=draws, dtype=torch.float64)).Q
    values = torch.arange(1, short + 1, dtype=torch.float64) ** -power
    return ((left * values) @ right.T).float()


def left_out(matrix: torch.Tensor, found: Cut, rank: int) -> float:
    """The Frobenius norm of what a cut leaves out, in float64."""
    svd = found.svd
    product = (svd.u[:, :rank].double() * svd.s[:rank].double()) @ svd.vh[:rank].double()
    return float((matrix.double() - product).norm())


@pytest.mark.parametrize("power", [0.2, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("shape", [(320, 320), (640, 320), (256, 768)])
def test_leaves_out_hardly_more_than_the_best(shape: tuple[int, int], power: float) -> None:
    matrix, rank = decaying(*shape, power), 16
    found = cut(matrix, rank, name="m")
    best = float(torch.linalg.svdvals(matrix.double())[rank:].norm())
    assert found.passes > 0
    assert best * 0.999 <= left_out(matrix, found, rank) <= best * 1.02
    assert found.norm == pytest.approx(float(matrix.double().norm()), rel=1e-12)
    assert float(found.values.square().sum()) == pytest.approx(found.norm**2, rel=1e-6)


def test_noise_without_any_decay() -> None:
    matrix = torch.randn(512, 512, generator=torch.Generator().manual_seed(3))
    found = cut(matrix, 32, name="m")
    best = float(torch.linalg.svdvals(matrix.double())[32:].norm())
    assert left_out(matrix, found, 32) <= best * 1.02


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 24), st.integers(193, 260), st.integers(193, 260), st.integers(0, 2**32))
def test_a_product_of_lower_rank_comes_back(rank: int, rows: int, columns: int, seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, rank, generator=draws) @ torch.randn(rank, columns, generator=draws)
    found = cut(matrix, 24, name="m", seed=seed)
    assert left_out(matrix, found, 24) <= 1e-5 * float(matrix.norm())


@pytest.mark.parametrize(("shape", "rank"), [((24, 40), 4), ((300, 300), 200), ((7, 5), 64)])
def test_small_matrices_and_high_ranks_are_decomposed_as_a_whole(shape: tuple[int, int], rank: int) -> None:
    matrix = decaying(*shape, 0.5)
    found = cut(matrix, rank, name="m")
    exact = torch.linalg.svdvals(matrix.double())
    assert found.passes == 0
    assert torch.allclose(found.values, exact, rtol=1e-4, atol=1e-6)
    kept = min(rank, min(shape))
    assert left_out(matrix, found, kept) == pytest.approx(float(exact[kept:].norm()), abs=1e-5)


def test_draws_go_by_seed_and_name_alone() -> None:
    matrix = decaying(300, 300, 0.3)
    one, same = cut(matrix, 8, name="a", seed=1), cut(matrix, 8, name="a", seed=1)
    other = cut(matrix, 8, name="b", seed=1)
    assert torch.equal(one.svd.u, same.svd.u)
    assert torch.equal(one.svd.vh, same.svd.vh)
    assert not torch.equal(one.svd.u, other.svd.u)


def test_the_stated_error_is_that_of_the_factors() -> None:
    matrix = decaying(200, 300, 0.5)
    found = cut(matrix, 8, name="m")
    up, down = found.svd.u[:, :8] * found.svd.s[:8], found.svd.vh[:8]
    assert error_of(matrix, up, down) == pytest.approx(left_out(matrix, found, 8), rel=1e-5)
    assert error_of(matrix, up * 0, down) == pytest.approx(float(matrix.double().norm()), rel=1e-6)


def test_clamping_cuts_off_at_one_quantile_of_both_factors() -> None:
    up, down = torch.randn(50, 4), torch.randn(4, 80) * 0.1
    values = torch.cat([up.flatten(), down.flatten()])
    bound = torch.quantile(values, 0.9)
    cut_up, cut_down = clamped(up, down, 0.9)
    assert torch.allclose(cut_up, up.clamp(-bound, bound), atol=1e-6)
    assert torch.allclose(cut_down, down.clamp(-bound, bound), atol=1e-6)
    assert clamped(up, down, 1.0) == (up, down)


def test_numbers_that_are_none_are_named() -> None:
    matrix = torch.zeros(300, 300)
    matrix[3, 4] = torch.nan
    with pytest.raises(UserError, match=r"lora_unet_x: .*not finite"):
        cut(matrix, 4, name="lora_unet_x")
