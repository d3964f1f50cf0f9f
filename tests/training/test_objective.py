"""Noise, targets and loss weights against their formulas in float64."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

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
