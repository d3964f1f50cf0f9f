"""The embedded base model's architecture, and its folder in diffusers layout.

Every part is the class that Stable Diffusion 1 uses, only smaller. How the parts are trained is not said here.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from library.tokenizer import END_ID, START_ID, VOCABULARY_SIZE, write_folder
from library.tokenizer.vocabulary import PLAIN, Vocabulary

MODEL_FOLDER = Path(__file__).parent / "model"
TEXT_WIDTH = 64
TOKENS = 77
FACTOR = 8


@dataclass(frozen=True)
class Parts:
    """The four trained or built parts of the base model, and the tokens that its text encoder knows."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    scheduler: DDPMScheduler
    vocabulary: Vocabulary = PLAIN


def build_vae() -> AutoencoderKL:
    """About 1 M parameters; 8 px a latent cell, 4 latent channels."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=128,
    )


def build_unet() -> UNet2DConditionModel:
    """About 4.7 M parameters; cross attention on the two finer of three levels, and in the middle."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 96, 128),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=2,
        norm_num_groups=16,
        use_linear_projection=False,
    )


def build_text_encoder() -> CLIPTextModel:
    """Two layers of width 64, over CLIP's own vocabulary."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=VOCABULARY_SIZE,
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            hidden_act="quick_gelu",
            bos_token_id=START_ID,
            eos_token_id=END_ID,
            pad_token_id=END_ID,
        )
    )


_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
    "steps_offset": 1,
}


def build_scheduler() -> DDPMScheduler:
    """Stable Diffusion 1's noise schedule."""
    return DDPMScheduler(**_SCHEDULE)


def sampler() -> DDIMScheduler:
    """The sampler that the model's folder names."""
    return DDIMScheduler(**_SCHEDULE, set_alpha_to_one=False)


def save_folder(folder: Path, unet: UNet2DConditionModel, vae: AutoencoderKL, text_encoder: CLIPTextModel) -> None:
    """Write the diffusers folder with fp16 weights. The modules become fp16 in the process."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, module in (("unet", unet), ("vae", vae), ("text_encoder", text_encoder)):
        module.to(torch.float16).save_pretrained(folder / name, safe_serialization=True)
    config_file = folder / "text_encoder" / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["dtype"] = "float32"  # transformers would load fp16 unasked, and diffusers loads the U-Net in fp32
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    sampler().save_pretrained(folder / "scheduler")
    write_folder(folder / "tokenizer")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.42.0",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def load_folder(folder: Path = MODEL_FOLDER) -> Parts:
    """The parts in fp32 and eval mode."""
    return Parts(
        unet=UNet2DConditionModel.from_pretrained(folder / "unet").float().eval(),
        vae=AutoencoderKL.from_pretrained(folder / "vae").float().eval(),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder").float().eval(),
        scheduler=build_scheduler(),
    )
