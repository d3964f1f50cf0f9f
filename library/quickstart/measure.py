"""Did the LoRA learn the new thing, and what did it cost? Figures, and a grid that a person can look at.

    python -m library.quickstart.measure --lora FILE.safetensors [--model FOLDER] [--grid FILE.png]

Denoising loss with fixed noise and timesteps on pictures that training never saw, and samples judged by OpenCV, each
with the base model alone and with the LoRA.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from library.quickstart.architecture import MODEL_FOLDER, Parts, load_folder
from library.quickstart.evaluate_base import grid
from library.quickstart.judge_blorp import mean_score
from library.quickstart.pictures import HELD_OUT, Sized, old_pictures, prompts
from library.quickstart.sampling import sample
from library.quickstart.scenes import Picture
from library.quickstart.training_tools import gaussian, to_tensor
from library.quickstart.words import tokens
from library.rng import rng
from networks.lora import create_network_from_weights

SEED = 5
TIMESTEPS = (60, 180, 300, 420, 540, 660, 780, 900)
GRID_COLUMNS = 10


@dataclass(frozen=True)
class Figures:
    """One model's figures: mean losses, and the blorp score (0 ... 1) over the prompts with the samples it is of."""

    new_loss: float
    old_loss: float
    score: float
    samples: tuple[Picture, ...]


def load_with_lora(lora: Path, folder: Path = MODEL_FOLDER) -> Parts:
    """The base model with a LoRA added to its weights."""
    parts = load_folder(folder)
    network, weights = create_network_from_weights(1.0, lora, None, parts.text_encoder, parts.unet)
    network.merge_to(parts.text_encoder, parts.unet, weights)
    return parts


@torch.no_grad()
def denoising_loss(parts: Parts, pictures: Sequence[Sized], captions: Sequence[str] | None = None) -> float:
    """Mean squared error of the predicted noise over all pictures and `TIMESTEPS`, with the same noise every time.

    `captions` replace the pictures' own.
    """
    captions = captions or [sized.caption for sized in pictures]
    losses: list[Tensor] = []
    timesteps = torch.tensor(TIMESTEPS)
    for number, sized in enumerate(pictures):
        latents = parts.vae.encode(to_tensor([sized.draw()])).latent_dist.mean * parts.vae.config.scaling_factor
        noise = gaussian(rng(SEED, "validation", "noise", number), (len(TIMESTEPS), *latents.shape[1:]))
        noisy = parts.scheduler.add_noise(latents.expand(noise.shape), noise, timesteps)
        words = parts.text_encoder(tokens([captions[number]], parts.vocabulary)).last_hidden_state
        words = words.expand(len(TIMESTEPS), -1, -1)
        losses.append(functional.mse_loss(parts.unet(noisy, timesteps, words).sample, noise))
    return float(torch.stack(losses).mean())


def figures(parts: Parts) -> Figures:
    """All figures of one model; about 20 seconds on two cores."""
    wanted = prompts()
    samples = sample(parts, [sized.caption for sized in wanted], [2000 + n for n in range(len(wanted))])
    return Figures(
        new_loss=denoising_loss(parts, HELD_OUT),
        old_loss=denoising_loss(parts, old_pictures()),
        score=mean_score(samples),
        samples=tuple(samples),
    )


def table(base: Figures, lora: Figures) -> str:
    """A Markdown table."""
    rows = [
        ("denoising loss, 6 held-out pictures of the new thing", base.new_loss, lora.new_loss),
        ("denoising loss, 20 pictures of the old things", base.old_loss, lora.old_loss),
        ("new thing in 20 samples, 0 to 1", base.score, lora.score),
    ]
    lines = [f"| {name} | {before:.4f} | {after:.4f} | {after - before:+.4f} |" for name, before, after in rows]
    return "\n".join(["| | base | LoRA | change |", "| --- | --- | --- | --- |", *lines])


def before_and_after(base: Figures, lora: Figures) -> Picture:
    """The first samples of both models: base above, LoRA under it, twice."""
    rows: list[Picture] = []
    for start in range(0, len(base.samples), GRID_COLUMNS):
        rows += base.samples[start : start + GRID_COLUMNS]
        rows += lora.samples[start : start + GRID_COLUMNS]
    return np.ascontiguousarray(grid(rows, GRID_COLUMNS))


def main(argv: list[str] | None = None) -> None:
    """Print the table and, if asked to, write the grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lora", type=Path, required=True, help="the weight file to judge")
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER)
    parser.add_argument("--grid", type=Path, help="where the before/after picture goes")
    arguments = parser.parse_args(argv)
    base, lora = figures(load_folder(arguments.model)), figures(load_with_lora(arguments.lora, arguments.model))
    print(table(base, lora))
    if arguments.grid:
        cv2.imwrite(str(arguments.grid), cv2.cvtColor(before_and_after(base, lora), cv2.COLOR_RGB2BGR))
        print(f"before and after: {arguments.grid}")


if __name__ == "__main__":
    main()
