"""U-Net, VAE and text encoder of an SD1 model, built on `meta` and filled from its files."""

from collections.abc import Iterable
from typing import Literal, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel

from library.models import folder, single_file
from library.models.inspect import FLAG, ModelInfo
from library.models.prompts import inner
from library.models.tensors import Source, fill

Part = Literal["unet", "vae", "text_encoder"]
PARTS: tuple[Part, ...] = ("unet", "vae", "text_encoder")


def build(info: ModelInfo, part: Part) -> torch.nn.Module:
    """The part's module without weights, on `meta`, and without dropout whatever its config says."""
    with torch.device("meta"):
        if part == "unet":
            return cast(torch.nn.Module, UNet2DConditionModel.from_config(info.unet_config | {"dropout": 0.0}))
        if part == "vae":
            return cast(torch.nn.Module, AutoencoderKL.from_config(info.vae_config))
        kept = {key: value for key, value in info.text_encoder_config.items() if key not in ("dtype", "torch_dtype")}
        return cast(torch.nn.Module, CLIPTextModel(CLIPTextConfig(**kept | {"attention_dropout": 0.0})))


def sources(info: ModelInfo, part: Part) -> Iterable[Source]:
    """Where the tensors of a part stand in the model's files."""
    if info.layout == "single_file":
        (header,) = info.headers[part]
        config = {"unet": info.unet_config, "vae": info.vae_config}.get(part, {})
        return single_file.sources(part, header, config)
    return (
        Source(folder.target_name(part, name), header.path, entry)
        for header in info.headers[part]
        for name, entry in header.entries.items()
    )


def load_part(info: ModelInfo, part: Part, *, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """The part with its weights, frozen, in eval mode. Convolutions are laid out channels last.

    Raises:
        UserError: as `tensors.fill`.
    """
    module = build(info, part)
    convolutional = part != "text_encoder"
    what = f"{FLAG} {info.path}"
    prefixed = _prefixed(sources(info, part), module) if part == "text_encoder" else sources(info, part)
    fill(module, prefixed, what=what, device=device, dtype=dtype, channels_last=convolutional)
    if part == "text_encoder":
        embeddings = inner(module).embeddings
        length = embeddings.position_embedding.num_embeddings
        embeddings.register_buffer("position_ids", torch.arange(length, device=device)[None], persistent=False)
    return module


def _prefixed(found: Iterable[Source], module: torch.nn.Module) -> Iterable[Source]:
    """Text encoder sources under the names of the installed transformers, with `text_model.` before 5.6."""
    prefix = "" if inner(module) is module else "text_model."
    return (Source(prefix + source.target, source.path, source.entry) for source in found)
