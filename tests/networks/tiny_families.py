"""The tiny models of every family, frozen, and one forward through all their parts, for tests of networks."""

import copy
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

FAMILIES = ("sd1", "sd2", "sdxl")
Finder = Callable[[str], Path]


def load_unet(folder: Path) -> nn.Module:
    """A frozen U-Net of this caller's own."""
    return copy.deepcopy(_unet(folder))


def load_text_encoder(folder: Path) -> Any:
    """The frozen text encoder; of SDXL the list of both, as network modules get them."""
    return copy.deepcopy(_text_encoder(folder))


@lru_cache
def _unet(folder: Path) -> nn.Module:
    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet").requires_grad_(False)


@lru_cache
def _text_encoder(folder: Path) -> Any:
    first = CLIPTextModel.from_pretrained(folder / "text_encoder").requires_grad_(False)
    if not (folder / "text_encoder_2").is_dir():
        return first
    second = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2").requires_grad_(False)
    return [first, second]


def forward(unet: nn.Module, text_encoder: Any) -> torch.Tensor:
    """One prediction for a fixed input, through the text encoder(s)."""
    tokens = torch.arange(77)[None]
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([500])
    if not isinstance(text_encoder, list):
        return unet(noisy, times, text_encoder(tokens)[0]).sample
    first, second = text_encoder
    told = second(tokens, output_hidden_states=True)
    states = torch.cat([first(tokens)[0], told.hidden_states[-1]], dim=-1)
    added = {"text_embeds": told.text_embeds, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
    return unet(noisy, times, states, added_cond_kwargs=added).sample


def fill(network: nn.Module, size: float = 0.05) -> None:
    """Give all parameters fixed values that do something."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
