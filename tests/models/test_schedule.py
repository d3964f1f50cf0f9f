"""Noise schedules against figures computed from the schedulers of the field."""

import json
from pathlib import Path

import pytest

from library.models.schedule import alphas_cumprod

VECTORS = json.loads((Path(__file__).parents[1] / "data/vectors/loss_weights.json").read_text())
SD1 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize(
    ("zero", "column"), [(False, "alphas_cumprod"), (True, "alphas_cumprod_zero_terminal_snr")], ids=["plain", "zero"]
)
def test_the_products_of_sd1(zero: bool, column: str) -> None:
    products = alphas_cumprod({**SD1, "rescale_betas_zero_snr": zero})
    assert products[VECTORS["timesteps"]].tolist() == pytest.approx(VECTORS[column], rel=2e-4, abs=1e-9)
