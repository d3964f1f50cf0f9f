"""Builders of tiny models with the true layout of each family, random weights, fixed by a seed.

Heads and norm groups are those that a single file's derived configs have, so that folder and file are one model.
"""

from pathlib import Path
from typing import Any, Literal

Prediction = Literal["epsilon", "v_prediction"]
_VOCABULARY = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407}


def save_tiny_sd1(folder: Path, seed: int = 0, prediction_type: Prediction = "epsilon") -> None:
    """Write a diffusers folder: SD1 U-Net (32, 64, 64, 64), VAE of factor 8, CLIP of width 32, 5 layers."""
    import torch

    torch.manual_seed(seed)
    unet = _unet(
        block_out_channels=(32, 64, 64, 64),
        cross_attention_dim=32,
        attention_head_dim=8,
    )
    text = _text(32, heads=1, act="quick_gelu", pad=49407)
    _save_single_encoder(folder, unet, text, _scheduler(prediction_type))


def save_tiny_sd2(folder: Path, seed: int = 0, prediction_type: Prediction = "v_prediction") -> None:
    """Write a diffusers folder: SD2 U-Net (32, 64, 64, 128) with linear projections, CLIP of width 64 as OpenCLIP's."""
    import torch

    torch.manual_seed(seed)
    unet = _unet(
        block_out_channels=(32, 64, 64, 128),
        cross_attention_dim=64,
        attention_head_dim=(1, 1, 1, 2),
        use_linear_projection=True,
    )
    text = _text(64, heads=1, act="gelu", pad=0)
    _save_single_encoder(folder, unet, text, _scheduler(prediction_type))


def save_tiny_sdxl(folder: Path, seed: int = 0, prediction_type: Prediction = "epsilon") -> None:
    """Write a diffusers folder: SDXL U-Net (32, 64, 64) with depths 1, 2, 3; text widths 32 and 64, projection 48."""
    import torch
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

    torch.manual_seed(seed)
    unet = _unet(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 3),
        cross_attention_dim=96,
        attention_head_dim=(1, 1, 1),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=48 + 6 * 8,
    )
    pipeline = StableDiffusionXLPipeline(
        vae=_vae(scaling_factor=0.13025),
        text_encoder=_text(32, heads=1, act="quick_gelu", pad=49407),
        text_encoder_2=_text(64, heads=1, act="gelu", pad=0, projection=48),
        tokenizer=_tokenizer(folder, "tokenizer", "<|endoftext|>"),
        tokenizer_2=_tokenizer(folder, "tokenizer_2", "!"),
        unet=unet,
        scheduler=_scheduler(prediction_type),
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)


def _unet(**config: Any) -> Any:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return UNet2DConditionModel(sample_size=8, layers_per_block=2, norm_num_groups=8, **config)


def _vae(scaling_factor: float = 0.18215) -> Any:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(32, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=64,
        scaling_factor=scaling_factor,
    )


def _text(width: int, *, heads: int, act: str, pad: int, projection: int | None = None) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=width,
        num_hidden_layers=5,
        num_attention_heads=heads,
        intermediate_size=2 * width,
        hidden_act=act,
        pad_token_id=pad,
        projection_dim=projection or width,
        **_VOCABULARY,
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def _scheduler(prediction_type: Prediction) -> Any:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )


def _tokenizer(folder: Path, name: str, pad: str) -> Any:
    from transformers import CLIPTokenizer

    from library.tokenizer import write_folder

    write_folder(folder / name)
    return CLIPTokenizer.from_pretrained(folder / name, pad_token=pad)


def _save_single_encoder(folder: Path, unet: Any, text_encoder: Any, scheduler: Any) -> None:
    """A folder of a family with one text encoder; the padding token is the encoder's own."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    pad = "!" if text_encoder.config.pad_token_id == 0 else "<|endoftext|>"
    pipeline = StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=text_encoder,
        tokenizer=_tokenizer(folder, "tokenizer", pad),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
