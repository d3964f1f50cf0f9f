"""First half of the base model's training: the VAE, on scenes and on clutter drawn on the fly."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from library.quickstart.architecture import build_vae
from library.quickstart.scenes import draw, draw_clutter, random_scene
from library.quickstart.training_tools import (
    SEED,
    bucket_of,
    gaussian,
    learning_rate,
    load_checkpoint,
    save_checkpoint,
    to_tensor,
)
from library.rng import rng

STEPS = 2500
SMALL_STEPS = 1600
BATCH = 8
PEAK = 6e-4
QUIET_START = -6.0
KL_WEIGHT = 5e-5
EDGE_WEIGHT = 0.5
SQUARE_WEIGHT = 2.0
SAVE_EVERY = 200


def vae_batch(step: int) -> Tensor:
    """Half scenes, half clutter, all of one size; in the first steps half as wide and high, and twice as many."""
    width, height = bucket_of("vae", step)
    count = BATCH
    if step < SMALL_STEPS:
        width, height, count = width // 2, height // 2, 2 * count
    generator = rng(SEED, "order", "vae", step)
    pictures = [
        draw(random_scene(generator), width, height) if n % 2 else draw_clutter(generator, width, height)
        for n in range(count)
    ]
    return to_tensor(pictures)


def _edges(pictures: Tensor) -> tuple[Tensor, Tensor]:
    return pictures.diff(dim=2), pictures.diff(dim=3)


def vae_loss(vae: AutoencoderKL, pictures: Tensor, step: int) -> tuple[Tensor, float]:
    """The loss, and its part in colour for the log.

    L1 and squared error of colours, later L1 of edges too, plus a light pull towards a normal prior.
    """
    with torch.autocast("cpu", dtype=torch.bfloat16):
        moments = vae.quant_conv(vae.encoder(pictures)).float()
        mean, log_variance = moments.chunk(2, dim=1)
        log_variance = log_variance.clamp(-30, 20)
        noise = gaussian(rng(SEED, "posterior", "vae", step), tuple(mean.shape))
        decoded = vae.decode(mean + (log_variance / 2).exp() * noise).sample.float()
    colour = functional.l1_loss(decoded, pictures)
    edge = sum(
        (functional.l1_loss(a, b) for a, b in zip(_edges(decoded), _edges(pictures), strict=True)), torch.zeros(())
    )
    square = functional.mse_loss(decoded, pictures)
    edge_weight = 0.0 if step < SMALL_STEPS else EDGE_WEIGHT
    prior = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return colour + SQUARE_WEIGHT * square + edge_weight * edge + KL_WEIGHT * prior, colour.item()


def train_vae(scratch: Path, steps: int = STEPS) -> AutoencoderKL:
    """Train, or continue from the scratch folder's checkpoint."""
    torch.manual_seed(SEED)
    vae = build_vae()
    with torch.no_grad():
        vae.quant_conv.bias[vae.config.latent_channels :] = QUIET_START
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), weight_decay=1e-3)
    checkpoint = scratch / "vae.pt"
    state = load_checkpoint(checkpoint)
    start = 0
    if state is not None:
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    vae.train()
    recent = 0.1
    with tqdm(total=steps, initial=start, desc="VAE", mininterval=20, maxinterval=30) as progress:
        for step in range(start, steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, PEAK, cool_down=0.2)
            loss, colour = vae_loss(vae, vae_batch(step), step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            recent += 0.02 * (colour - recent)
            progress.set_postfix(l1=f"{recent:.4f}", refresh=False)
            progress.update()
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
                save_checkpoint(
                    checkpoint, {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                )
    return vae.eval()
