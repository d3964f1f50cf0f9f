"""Pictures from prompts, many at a time: DDIM from ordinary starting noise, with guidance.

The same arithmetic as StableDiffusionPipeline's, but prompts of one size share a batch, and every picture's noise is a
function of its own seed, whatever the batch.
"""

import numpy as np
import torch
from torch import Tensor

from library.quickstart.architecture import FACTOR, Parts, sampler
from library.quickstart.scenes import Picture
from library.quickstart.training_tools import gaussian
from library.quickstart.words import tokens
from library.rng import rng

STEPS = 20
GUIDANCE = 4.0


def starting_noise(seeds: list[int], width: int, height: int) -> Tensor:
    """Standard normal latents, one row a seed."""
    shape = (4, height // FACTOR, width // FACTOR)
    return torch.stack([gaussian(rng(seed, "preview"), shape) for seed in seeds])


def to_pictures(decoded: Tensor) -> list[Picture]:
    """(n, 3, height, width) in -1 ... 1 -> uint8 RGB pictures."""
    pixels = decoded.float().clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [np.ascontiguousarray(picture) for picture in pixels]


@torch.no_grad()
def sample(
    parts: Parts,
    prompts: list[str],
    seeds: list[int],
    *,
    width: int = 128,
    height: int = 128,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    batch: int = 25,
) -> list[Picture]:
    """One picture a prompt, in order."""
    pictures: list[Picture] = []
    empty = parts.text_encoder(tokens([""])).last_hidden_state
    for start in range(0, len(prompts), batch):
        chosen = prompts[start : start + batch]
        words = parts.text_encoder(tokens(chosen, parts.vocabulary)).last_hidden_state
        conditioning = torch.cat([empty.expand(len(chosen), -1, -1), words])
        schedule = sampler()
        schedule.set_timesteps(steps)
        latents = starting_noise(seeds[start : start + batch], width, height)
        for timestep in schedule.timesteps:
            plain, guided = parts.unet(torch.cat([latents, latents]), timestep, conditioning).sample.chunk(2)
            latents = schedule.step(plain + guidance * (guided - plain), timestep, latents).prev_sample
        pictures += to_pictures(parts.vae.decode(latents / parts.vae.config.scaling_factor).sample)
    return pictures
