"""Diffusers folders: their configs, which weight file of a part is taken, and what old folders call their tensors.

Torch-free. Weights are taken from `.safetensors` files only: the plain one, a sharded one, or the fp16 variant.
"""

import json
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.models.headers import Header, read_header

_STEM = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
_VARIANTS = ("", ".fp16", ".bf16")
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def read_configs(path: Path, flag: str) -> dict[str, dict[str, Any]]:
    """The JSON of a folder by part: `index`, `unet`, `vae`, `text_encoder`, `scheduler`; {} where a part has none.

    Raises:
        UserError: not a diffusers folder, or a JSON file that can't be read.
    """
    if not (path / "model_index.json").is_file() and not (path / "unet" / "config.json").is_file():
        advice = "give a folder with model_index.json and unet/, or one .safetensors file"
        inside = sorted(entry.name for entry in path.iterdir() if entry.suffix == ".safetensors")
        if (path.parent / "model_index.json").is_file():
            advice = f"did you mean {path.parent}?"
        elif inside:
            advice = f"did you mean {path / inside[0]}?"
        raise UserError.single(flag, f"{path} is a folder, but not a diffusers model folder", advice)
    files = {
        "index": "model_index.json",
        "unet": "unet/config.json",
        "vae": "vae/config.json",
        "text_encoder": "text_encoder/config.json",
        "scheduler": "scheduler/scheduler_config.json",
    }
    return {part: _json(path / name, flag) for part, name in files.items()}


def _json(path: Path, flag: str) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError.single(flag, f"{path} can't be read as JSON ({error})") from error
    if not isinstance(values, dict):
        raise UserError.single(flag, f"{path} holds no JSON object")
    return values


def foreign_kind(configs: dict[str, dict[str, Any]]) -> str | None:
    """What this folder is, if it is anything but an SD1 base model (`an SDXL model`); else None."""
    index, unet, text = configs["index"], configs["unet"], configs["text_encoder"]
    name = str(index.get("_class_name", ""))
    if name.startswith("Flux"):
        return "a Flux model"
    if name.startswith("StableDiffusion3"):
        return "a Stable Diffusion 3 model"
    if not unet:
        return f"a diffusers folder without unet/config.json ({name or 'no model_index.json'})"
    if unet.get("addition_embed_type") == "text_time" or "XL" in name or "text_encoder_2" in index:
        return "an SDXL refiner" if "text_encoder" in index and not index["text_encoder"][0] else "an SDXL model"
    channels = unet.get("in_channels", 4)
    if channels == 9:
        return "an inpainting model (its U-Net takes 9 channels)"
    if channels == 8:
        return "an image-editing model (its U-Net takes 8 channels, as InstructPix2Pix does)"
    if unet.get("use_linear_projection") or text.get("hidden_act") == "gelu":
        return "an SD2 model (Stable Diffusion 2.x)"
    if unet.get("class_embed_type") or unet.get("num_class_embeds") or unet.get("addition_embed_type"):
        return "a model of an unknown family (its U-Net takes more than noise, time and text)"
    if channels != 4:
        return f"a model of an unknown family (its U-Net takes {channels} channels)"
    missing = [part for part in ("vae", "text_encoder") if not configs[part]]
    if missing:
        return f"a diffusers folder without {' and '.join(f'{part}/config.json' for part in missing)}"
    return None


def weight_headers(path: Path, part: str, flag: str) -> tuple[Header, ...]:
    """The checked headers of the files that hold a part's weights.

    Raises:
        UserError: no `.safetensors` there, a shard is missing, or a file is damaged.
    """
    place, stem = path / part, _STEM[part]
    for variant in _VARIANTS:
        index = place / f"{stem}.safetensors.index{variant}.json"
        single = place / f"{stem}{variant}.safetensors"
        if single.is_file():
            return (read_header(single, f"{flag} {single}"),)
        if index.is_file():
            shards = sorted({str(name) for name in _json(index, flag).get("weight_map", {}).values()})
            return tuple(read_header(place / name, f"{flag} {place / name}") for name in shards)
    pickles = [*place.glob("*.bin"), *place.glob("*.ckpt")]
    if pickles:
        wrong = f"{place} holds its weights as a PyTorch pickle ({pickles[0].name})"
        raise UserError.single(flag, wrong, "save the model with safe_serialization=True, as .safetensors")
    raise UserError.single(flag, f"{place} holds no {stem}.safetensors", "download the whole model")


def target_name(part: str, stored: str) -> str:
    """What the module of today calls a stored tensor: without `text_model.`, with today's names of VAE attention."""
    if part == "text_encoder":
        return stored.removeprefix("text_model.")
    pieces = stored.split(".")
    if part == "vae" and "attentions" in pieces and pieces[-2] in _OLD_ATTENTION:
        return ".".join([*pieces[:-2], _OLD_ATTENTION[pieces[-2]], pieces[-1]])
    return stored
