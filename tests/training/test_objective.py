"""Noise, targets and loss weights against their formulas in float64."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from library.models.schedule import alphas_cumprod
from library.training.objective import Coordinates, NoiseSettings, Objective, draw_noise, draw_timesteps

VECTORS = json.loads((Path(__file__).parents[1] / "data/vectors/loss_weights.json").read_text())
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
ALPHAS = torch.cumprod(1 - BETAS, 0)
CPU = torch.device("cpu")


@pytest.mark.parametrize(("kind", "column"), [("epsilon", "min_snr_5_eps"), ("v_prediction", "min_snr_5_v")])
def test_min_snr_weights(kind: str, column: str) -> None:
    weights = Objective(ALPHAS, kind, 5.0, CPU).weights
    assert weights[VECTORS["timesteps"]].numpy() == pytest.approx(VECTORS[column], rel=1e-4)


def test_noising_target_and_loss_follow_the_formulas() -> None:
    generator = torch.Generator().manual_seed(1)
    latents, noise, prediction = (torch.randn(3, 4, 6, 5, generator=generator) for _ in range(3))
    timesteps = torch.tensor([0, 500, 999])
    signal = ALPHAS[timesteps].sqrt().view(-1, 1, 1, 1)
    sigma = (1 - ALPHAS[timesteps]).sqrt().view(-1, 1, 1, 1)
    for kind, target in (("epsilon", noise.double()), ("v_prediction", signal * noise - sigma * latents)):
        objective = Objective(ALPHAS, kind, None, CPU)
        noisy = objective.add_noise(latents, noise, timesteps)
        assert torch.allclose(noisy.double(), signal * latents + sigma * noise, atol=1e-6)
        ours = objective.target(latents, noise, timesteps)
        assert torch.allclose(ours.double(), target, atol=1e-6)
        losses = objective.losses(prediction, ours, timesteps)
        assert torch.allclose(losses.double(), (prediction - target).pow(2).mean((1, 2, 3)), rtol=1e-5)


def schedule(zero_terminal: bool) -> np.ndarray:
    """Stable Diffusion's share of signal by timestep, float64, written out from the papers' formulas."""
    left = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    if zero_terminal:
        roots = np.sqrt(left)
        left = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
    return left


@pytest.mark.parametrize("zero_terminal", [False, True])
@pytest.mark.parametrize("gamma", [None, 1.0, 5.0])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_whole_loss_is_its_formula_in_float64(kind: str, gamma: float | None, zero_terminal: bool) -> None:
    """A stub predictor, 0.5 x + t / 1000, through noising, target, distance and weight; SNR 0 included."""
    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    table = alphas_cumprod({**config, "rescale_betas_zero_snr": zero_terminal})
    objective = Objective(table, kind, gamma, CPU)
    generator = np.random.default_rng(5)
    latents, noise = generator.standard_normal((2, 6, 4, 3, 5))
    timesteps = np.array([0, 1, 250, 700, 998, 999])

    left = schedule(zero_terminal)[timesteps]
    signal, sigma = (np.sqrt(one)[:, None, None, None] for one in (left, 1 - left))
    noisy = signal * latents + sigma * noise
    target = noise if kind == "epsilon" else signal * noise - sigma * latents
    predicted = 0.5 * noisy + timesteps[:, None, None, None] / 1000
    expected = ((predicted - target) ** 2).mean((1, 2, 3))
    if gamma is not None:
        snr = left / (1 - left)
        epsilon = np.array([min(1.0, gamma / one) if one else 1.0 for one in snr])
        expected = expected * (epsilon if kind == "epsilon" else np.minimum(snr, gamma) / (snr + 1))

    x, n = (torch.from_numpy(one).float() for one in (latents, noise))
    t = torch.from_numpy(timesteps)
    ours = objective.add_noise(x, n, t)
    stub = 0.5 * ours + t.view(-1, 1, 1, 1) / 1000
    losses = objective.losses(stub, objective.target(x, n, t), t)
    assert torch.isfinite(losses).all()
    np.testing.assert_allclose(losses.double().numpy(), expected, rtol=2e-5, atol=1e-7)


def test_at_no_signal_the_weights_are_finite() -> None:
    """min(SNR, g) / SNR is 1 where the SNR is 0, and min(SNR, g) / (SNR + 1) is 0."""
    table = torch.from_numpy(schedule(True))
    assert table[-1] == 0
    assert Objective(table, "epsilon", 5.0, CPU).weights[-1] == 1
    assert Objective(table, "v_prediction", 5.0, CPU).weights[-1] == 0


def test_draws_belong_to_a_sample_and_not_to_its_company() -> None:
    settings = NoiseSettings(noise_offset=0.1)
    whole = Coordinates(7, 2, 5, (0, 1, 2, 3))
    part = Coordinates(7, 2, 5, (1, 3))
    assert torch.equal(draw_noise((4, 4, 8, 8), whole, settings)[[1, 3]], draw_noise((2, 4, 8, 8), part, settings))
    assert torch.equal(draw_timesteps(whole, settings)[[1, 3]], draw_timesteps(part, settings))
    other = Coordinates(7, 2, 6, (1, 3))
    assert not torch.equal(draw_noise((2, 4, 8, 8), part, settings), draw_noise((2, 4, 8, 8), other, settings))


def test_noise_offset_has_its_strength() -> None:
    at = Coordinates(1, 0, 0, tuple(range(400)))
    noise = draw_noise((400, 4, 16, 16), at, NoiseSettings(noise_offset=0.5)).double()
    means = noise.mean((2, 3))
    assert float(means.std()) == pytest.approx(np.sqrt(0.25 + 1 / 256), rel=0.05)
    assert float(noise.std((2, 3)).mean()) == pytest.approx(1.0, rel=0.01)


def test_timesteps_stay_in_their_range() -> None:
    at = Coordinates(1, 0, 0, tuple(range(2000)))
    drawn = draw_timesteps(at, NoiseSettings(min_timestep=100, max_timestep=110))
    assert set(drawn.tolist()) == set(range(100, 110))
