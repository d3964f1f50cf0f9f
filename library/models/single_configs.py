"""The configs of a single file: the packaged ones of its family, with the sizes that its tensors have; torch-free."""

import json
from pathlib import Path
from typing import Any

from library.models.headers import Header
from library.models.recognise import UNET, VAE, context_width, text_key

_PACKAGED = Path(__file__).parent / "configs"
_CROSS_DOWN, _DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
_CROSS_UP, _UP = "CrossAttnUpBlock2D", "UpBlock2D"
_HEAD_WIDTH = 64


def packaged(family: str, part: str) -> dict[str, Any]:
    """A packaged config: part is `unet`, `vae`, `text_encoder` or `scheduler`."""
    config: dict[str, Any] = json.loads((_PACKAGED / family / f"{part}.json").read_text(encoding="utf-8"))
    return config


def unet_config(header: Header) -> dict[str, Any]:
    """Widths, levels, layers per level and attention as the file has them; heads and norm groups as in SD1."""
    levels: list[list[int]] = [[]]
    attends: list[bool] = []
    block = 1
    while header.any(f"{UNET}input_blocks.{block}."):
        if header.shape(f"{UNET}input_blocks.{block}.0.op.weight"):
            levels.append([])
        else:
            if not levels[-1]:
                attends.append(bool(header.shape(f"{UNET}input_blocks.{block}.1.proj_in.weight")))
            levels[-1].append((header.shape(f"{UNET}input_blocks.{block}.0.out_layers.3.weight") or (0,))[0])
        block += 1
    config = packaged("sd1", "unet")
    return config | {
        "block_out_channels": [widths[0] for widths in levels if widths],
        "layers_per_block": len(levels[0]),
        "cross_attention_dim": context_width(header),
        "in_channels": header.shape(f"{UNET}input_blocks.0.0.weight")[1],
        "out_channels": (header.shape(f"{UNET}out.2.weight") or (config["out_channels"],))[0],
        "down_block_types": [_CROSS_DOWN if has else _DOWN for has in attends],
        "up_block_types": [_CROSS_UP if has else _UP for has in reversed(attends)],
    }


def vae_config(header: Header) -> dict[str, Any]:
    """Widths, levels and latent channels as the file has them."""
    widths: list[int] = []
    while shape := header.shape(f"{VAE}encoder.down.{len(widths)}.block.0.conv1.weight"):
        widths.append(shape[0])
    layers = 0
    while header.shape(f"{VAE}encoder.down.0.block.{layers}.conv1.weight"):
        layers += 1
    config = packaged("sd1", "vae")
    return config | {
        "block_out_channels": widths,
        "layers_per_block": layers,
        "latent_channels": (header.shape(f"{VAE}decoder.conv_in.weight") or (0, config["latent_channels"]))[1],
        "down_block_types": config["down_block_types"][:1] * len(widths),
        "up_block_types": config["up_block_types"][:1] * len(widths),
    }


def text_encoder_config(header: Header) -> dict[str, Any]:
    """Width, depth and vocabulary as the file has them; heads of 64, as every CLIP has them."""
    vocabulary, width = header.shape(text_key(header, "embeddings.token_embedding.weight"))
    layers = 0
    while header.shape(text_key(header, f"encoder.layers.{layers}.mlp.fc1.weight")):
        layers += 1
    inner = header.shape(text_key(header, "encoder.layers.0.mlp.fc1.weight")) or (4 * width,)
    config = packaged("sd1", "text_encoder")
    return config | {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "projection_dim": width,
        "num_hidden_layers": layers,
        "intermediate_size": inner[0],
        "num_attention_heads": max(1, width // _HEAD_WIDTH),
    }


def scheduler_config(header: Header) -> tuple[dict[str, Any], bool]:
    """The noise schedule, and whether the file itself tells its prediction type.

    Evidence are the marker tensors `v_pred` and `ztsnr` and the metadata `modelspec.prediction_type`.
    """
    config = packaged("sd1", "scheduler")
    told = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon"}.get(
        header.metadata.get("modelspec.prediction_type", "")
    )
    if "v_pred" in header.entries:
        told = "v_prediction"
    config["prediction_type"] = told or "epsilon"
    config["rescale_betas_zero_snr"] = "ztsnr" in header.entries
    return config, told is not None
