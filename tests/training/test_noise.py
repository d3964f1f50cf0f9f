"""Noise of all kinds, and timesteps: whose they are, and their formulas in float64."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from library.options.training import Loss
from library.rng import rng
from library.to_device import to_device
from library.training.coordinates import Coordinates
from library.training.noise import DrawnNoise, NoiseSettings, draw_noise, draw_timesteps, finish

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "offset": {"noise_offset": 0.1},
    "random offset": {"noise_offset": 0.1, "noise_offset_random_strength": True},
    "adaptive": {"noise_offset": 0.1, "adaptive_noise_scale": 0.5},
    "pyramid": {"multires_noise_iterations": 6, "multires_noise_discount": 0.6},
    "input": {"ip_noise_gamma": 0.1},
    "random input": {"ip_noise_gamma": 0.1, "ip_noise_gamma_random_strength": True},
    "all": {
        "noise_offset": 0.05,
        "noise_offset_random_strength": True,
        "adaptive_noise_scale": -0.2,
        "multires_noise_iterations": 8,
        "multires_noise_discount": 0.4,
        "ip_noise_gamma": 0.1,
        "ip_noise_gamma_random_strength": True,
    },
}
SHAPE = (4, 12, 9)
MANY = Coordinates(3, 1, 0, tuple(range(500)))


def drawn(at: Coordinates, shape: tuple[int, int, int] = SHAPE, **settings: Any) -> DrawnNoise:
    return draw_noise((len(at.positions), *shape), at, NoiseSettings(**settings))


def exact(tensor: torch.Tensor) -> NDArray[np.float64]:
    return tensor.double().numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_draws_belong_to_a_sample_and_not_to_its_company(kind: str) -> None:
    settings = NoiseSettings(**KINDS[kind])
    latents = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(1)) + 1
    whole, part = Coordinates(7, 2, 5, (0, 1, 2, 3)), Coordinates(7, 2, 5, (3, 1))
    together = finish(draw_noise(latents.shape, whole, settings), latents)
    alone = finish(draw_noise((2, *SHAPE), part, settings), latents[[3, 1]])
    torch.testing.assert_close(together.target[[3, 1]], alone.target, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(together.input[[3, 1]], alone.input, rtol=1e-6, atol=1e-6)
    for other in (Coordinates(7, 2, 6, (3, 1)), Coordinates(7, 3, 5, (3, 1)), Coordinates(8, 2, 5, (3, 1))):
        elsewhere = finish(draw_noise((2, *SHAPE), other, settings), latents[[3, 1]])
        assert not torch.isclose(elsewhere.target, alone.target).any(dim=1).all()
    validation = Coordinates(7, 2, 5, (3, 1), "validation")
    assert not torch.equal(draw_noise((2, *SHAPE), validation, settings).target, alone.target)


def test_the_same_draws_are_the_same_bits() -> None:
    at = Coordinates(7, 2, 5, (0, 1, 2))
    for settings in KINDS.values():
        assert torch.equal(drawn(at, **settings).input, drawn(at, **settings).input)


def test_nothing_is_copied_or_perturbed_unless_asked_for() -> None:
    at = Coordinates(1, 1, 0, (0, 1))
    plain = drawn(at)
    assert plain.input is plain.target
    ready = finish(plain, torch.zeros(2, *SHAPE))
    assert ready.input is ready.target and torch.equal(ready.target, plain.target)
    assert plain.target.dtype == torch.float32 and plain.target.device.type == "cpu"


def test_plain_noise_is_standard_normal() -> None:
    noise = exact(drawn(MANY).target)
    assert noise.mean() == pytest.approx(0, abs=4 / np.sqrt(noise.size))
    assert noise.std() == pytest.approx(1, abs=4 / np.sqrt(2 * noise.size))
    assert (noise**4).mean() == pytest.approx(3, rel=0.03)


def test_an_offset_is_constant_over_a_channel_and_as_strong_as_asked() -> None:
    plain = exact(drawn(MANY).target)
    offsets = exact(drawn(MANY, noise_offset=0.5).target) - plain
    assert np.ptp(offsets, axis=(2, 3)).max() < 2e-6
    levels = offsets.mean((2, 3))
    assert levels.std() == pytest.approx(0.5, rel=0.05)
    assert levels.mean() == pytest.approx(0, abs=4 * 0.5 / np.sqrt(levels.size))
    assert abs(np.corrcoef(levels.T)[np.triu_indices(4, 1)]).max() < 0.2
    double = exact(drawn(MANY, noise_offset=1.0).target) - plain
    np.testing.assert_allclose(double, 2 * offsets, atol=2e-6)


@pytest.mark.parametrize("kind", ["noise_offset", "ip_noise_gamma"])
def test_a_random_strength_is_a_samples_own_share_of_the_whole(kind: str) -> None:
    fixed: dict[str, Any] = {kind: 1.0}
    varied: dict[str, Any] = {**fixed, f"{kind}_random_strength": True}
    plain = exact(drawn(MANY).input)
    whole = exact(drawn(MANY, **fixed).input) - plain
    part = exact(drawn(MANY, **varied).input) - plain
    shares = (part * whole).sum((1, 2, 3)) / (whole * whole).sum((1, 2, 3))
    np.testing.assert_allclose(part, shares[:, None, None, None] * whole, atol=3e-6)
    ranks = np.sort(shares)
    uniform = (np.arange(len(ranks)) + 0.5) / len(ranks)
    assert ranks[0] >= 0 and ranks[-1] < 1
    assert abs(ranks - uniform).max() < 1.63 / np.sqrt(len(ranks)), "Kolmogorov and Smirnov, at 1 %"


def test_input_perturbation_leaves_the_target_alone() -> None:
    plain, perturbed = drawn(MANY), drawn(MANY, ip_noise_gamma=0.25)
    assert torch.equal(plain.target, perturbed.target)
    extra = exact(perturbed.input) - exact(perturbed.target)
    assert extra.std() == pytest.approx(0.25, rel=0.01)
    assert abs(np.corrcoef(extra.ravel(), exact(plain.target).ravel())[0, 1]) < 0.01


def test_one_kind_of_noise_changes_no_other() -> None:
    at = Coordinates(5, 1, 2, (0, 1))
    offset: dict[str, Any] = {"noise_offset": 0.3}
    gamma: dict[str, Any] = {"ip_noise_gamma": 0.2}
    both = drawn(at, **offset, **gamma)
    assert torch.equal(both.target, drawn(at, **offset).target)
    assert both.perturbation is not None
    assert torch.equal(both.perturbation, drawn(at, **gamma).perturbation)


def bilinear(coarse: NDArray[np.float64], side: int, axis: int) -> NDArray[np.float64]:
    """Stretch one axis: the centres of cells lie at (i + 0.5), and beyond the outermost the value stays."""
    length = coarse.shape[axis]
    place = np.clip((np.arange(side) + 0.5) * length / side - 0.5, 0, length - 1)
    low = np.floor(place).astype(int)
    high = np.minimum(low + 1, length - 1)
    share = np.moveaxis(np.broadcast_to(place - low, (*np.delete(coarse.shape, axis), side)), -1, axis)
    return np.take(coarse, low, axis) * (1 - share) + np.take(coarse, high, axis) * share


def pyramid(at: Coordinates, position: int, shape: tuple[int, int, int], iterations: int, discount: float) -> Any:
    """Pyramid noise with its formula in float64, over the same random numbers."""
    generator = rng(at.seed, "noise", at.epoch, at.index, position, "pyramid")
    total = np.zeros(shape)
    for i in range(iterations):
        ratio = generator.uniform(2, 4)
        sides = [max(1, int(side / ratio**i)) for side in shape[1:]]
        coarse = generator.standard_normal((1, shape[0], *sides), dtype=np.float32)[0].astype(np.float64)
        total += bilinear(bilinear(coarse, shape[1], 1), shape[2], 2) * discount**i
        if min(sides) == 1:
            break
    return total


@pytest.mark.parametrize("shape", [(4, 12, 9), (4, 64, 48), (4, 1, 8)])
@pytest.mark.parametrize(("iterations", "discount"), [(1, 0.3), (3, 0.8), (10, 0.3)])
def test_pyramid_noise_is_its_formula(shape: tuple[int, int, int], iterations: int, discount: float) -> None:
    at = Coordinates(9, 2, 4, (0, 2))
    settings: dict[str, Any] = {"multires_noise_iterations": iterations, "multires_noise_discount": discount}
    ours = exact(drawn(at, shape, noise_offset=0.2, **settings).target)
    base = exact(drawn(at, shape, noise_offset=0.2).target)
    for row, plain, position in zip(ours, base, at.positions, strict=True):
        expected = plain + pyramid(at, position, shape, iterations, discount)
        np.testing.assert_allclose(row, expected / expected.std(ddof=1), atol=2e-6)
        assert row.std(ddof=1) == pytest.approx(1, rel=1e-6)


def test_pyramid_noise_ends_where_a_side_is_one() -> None:
    at = Coordinates(9, 2, 4, (0, 1, 2))
    many = [drawn(at, multires_noise_iterations=n, multires_noise_discount=1.0).target for n in (8, 9, 40)]
    assert torch.equal(many[0], many[1]) and torch.equal(many[0], many[2])


def test_pyramid_noise_is_stronger_at_coarse_scales() -> None:
    at = Coordinates(9, 2, 4, tuple(range(60)))
    coarse = [
        exact(drawn(at, (4, 32, 32), **KINDS[kind]).target).reshape(60, 4, 4, 8, 4, 8).mean((3, 5)).var()
        for kind in ("plain", "pyramid")
    ]
    assert coarse[0] == pytest.approx(1 / 64, rel=0.15)
    assert coarse[1] > 3 * coarse[0]


@pytest.mark.parametrize("iterations", [0, 4])
@pytest.mark.parametrize("scale", [0.7, -0.7])
def test_an_adaptive_offset_is_its_formula(scale: float, iterations: int) -> None:
    at = Coordinates(2, 3, 4, (0, 1, 5))
    generator = np.random.default_rng(3)
    latents = generator.standard_normal((3, *SHAPE)) + generator.standard_normal((3, 4, 1, 1))
    pyramids: dict[str, Any] = {"multires_noise_iterations": iterations}
    adaptive = finish(
        drawn(at, noise_offset=0.4, adaptive_noise_scale=scale, ip_noise_gamma=0.1, **pyramids),
        torch.from_numpy(latents).float(),
    )
    assert adaptive.adaptive is None

    plain = exact(drawn(at).target)
    unit = (exact(drawn(at, noise_offset=1.0).target) - plain).mean((2, 3), keepdims=True)
    strength = np.maximum(0.4 + scale * abs(latents.mean((2, 3), keepdims=True)), 0)
    assert (strength == 0).any() == (scale < 0), "the clamp is seen"
    expected = plain + strength * unit
    if iterations:
        expected += np.stack([pyramid(at, position, SHAPE, iterations, 0.3) for position in at.positions])
        expected /= expected.std((1, 2, 3), ddof=1, keepdims=True)
    np.testing.assert_allclose(exact(adaptive.target), expected, atol=3e-6)
    perturbation = drawn(at, ip_noise_gamma=0.1).perturbation
    assert perturbation is not None
    np.testing.assert_allclose(exact(adaptive.input), expected + exact(perturbation), atol=3e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_finishing_reads_nothing_back_from_the_device(kind: str) -> None:
    """A tensor on `meta` has no values: to ask for one is an error."""
    latents = torch.empty(2, *SHAPE, device="meta", dtype=torch.bfloat16)
    ready = finish(drawn(Coordinates(1, 1, 0, (0, 1)), **KINDS[kind]), latents)
    assert ready.target.device.type == ready.input.device.type == "meta"
    assert ready.target.dtype == ready.input.dtype == torch.float32


@pytest.mark.gpu
def test_a_copy_to_the_gpu_waits_for_nothing() -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        latents = torch.ones(2, *SHAPE, device="cuda")
        ready = finish(drawn(Coordinates(1, 1, 0, (0, 1)), **KINDS["all"]), latents)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    here = finish(drawn(Coordinates(1, 1, 0, (0, 1)), **KINDS["all"]), torch.ones(2, *SHAPE))
    torch.testing.assert_close(ready.input.cpu(), here.input, rtol=1e-5, atol=1e-5)


def test_a_copy_within_memory_is_none() -> None:
    tensor = torch.ones(3)
    assert to_device(tensor, torch.device("cpu")) is tensor


def test_timesteps_are_uniform_in_their_range() -> None:
    at = Coordinates(1, 1, 0, tuple(range(3000)))
    inside = draw_timesteps(at, NoiseSettings(min_timestep=100, max_timestep=110))
    assert inside.dtype == torch.int64
    counts = np.bincount(inside.numpy() - 100, minlength=10)
    assert len(counts) == 10
    assert ((counts - 300) ** 2 / 300).sum() < 21.7, "chi square with 9 degrees of freedom, at 1 %"
    assert set(draw_timesteps(at, NoiseSettings(min_timestep=999)).tolist()) == {999}
    everywhere = draw_timesteps(at, NoiseSettings())
    assert everywhere.min() < 5 and everywhere.max() > 994


def test_timesteps_belong_to_a_sample_too() -> None:
    whole = draw_timesteps(Coordinates(7, 2, 5, (0, 1, 2, 3)), NoiseSettings())
    assert torch.equal(whole[[1, 3]], draw_timesteps(Coordinates(7, 2, 5, (1, 3)), NoiseSettings()))


def test_settings_are_what_the_flags_say() -> None:
    assert NoiseSettings.of(Loss()) == NoiseSettings()
    flags: dict[str, Any] = {
        "noise_offset": 0.1,
        "noise_offset_random_strength": True,
        "adaptive_noise_scale": 0.2,
        "multires_noise_iterations": 5,
        "multires_noise_discount": 0.6,
        "ip_noise_gamma": 0.7,
        "ip_noise_gamma_random_strength": True,
        "min_timestep": 8,
        "max_timestep": 900,
    }
    assert NoiseSettings.of(Loss(**flags)) == NoiseSettings(**flags)
    assert NoiseSettings.of(Loss(), steps=500).max_timestep == 500
    assert NoiseSettings.of(Loss(max_timestep=700), steps=500).max_timestep == 500
