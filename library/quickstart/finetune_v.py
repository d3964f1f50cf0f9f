"""Teach the embedded base model to predict velocity: `python -m library.quickstart.finetune_v --out FOLDER`.

Seconds of work, for tests of what tells such a model from one that predicts noise. Only the U-Net is trained, on one
set of scenes; the pictures that it would draw are no matter here. Deterministic.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from library.quickstart.architecture import Parts, load_folder, save_folder
from library.quickstart.scenes import caption, draw, random_scene
from library.quickstart.train_unet import noise_and_timesteps
from library.quickstart.training_tools import SEED, learning_rate, to_tensor
from library.quickstart.words import tokens
from library.rng import rng

STEPS = 60
BATCH = 6
SCENES = 64
SIDE = 128
PEAK = 1e-3


@torch.no_grad()
def encode(parts: Parts) -> tuple[Tensor, Tensor]:
    """Scaled latents (n, 4, 16, 16) of scenes, and the text states (n, 77, 64) of their captions."""
    generator = rng(SEED, "order", "velocity", "scenes")
    scenes = [random_scene(generator) for _ in range(SCENES)]
    pictures = to_tensor([draw(scene, SIDE, SIDE) for scene in scenes])
    means = torch.cat([parts.vae.encode(chunk).latent_dist.mean for chunk in pictures.split(16)])
    words = parts.text_encoder(tokens([caption(scene) for scene in scenes])).last_hidden_state
    return means * parts.vae.config.scaling_factor, words


def finetune(parts: Parts, steps: int = STEPS) -> None:
    """Train the U-Net in place."""
    latents, words = encode(parts)
    with torch.no_grad():
        empty = parts.text_encoder(tokens([""])).last_hidden_state
    optimizer = torch.optim.AdamW(parts.unet.parameters(), lr=PEAK, betas=(0.9, 0.99), weight_decay=0.0)
    for step in tqdm(range(steps), desc="velocity", mininterval=10):
        chosen = torch.from_numpy(rng(SEED, "order", "velocity", step).integers(0, SCENES, BATCH))
        noise, timesteps = noise_and_timesteps((BATCH, *latents.shape[1:]), step)
        clean, states = latents[chosen], words[chosen].clone()
        states[:1] = empty
        noisy = parts.scheduler.add_noise(clean, noise, timesteps)
        target = parts.scheduler.get_velocity(clean, noise, timesteps)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, PEAK, warm_up=10)
        loss = functional.mse_loss(parts.unet(noisy, timesteps, states).sample, target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parts.unet.parameters(), 1.0)
        optimizer.step()


def save(folder: Path, parts: Parts) -> None:
    """Write the diffusers folder, whose scheduler says what it predicts."""
    save_folder(folder, parts.unet, parts.vae, parts.text_encoder)
    config = folder / "scheduler" / "scheduler_config.json"
    values = json.loads(config.read_text(encoding="utf-8")) | {"prediction_type": "v_prediction"}
    config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Finetune and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where the diffusers folder goes")
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args(argv)
    parts = load_folder()
    finetune(parts, arguments.steps)
    save(arguments.out, parts)


if __name__ == "__main__":
    main()
