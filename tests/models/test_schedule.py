"""Noise schedules against figures computed from the schedulers of the field."""

import json
from pathlib import Path

import pytest
import torch

from library.models.samplers import SAMPLERS, scheduler
from library.models.schedule import alphas_cumprod

VECTORS = json.loads((Path(__file__).parents[1] / "data/vectors/loss_weights.json").read_text())
SD1 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize(
    ("zero", "column"), [(False, "alphas_cumprod"), (True, "alphas_cumprod_zero_terminal_snr")], ids=["plain", "zero"]
)
def test_the_products_of_sd1(zero: bool, column: str) -> None:
    products = alphas_cumprod({**SD1, "rescale_betas_zero_snr": zero})
    assert products[VECTORS["timesteps"]].tolist() == pytest.approx(VECTORS[column], rel=2e-4, abs=1e-9)


NAMES = sorted(name for name in SAMPLERS if not name.startswith("k_"))


@pytest.mark.parametrize("name", NAMES)
def test_samplers_take_the_schedule_that_ends_in_pure_noise(name: str) -> None:
    if needed := SAMPLERS[name].needs:
        pytest.importorskip(needed)
    sampler = scheduler(name, SD1, "v_prediction", zero_snr=True)
    expected = alphas_cumprod({**SD1, "rescale_betas_zero_snr": True}).float()
    assert sampler.alphas_cumprod[:-1] == pytest.approx(expected[:-1], rel=1e-3, abs=1e-7)
    assert sampler.alphas_cumprod[-1] <= 1e-7
    sampler.set_timesteps(10)
    assert float(sampler.timesteps.max()) == 999
    assert sampler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize("name", NAMES)
def test_models_that_predict_noise_keep_the_plain_schedule(name: str) -> None:
    if needed := SAMPLERS[name].needs:
        pytest.importorskip(needed)
    sampler = scheduler(name, SD1, "epsilon", zero_snr=True)
    assert sampler.alphas_cumprod == pytest.approx(alphas_cumprod(SD1).float(), rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_every_sampler_gets_from_pure_noise_to_a_picture(name: str) -> None:
    """A predictor that knows the picture: velocity from the true schedule, on the way down from timestep 999."""
    if needed := SAMPLERS[name].needs:
        pytest.importorskip(needed)
    sampler = scheduler(name, SD1, "v_prediction", zero_snr=True)
    sampler.set_timesteps(40)
    products = alphas_cumprod({**SD1, "rescale_betas_zero_snr": True}).float()
    picture = torch.linspace(-1, 1, 64).reshape(1, 4, 4, 4)
    generator = torch.Generator().manual_seed(3)
    sample = torch.randn(1, 4, 4, 4, generator=generator) * sampler.init_noise_sigma
    for timestep in sampler.timesteps:
        inputs = sampler.scale_model_input(sample, timestep)
        kept = products[int(timestep)]
        noise = (inputs - kept.sqrt() * picture) / (1 - kept).sqrt()
        velocity = kept.sqrt() * noise - (1 - kept).sqrt() * picture
        sample = sampler.step(velocity, timestep, sample, return_dict=False)[0]
    assert (sample - picture).abs().mean() < 0.15
