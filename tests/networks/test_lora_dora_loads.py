"""diffusers and peft load our DoRA files, compute what we compute with them, and their own files are read as ours."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from networks import foreign, lora
from networks.facade import text_encoder_facade, unet_facade
from tests.networks.tiny_families import FAMILIES, Finder, forward, load_text_encoder, load_unet

DORA: dict[str, Any] = {"dora": "true", "conv_dim": "3", "conv_alpha": "2"}


def trained(text_encoder: Any, unet: Any) -> lora.LoraNetwork:
    """A DoRA on these models that does something."""
    network = lora.create_network(1.0, 4, 2.0, None, text_encoder, unet, **DORA)
    network.apply_to(text_encoder, unet)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter * (1 + 0.2 * noise) if name.endswith("dora_scale") else parameter + 0.05 * noise)
    return network


def in_peft_names(network: lora.LoraNetwork) -> dict[str, torch.Tensor]:
    """The tensors of our file under the names that diffusers and peft give to a DoRA, alpha multiplied into `up`.

    Those of a text model are loaded by transformers, which wants one more level.
    """
    found: dict[str, torch.Tensor] = {}
    tensors = network.file_tensors()
    for layer in network.layers:
        name, target = layer.target.name, layer.target
        part = "unet" if target.part == "unet" else ("text_encoder", "text_encoder_2")[target.encoder]
        path = f"{part}.{target.path}" if part == "unet" else f"{part}.text_model.{target.path}"
        found[f"{path}.lora_A.weight"] = tensors[f"{name}.lora_down.weight"]
        found[f"{path}.lora_B.weight"] = tensors[f"{name}.lora_up.weight"] * layer.scale
        size = tensors[f"{name}.dora_scale"]
        ending = "" if part == "unet" else ".weight"
        found[f"{path}.lora_magnitude_vector{ending}"] = size.flatten() if size.dim() == 2 else size.transpose(0, 1)
    return {name: tensor.clone() for name, tensor in found.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_diffusers_pipeline_computes_the_same(family: str, tiny_models: Finder) -> None:
    folder = tiny_models(family)
    unet, text_encoder = load_unet(folder), load_text_encoder(folder)
    before = forward(unet, text_encoder)
    network = trained(text_encoder, unet)
    expected = forward(unet, text_encoder)
    kind = StableDiffusionXLPipeline if (folder / "text_encoder_2").is_dir() else StableDiffusionPipeline
    theirs = kind.from_pretrained(folder, local_files_only=True)
    theirs.load_lora_weights(in_peft_names(network))
    encoders: Any = theirs.text_encoder
    if (folder / "text_encoder_2").is_dir():
        encoders = [theirs.text_encoder, theirs.text_encoder_2]
    with torch.no_grad():
        found = forward(theirs.unet, encoders)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(found, before, atol=2e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_lycoris_merges_our_file_into_the_same_weights(family: str, tiny_models: Finder, tmp_path: Path) -> None:
    """LyCORIS reads the names of our files themselves; diffusers leaves `dora_scale` out of them, and says so."""
    folder = tiny_models(family)
    unet, text_encoder = load_unet(folder), load_text_encoder(folder)
    network = trained(text_encoder, unet)
    file = tmp_path / "dora.safetensors"
    network.save_weights(file, None, {})
    network.remove()
    again, tensors = lora.create_network_from_weights(1.0, file, None, text_encoder, unet)
    theirs, encoder = load_unet(folder), load_text_encoder(folder)
    again.merge_to(text_encoder, unet, tensors)
    expected = forward(unet, text_encoder)
    module = foreign.load("lycoris.kohya")
    seen = unet_facade(theirs), text_encoder_facade(encoder)
    found, held = module.create_network_from_weights(1.0, str(file), None, seen[1], seen[0])
    assert len(found.loras) == len(network.modules_built)
    found.merge_to(seen[1], seen[0], held, None, None)
    torch.testing.assert_close(forward(theirs, encoder), expected, rtol=1e-3, atol=1e-3)


def test_a_dora_of_peft_is_read_as_ours(tiny_sd1: Path, tmp_path: Path) -> None:
    theirs = UNet2DConditionModel.from_pretrained(tiny_sd1, subfolder="unet")
    names = ["to_q", "to_v", "conv1", "proj_in", "ff.net.2"]
    theirs.add_adapter(LoraConfig(r=4, lora_alpha=4, use_dora=True, target_modules=names, init_lora_weights=False))
    for name, parameter in theirs.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1.2
    tensors = {f"unet.{key}": t.detach().clone() for key, t in get_peft_model_state_dict(theirs).items()}
    assert any("lora_magnitude_vector" in key for key in tensors)
    save_file(tensors, tmp_path / "peft.safetensors")
    unet, text_encoder = load_unet(tiny_sd1), load_text_encoder(tiny_sd1)
    network, _ = lora.create_network_from_weights(1.0, tmp_path / "peft.safetensors", None, text_encoder, unet)
    network.apply_to(text_encoder, unet)
    network.load_weights(tmp_path / "peft.safetensors")
    with torch.no_grad():
        expected = forward(theirs, text_encoder)
    torch.testing.assert_close(forward(unet, text_encoder), expected, rtol=1e-3, atol=1e-3)
    assert any(name.endswith("dora_scale") for name in network.state_dict())
