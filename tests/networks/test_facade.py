"""Facades share the model's leaves under the names of files."""

from pathlib import Path

import pytest
import torch
from torch import nn

from library.models.families import unet_key_of
from library.models.lora_targets import targets
from networks.facade import text_encoder_facade, unet_facade
from tests.networks.tiny_families import FAMILIES, Finder, forward, load_text_encoder, load_unet


def test_the_unet_of_sd1_is_its_own_facade(unet: nn.Module) -> None:
    assert unet_facade(unet) is unet


def test_an_sdxl_facade_shares_every_weight_under_the_original_names(tiny_sdxl: Path, tiny_sdxl_file: Path) -> None:
    from safetensors import safe_open

    unet = load_unet(tiny_sdxl)
    facade = unet_facade(unet)
    prefix = "model.diffusion_model."
    with safe_open(tiny_sdxl_file, "pt") as file:
        original = {name.removeprefix(prefix) for name in tuple(file.keys()) if name.startswith(prefix)}
    assert set(dict(facade.named_parameters())) == original
    assert {id(one) for one in facade.parameters()} == {id(one) for one in unet.parameters()}
    assert facade.config is unet.config
    assert (facade.dtype, facade.device) == (unet.dtype, unet.device)
    with pytest.raises(AttributeError):
        _ = facade.no_such_thing


def test_training_mode_and_calls_reach_the_model(tiny_sdxl: Path) -> None:
    unet, text_encoder = load_unet(tiny_sdxl), load_text_encoder(tiny_sdxl)
    facade, texts = unet_facade(unet), text_encoder_facade(text_encoder)
    assert torch.equal(forward(facade, texts), forward(unet, text_encoder))
    facade.train()
    assert all(module.training for module in unet.modules())
    facade.eval()
    assert not any(module.training for module in unet.modules())


def test_a_replaced_forward_takes_effect_in_the_model(tiny_sdxl: Path) -> None:
    unet, text_encoder = load_unet(tiny_sdxl), load_text_encoder(tiny_sdxl)
    before = forward(unet, text_encoder)
    leaf = unet_facade(unet).get_submodule("output_blocks.5.2.conv")
    base = leaf.forward
    leaf.forward = lambda x: base(x) + 1
    assert not torch.equal(forward(unet, text_encoder), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_facades_have_the_modules_of_files_by_path(family: str, tiny_models: Finder) -> None:
    folder = tiny_models(family)
    unet, text_encoder = load_unet(folder), load_text_encoder(folder)
    encoders = text_encoder if isinstance(text_encoder, list) else [text_encoder]
    roots = {"lora_unet": unet_facade(unet)}
    for number, facade in enumerate(text_encoder_facade(encoders), 1):
        roots["lora_te" if len(encoders) == 1 else f"lora_te{number}"] = facade
    named = {
        f"{prefix}_{path.replace('.', '_')}": module
        for prefix, root in roots.items()
        for path, module in root.named_modules()
    }
    key = unet_key_of(unet.config)
    for target in targets(unet.config, [encoder.config.to_dict() for encoder in encoders], conv=True, unet_key=key):
        module = named[target.name]
        assert module.weight.shape[:2] == (target.out_features, target.in_features)
        if target.part == "unet":
            assert module is unet.get_submodule(target.path)


def test_text_encoders_get_the_level_that_files_name(tiny_sdxl: Path) -> None:
    first, second = load_text_encoder(tiny_sdxl)
    facades = text_encoder_facade([first, second])
    assert facades[0].text_model is first
    assert facades[1] is second
    assert facades[0].config is first.config
    assert text_encoder_facade(None) is None
    assert text_encoder_facade(first).text_model is first
