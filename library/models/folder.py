"""Diffusers folders: their configs, which weight file of a part is taken, and what old folders call their tensors.

Torch-free. Which file is taken follows from the names that are there, so that a download fetches the same ones:
`.safetensors` before pickles; the plain one, then fp16, then bf16, or only the variant that was asked for.
"""

import json
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.models import recognise
from library.models.families import SD1, SD2, SDXL, Family, Part
from library.models.headers import Header
from library.models.pickles import read_weights

PARTS: tuple[Part, ...] = ("unet", "vae", "text_encoder", "text_encoder_2")
_DIFFUSERS = (("diffusion_pytorch_model", "safetensors"), ("diffusion_pytorch_model", "bin"))
_TRANSFORMERS = (("model", "safetensors"), ("pytorch_model", "bin"))
_VARIANTS = ("", "fp16", "bf16")
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
SCHEDULER = "scheduler/scheduler_config.json"
INDEX = "model_index.json"
_WHOLE = "download the whole model"
_LOOKED_AT = 40
_ADAPTER_FILES = ("pytorch_lora_weights", "adapter_model", "adapter_config")
_ALONE = {
    "AutoencoderKL": recognise.VAE_ALONE,
    "UNet2DConditionModel": recognise.UNET_ALONE,
    "ControlNetModel": recognise.CONTROLNET,
    "CLIPTextModel": recognise.TEXT_ALONE,
    "CLIPTextModelWithProjection": recognise.TEXT_ALONE,
    "CLIPModel": recognise.TEXT_ALONE,
}


def read_configs(path: Path, flag: str) -> dict[str, dict[str, Any]]:
    """The JSON of a folder: `index`, `scheduler` and the parts by name; {} where there is none.

    Raises:
        UserError: not a diffusers folder, or a JSON file that can't be read.
    """
    if not (path / INDEX).is_file() and not (path / "unet" / "config.json").is_file():
        raise _no_model(path, flag)
    files = {"index": INDEX, "scheduler": SCHEDULER} | {str(part): f"{part}/config.json" for part in PARTS}
    return {part: read_json(path / name, flag) for part, name in files.items()}


def _no_model(path: Path, flag: str) -> UserError:
    """What a folder is that holds no diffusers model; a file in it is offered only if it is a base model."""
    names = sorted(entry.name for entry in path.iterdir() if entry.is_file())
    kinds = dict(_kinds(path, names))
    wrong = f"{path} is a folder, but not a diffusers model folder"
    if base := next((name for name, kind in kinds.items() if isinstance(kind, Family)), None):
        return UserError.single(flag, wrong, f"did you mean {path / base}?")
    advice = f"did you mean {path.parent}?" if (path.parent / INDEX).is_file() else recognise.SUPPORTED
    config = read_json(path / "config.json", flag)
    classes = [config.get("_class_name"), *(config.get("architectures") or ())]
    alone = next((_ALONE[str(name)] for name in classes if str(name) in _ALONE), None)
    if alone is None and not kinds and any(name.startswith(_ADAPTER_FILES) for name in names):
        alone = recognise.ADAPTER
    if alone:
        return UserError.single(flag, f"{path} is {alone}", advice)
    for name, kind in kinds.items():
        return UserError.single(flag, f"{path} is not a diffusers model folder, and {name} in it is {kind}", advice)
    return UserError.single(flag, wrong, "give a folder with model_index.json and unet/, or one .safetensors file")


def _kinds(path: Path, names: Iterable[str]) -> Iterator[tuple[str, Family | str]]:
    """What the weight files of a folder are, by their headers; damaged ones are passed over."""
    files = [name for name in names if name.endswith((".safetensors", ".ckpt"))]
    for name in files[:_LOOKED_AT]:
        try:
            yield name, recognise.family_or_kind(read_weights(path / name, str(path / name)))
        except UserError:
            continue


def read_json(path: Path, flag: str) -> dict[str, Any]:
    """A JSON object; {} where there is no such file.

    Raises:
        UserError: it can't be read.
    """
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError.single(flag, f"{path} can't be read as JSON ({error})") from error
    if not isinstance(values, dict):
        raise UserError.single(flag, f"{path} holds no JSON object")
    return values


def family_or_kind(configs: dict[str, dict[str, Any]]) -> Family | str:
    """The family of a base model in a folder, with or without VAE and text encoders; else what it is."""
    index, unet = configs["index"], configs["unet"]
    name = str(index.get("_class_name", ""))
    if name.startswith("Flux"):
        return "a Flux model"
    if name.startswith("StableDiffusion3"):
        return "a Stable Diffusion 3 model"
    if not unet:
        return f"a diffusers folder without unet/config.json ({name or 'no model_index.json'})"
    if strange := recognise.strange_channels(int(unet.get("in_channels", 4))):
        return strange
    family = family_of_latents(configs)
    if family is None:
        return "a model of an unknown family (its U-Net takes more than noise, time and text)"
    first = index.get("text_encoder", True)
    if family is SDXL and (not first or first == [None, None]):
        return "an SDXL refiner"
    if family is not SDXL and ("XL" in name or "text_encoder_2" in index):
        return "a model of an unknown family (two text encoders, but a U-Net for one)"
    return family


def family_of_latents(configs: dict[str, dict[str, Any]]) -> Family | None:
    """The family whose latents a whole model's VAE makes, also of one that can't be trained on, such as a refiner; None
    without a U-Net's config, and where it isn't known."""
    unet, text = configs["unet"], configs["text_encoder"]
    if unet.get("addition_embed_type") == "text_time":
        return SDXL
    if not unet or unet.get("class_embed_type") or unet.get("num_class_embeds") or unet.get("addition_embed_type"):
        return None
    if unet.get("use_linear_projection") or text.get("hidden_act") == "gelu" or unet.get("cross_attention_dim") == 1024:
        return SD2
    return SD1


def weight_file(names: Collection[str], part: Part, variant: str | None) -> str | None:
    """Which of the files of a part's folder holds its weights, or the index of those that do; None if none does.

    Args:
        variant: such as fp16; None takes what there is, the plain one first.
    """
    return next((name for name in _candidates(part, variant) if name in names), None)


def _candidates(part: Part, variant: str | None) -> Iterator[str]:
    for stem, ending in _DIFFUSERS if part in ("unet", "vae") else _TRANSFORMERS:
        for kind in _VARIANTS if variant is None else (variant,):
            middle = f".{kind}" if kind else ""
            yield f"{stem}{middle}.{ending}"
            yield f"{stem}.{ending}.index{middle}.json"


def weight_headers(place: Path, part: Part, variant: str | None, flag: str) -> tuple[Header, ...]:
    """The checked headers of the files in `place` that hold a part's weights.

    Raises:
        UserError: no weights there, or not of this variant, a shard is missing, or a file is damaged.
    """
    names = {entry.name for entry in place.iterdir()} if place.is_dir() else set[str]()
    chosen = weight_file(names, part, variant)
    if chosen is None:
        raise _no_weights(place, part, variant, names, flag)
    if not chosen.endswith(".json"):
        return (read_weights(place / chosen, f"{flag} {place / chosen}"),)
    missing = [name for name in shards(place / chosen, flag) if name not in names]
    if missing:
        raise UserError.single(flag, f"{place} lacks {missing[0]}, a piece of its weights", _WHOLE)
    return tuple(read_weights(place / name, f"{flag} {place / name}") for name in shards(place / chosen, flag))


def shards(index: Path, flag: str) -> list[str]:
    """The files that an index names, all in its own folder.

    Raises:
        UserError: the index can't be read, or names files elsewhere.
    """
    table = read_json(index, flag).get("weight_map")
    names = sorted(set(map(str, table.values()))) if isinstance(table, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise UserError.single(flag, f"{index} names no files of weights", _WHOLE)
    return names


def _no_weights(place: Path, part: Part, variant: str | None, names: Iterable[str], flag: str) -> UserError:
    there = sorted(name for name in names if name.endswith((".safetensors", ".bin", ".ckpt", ".msgpack")))
    if variant is None or not there:
        wrong = f"{place} holds no {next(_candidates(part, None))}" + (f", only {', '.join(there)}" if there else "")
        return UserError.single(flag, wrong, _WHOLE)
    wrong = f"{place} holds no weights of the variant {variant}"
    return UserError.single("--variant", wrong, f"there is {', '.join(there)}")


def target_name(part: str, stored: str) -> str:
    """What the module of today calls a stored tensor: without `text_model.`, with today's names of VAE attention."""
    if part == "text_encoder":
        return stored.removeprefix("text_model.")
    pieces = stored.split(".")
    if part == "vae" and "attentions" in pieces and pieces[-2] in _OLD_ATTENTION:
        return ".".join([*pieces[:-2], _OLD_ATTENTION[pieces[-2]], pieces[-1]])
    return stored
