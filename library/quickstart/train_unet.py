"""Second half of the base model's training: U-Net and text encoder together, on latents encoded once.

Flat backgrounds leak through a noise schedule that never reaches pure noise, so a model could read the background from
the noisy latents' mean instead of the prompt. Two things teach it to read: a noise offset of random strength, which
makes that mean worthless, and timesteps drawn towards the noisy end.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import CLIPTextModel

from library.quickstart.architecture import build_scheduler, build_text_encoder, build_unet
from library.quickstart.scenes import BUCKETS, JITTER, Scene, caption, draw, random_scene
from library.quickstart.training_tools import (
    SEED,
    bucket_of,
    gaussian,
    learning_rate,
    load_checkpoint,
    save_checkpoint,
    to_tensor,
)
from library.quickstart.words import tokens
from library.rng import rng

LOOSE_STEPS = 4100
TIGHT_STEPS = 3000
FINISH_STEPS = 800
FINISH_AT = LOOSE_STEPS + TIGHT_STEPS
STEPS = FINISH_AT + FINISH_STEPS
HARD_SHARE = 0.5
BATCH = 24
PEAK = 6e-4
COOL_DOWN = 0.25
WORDS_LOUDER_AT = 2000
WORDS_LOUDER = 40.0
NOISE_OFFSET = 0.4
EMPTY_CAPTIONS = 0.1
EMA = 0.998
SAVE_EVERY = 200


@dataclass(frozen=True)
class Lesson:
    """The scenes of one stretch of the training: how far they are moved, and how many a size."""

    name: str
    jitter: float
    square_scenes: int
    other_scenes: int


LOOSE = Lesson("loose", jitter=1.0, square_scenes=5120, other_scenes=512)
TIGHT = Lesson("tight", jitter=JITTER, square_scenes=3072, other_scenes=512)


@dataclass(frozen=True)
class Encoded:
    """Scenes of one size with their scaled latents, float32 (n, 4, height, width)."""

    scenes: tuple[Scene, ...]
    latents: Tensor

    @cached_property
    def hard(self) -> list[int]:
        """Scenes whose shape is learned last: stars, and whatever is small."""
        return [n for n, scene in enumerate(self.scenes) if scene.shape == "star" or scene.size == "small"]


@torch.no_grad()
def measure_scale(vae: AutoencoderKL) -> float:
    """1 / standard deviation of the latents of 256 scenes: what the VAE's config calls scaling_factor."""
    generator = rng(SEED, "order", "scale")
    pictures = [draw(random_scene(generator), 128, 128) for _ in range(256)]
    means = [vae.encode(to_tensor(pictures[n : n + 16])).latent_dist.mean for n in range(0, 256, 16)]
    return round(1 / torch.cat(means).std().item(), 5)


@torch.no_grad()
def encode_scenes(vae: AutoencoderKL, lesson: Lesson, scratch: Path) -> dict[tuple[int, int], Encoded]:
    """A lesson's scenes of every size; latents are kept in the scratch folder."""
    scale = vae.config.scaling_factor
    encoded = {}
    for width, height in BUCKETS:
        count = lesson.square_scenes if width == height else lesson.other_scenes
        generator = rng(SEED, "order", "scenes", width, height)
        scenes = tuple(random_scene(generator) for _ in range(count))
        path = scratch / f"latents_{lesson.name}_{width}x{height}.pt"
        stored = load_checkpoint(path)
        if stored is None:
            rows = []
            for start in tqdm(range(0, count, 16), desc=f"latents {width}x{height}", mininterval=10):
                batch = [draw(scene, width, height, lesson.jitter) for scene in scenes[start : start + 16]]
                rows.append(vae.encode(to_tensor(batch)).latent_dist.mean * scale)
            stored = {"latents": torch.cat(rows)}
            save_checkpoint(path, stored)
        encoded[width, height] = Encoded(scenes, stored["latents"])
    return encoded


def planned_rate(step: int) -> float:
    """Each stretch has its own rise, plateau and fall."""
    if step < LOOSE_STEPS:
        return learning_rate(step, LOOSE_STEPS, PEAK, cool_down=COOL_DOWN)
    if step < FINISH_AT:
        return learning_rate(step - LOOSE_STEPS, TIGHT_STEPS, PEAK, cool_down=COOL_DOWN)
    return learning_rate(step - FINISH_AT, FINISH_STEPS, PEAK, cool_down=2 * COOL_DOWN)


def unet_batch(encoded: dict[tuple[int, int], Encoded], step: int) -> tuple[Tensor, Tensor]:
    """Latents and token ids of one step; some captions leave out size or place, some are empty.

    The last stretch takes half of its scenes from the hard ones.
    """
    pool = encoded[bucket_of("unet", step)]
    generator = rng(SEED, "order", "unet", step)
    chosen = generator.integers(0, len(pool.scenes), BATCH)
    if step >= FINISH_AT:
        hard = int(HARD_SHARE * BATCH)
        chosen[:hard] = generator.choice(pool.hard, hard)
    words = rng(SEED, "caption", step).random((BATCH, 3))
    captions = [
        ""
        if empty < EMPTY_CAPTIONS
        else caption(pool.scenes[index], say_size=bool(size > 0.15), say_place=bool(place > 0.1))
        for index, (empty, size, place) in zip(chosen.tolist(), words, strict=True)
    ]
    return pool.latents[torch.from_numpy(chosen)], tokens(captions)


def noise_and_timesteps(shape: tuple[int, ...], step: int) -> tuple[Tensor, Tensor]:
    """Noise with an offset of random strength a sample, and timesteps 1000 sqrt(u)."""
    noise = gaussian(rng(SEED, "noise", "base", step), shape)
    offset = gaussian(rng(SEED, "noise", "offset", step), (shape[0], shape[1], 1, 1))
    draws = rng(SEED, "timestep", step)
    strength = torch.from_numpy(draws.random((shape[0], 1, 1, 1), dtype=np.float32)) * NOISE_OFFSET
    timesteps = torch.from_numpy(np.minimum(1000 * np.sqrt(draws.random(shape[0])), 999).astype(np.int64))
    return noise + strength * offset, timesteps


def loss_weights(schedule: DDPMScheduler) -> Tensor:
    """(1000,): 1 / sqrt(signal to noise), so that the noisy end, where only the words tell, counts for more."""
    kept = schedule.alphas_cumprod
    return ((1 - kept) / kept).sqrt()


@torch.no_grad()
def make_words_louder(weights: dict[str, Tensor]) -> None:
    """Multiply token and position embeddings, in place.

    The first layer's normalisation hides the factor from attention, but in the residual stream a word is no longer
    drowned by what attention adds: before, words for shapes and places left no trace at the last layer.
    """
    for name, value in weights.items():
        if name.endswith(("token_embedding.weight", "position_embedding.weight")):
            value.mul_(WORDS_LOUDER)


def build_pair() -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Freshly initialised U-Net and text encoder."""
    torch.manual_seed(SEED)
    return build_unet(), build_text_encoder()


def train_unet(vae: AutoencoderKL, scratch: Path, stop_at: int = STEPS) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Train, or continue from the scratch folder's checkpoint; the averaged (EMA) weights are returned.

    `stop_at` ends early, to look at the model half-way.
    """
    unet, text_encoder = build_pair()
    both = nn.ModuleList([unet, text_encoder])
    average = {name: value.detach().clone() for name, value in both.state_dict().items()}
    groups = [
        {"params": list(unet.parameters()), "weight_decay": 1e-3},
        {"params": list(text_encoder.parameters()), "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True)
    schedule = build_scheduler()
    weights = loss_weights(schedule)
    checkpoint = scratch / "unet.pt"
    state = load_checkpoint(checkpoint)
    start = 0
    if state is not None:
        both.load_state_dict(state["model"])
        average = state["average"]
        optimizer.load_state_dict(state["optimizer"])
        for group in optimizer.param_groups:
            group.update(foreach=None, fused=True)
        start = state["step"]
    both.train()
    encoded = encode_scenes(vae, LOOSE if start < LOOSE_STEPS else TIGHT, scratch)
    floating = [name for name, value in average.items() if value.is_floating_point()]
    recent = 0.3
    with tqdm(total=stop_at, initial=start, desc="U-Net", mininterval=20, maxinterval=30) as progress:
        for step in range(start, stop_at):
            if step == LOOSE_STEPS:
                encoded = encode_scenes(vae, TIGHT, scratch)
            for group in optimizer.param_groups:
                group["lr"] = planned_rate(step)
            if step == WORDS_LOUDER_AT:
                make_words_louder(both.state_dict())
                make_words_louder(average)
            latents, ids = unet_batch(encoded, step)
            noise, timesteps = noise_and_timesteps(tuple(latents.shape), step)
            noisy = schedule.add_noise(latents, noise, timesteps)
            words = text_encoder(ids).last_hidden_state
            with torch.autocast("cpu", dtype=torch.bfloat16):
                predicted = unet(noisy, timesteps, words).sample
            errors = functional.mse_loss(predicted.float(), noise, reduction="none").mean(dim=(1, 2, 3))
            loss = (errors * weights[timesteps] if step >= WORDS_LOUDER_AT else errors).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
            optimizer.step()
            decay = min(EMA, (1 + step) / (10 + step))
            current = both.state_dict()
            torch._foreach_lerp_([average[n] for n in floating], [current[n] for n in floating], 1 - decay)
            recent += 0.02 * (loss.item() - recent)
            progress.set_postfix(loss=f"{recent:.4f}", refresh=False)
            progress.update()
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == stop_at:
                state = {"model": both.state_dict(), "average": average, "optimizer": optimizer.state_dict()}
                save_checkpoint(checkpoint, {**state, "step": step + 1})
    both.load_state_dict(average)
    both.eval()
    return unet, text_encoder
