"""Tiny SD1 models, fresh for every test, so that a LoRA left on one can't reach the next test."""

import copy
from pathlib import Path

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from transformers import CLIPTextModel


@pytest.fixture(scope="session")
def frozen_models(tiny_sd1: Path) -> tuple[torch.nn.Module, torch.nn.Module]:
    """U-Net and text encoder, frozen; not to be changed."""
    unet = UNet2DConditionModel.from_pretrained(tiny_sd1, subfolder="unet").requires_grad_(False)
    text_encoder = CLIPTextModel.from_pretrained(tiny_sd1 / "text_encoder").requires_grad_(False)
    return unet, text_encoder


@pytest.fixture
def unet(frozen_models: tuple[torch.nn.Module, torch.nn.Module]) -> torch.nn.Module:
    """A frozen U-Net of this test's own."""
    return copy.deepcopy(frozen_models[0])


@pytest.fixture
def text_encoder(frozen_models: tuple[torch.nn.Module, torch.nn.Module]) -> torch.nn.Module:
    """A frozen text encoder of this test's own."""
    return copy.deepcopy(frozen_models[1])
