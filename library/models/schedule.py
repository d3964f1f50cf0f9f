"""The forward noise process of a model, from its scheduler config."""

import math
from typing import Any

import torch


def alphas_cumprod(config: dict[str, Any]) -> torch.Tensor:
    """The share of the picture that is left in the squared amplitude at each timestep: (1000,) float64.

    `scaled_linear` is linear in the square root of beta (Rombach et al. 2022); `linear` is Ho et al. 2020;
    `squaredcos_cap_v2` is the cosine schedule of Nichol and Dhariwal 2021 with betas up to 0.999. With
    `rescale_betas_zero_snr` the schedule ends in pure noise.
    """
    steps = int(config.get("num_train_timesteps", 1000))
    first, last = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
    kind = config.get("beta_schedule", "linear")
    if config.get("trained_betas") is not None:
        betas = torch.tensor(config["trained_betas"], dtype=torch.float64)
    elif kind == "scaled_linear":
        betas = torch.linspace(math.sqrt(first), math.sqrt(last), steps, dtype=torch.float64) ** 2
    elif kind == "linear":
        betas = torch.linspace(first, last, steps, dtype=torch.float64)
    elif kind == "squaredcos_cap_v2":
        times = torch.arange(steps + 1, dtype=torch.float64) / steps
        left = torch.cos((times + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - left[1:] / left[:-1]).clamp(max=0.999)
    else:
        raise ValueError(f"unknown noise schedule {kind!r}")
    products = torch.cumprod(1 - betas, dim=0)
    return zero_terminal_snr(products) if config.get("rescale_betas_zero_snr") else products


def zero_terminal_snr(products: torch.Tensor) -> torch.Tensor:
    """The schedule rescaled so that nothing of the picture is left at its end (Lin et al. 2023, algorithm 1)."""
    roots = products.sqrt()
    return ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
