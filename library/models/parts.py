"""U-Net, VAE and text encoders of any family, built on `meta` and filled from their files."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection

from library.models import folder, single_file
from library.models.families import Part
from library.models.info import ModelInfo
from library.models.prompts import inner
from library.models.tensors import Source, fill

_PROJECTION = "text_projection."


def build(info: ModelInfo, part: Part) -> torch.nn.Module:
    """The part's module without weights, on `meta`, and without dropout whatever its config says."""
    config = info.parts[part].config
    with torch.device("meta"):
        if part == "unet":
            return cast(torch.nn.Module, UNet2DConditionModel.from_config(config | {"dropout": 0.0}))
        if part == "vae":
            return cast(torch.nn.Module, AutoencoderKL.from_config(config))
        kept = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
        text_config = CLIPTextConfig(**kept | {"attention_dropout": 0.0})
        encoder = next(encoder for encoder in info.family.text_encoders if encoder.part == part)
        kind = CLIPTextModelWithProjection if encoder.projects else CLIPTextModel
        return cast(torch.nn.Module, kind(text_config))


def sources(info: ModelInfo, part: Part, module: torch.nn.Module) -> Iterable[Source]:
    """Where the tensors of a part stand in the model's files, by the names that `module` has for them."""
    held = info.parts[part]
    found = single_file.sources(info.family, part, held, module) if held.original else _stored(info, part)
    return found if part in ("unet", "vae") else _levelled(found, module)


def _stored(info: ModelInfo, part: Part) -> Iterable[Source]:
    """The tensors of files that have the names of diffusers and transformers already, or had them once."""
    held = info.parts[part]
    for header in held.headers:
        for name, entry in header.entries.items():
            if name.startswith(held.prefix):
                yield Source(folder.target_name(part, name.removeprefix(held.prefix)), header.path, entry, name)


def _levelled(found: Iterable[Source], module: torch.nn.Module) -> Iterable[Source]:
    """Text encoder sources with the level `text_model.` where the module has one, whether or not the files do."""
    level = "" if inner(module) is module else "text_model."
    for source in found:
        name = source.target.removeprefix("text_model.")
        yield replace(source, target=name if name.startswith(_PROJECTION) else level + name)


def load_part(info: ModelInfo, part: Part, *, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """The part with its weights, frozen, in eval mode. Convolutions are laid out channels last.

    Raises:
        UserError: as `tensors.fill`.
    """
    module = build(info, part)
    convolutional = part in ("unet", "vae")
    fill(
        module,
        sources(info, part, module),
        what=info.parts[part].where,
        device=device,
        dtype=dtype,
        channels_last=convolutional,
    )
    if not convolutional:
        embeddings: Any = inner(module).embeddings
        length = embeddings.position_embedding.num_embeddings
        embeddings.register_buffer("position_ids", torch.arange(length, device=device)[None], persistent=False)
    return module
