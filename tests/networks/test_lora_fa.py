"""networks.lora_fa: only up-factors train, down-factors are normal and stay, and files are those of any LoRA."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import nn

from library.errors import UserError
from networks import lora, lora_fa
from tests.networks.tiny_families import FAMILIES, Finder, forward, load_text_encoder, load_unet


def attached(unet: nn.Module, text_encoder: Any, dim: int = 4, **args: Any) -> lora_fa.LoraFaNetwork:
    """A network on both models whose up-factors are not zero."""
    network = lora_fa.create_network(1.0, dim, 2.0, None, text_encoder, unet, **args)
    network.apply_to(text_encoder, unet, True, True)
    network.prepare_grad_etc(text_encoder, unet)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in network.layers:
            layer.lora_up.weight.copy_(torch.randn(layer.lora_up.weight.shape, generator=generator) * 0.1)
    return network


def assert_ups_moved(moved: set[str], names: Iterable[str]) -> None:
    """All up-factors and nothing else; not asked for are queries and keys of self-attention over a single pixel."""
    ups = {name for name in names if name.endswith("lora_up.weight")}
    assert moved <= ups
    assert all("mid_block_attentions_0" in name and name.split("attn1_to_")[-1][0] in "qk" for name in ups - moved)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_update_moves_the_up_factors_and_nothing_else(family: str, tiny_models: Finder) -> None:
    unet, text_encoder = load_unet(tiny_models(family)), load_text_encoder(tiny_models(family))
    before = forward(unet, text_encoder)
    network = lora_fa.create_network(1.0, 4, 1.0, None, text_encoder, unet, conv_dim="2")
    network.apply_to(text_encoder, unet, True, True)
    groups, names = network.prepare_optimizer_params_with_multiple_te_lrs([1e-2], 2e-2, 1e-4)
    network.prepare_grad_etc(text_encoder, unet)
    network.on_epoch_start(text_encoder, unet)
    assert torch.equal(forward(unet, text_encoder), before)
    assert [group["lr"] for group in groups] == [1e-2] * (len(names) - 1) + [2e-2]
    trained = [parameter for group in groups for parameter in group["params"]]
    assert {id(one) for one in trained} == {id(one) for one in network.get_trainable_params()}
    assert len(trained) == len(network.layers)
    first = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    optimizer = torch.optim.AdamW(groups)
    forward(unet, text_encoder).square().mean().backward()
    optimizer.step()
    moved = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, first[name])}
    assert_ups_moved(moved, first)
    assert all(layer.lora_down.weight.grad is None for layer in network.layers)


def test_down_factors_are_normal_with_the_papers_deviation(unet: nn.Module, text_encoder: nn.Module) -> None:
    network = lora_fa.create_network(1.0, 8, 1.0, None, text_encoder, unet, conv_dim="8", seed=3)
    network.apply_to(text_encoder, unet)
    scaled = []
    for layer in network.layers:
        drawn = layer.lora_down.weight.detach().double().numpy().ravel()
        scaled.append(drawn / np.sqrt(2 / (layer.target.in_features + 8)))
    every = np.concatenate(scaled)
    assert abs(every.mean()) < 0.01
    assert abs(every.std() - 1) < 0.01
    assert abs(np.mean(every**4) - 3) < 0.1


def test_first_weights_depend_on_seed_and_name_alone(unet: nn.Module, text_encoder: nn.Module) -> None:
    def downs(seed: int, **args: Any) -> dict[str, torch.Tensor]:
        network = lora_fa.create_network(1.0, 4, 1, None, text_encoder, unet, seed=seed, **args)
        network.apply_to(text_encoder, unet)
        return {key: tensor for key, tensor in network.state_dict().items() if "lora_down" in key}

    plain, conv, other = downs(1), downs(1, conv_dim="4"), downs(2)
    assert all(torch.equal(tensor, conv[key]) for key, tensor in plain.items())
    assert not any(torch.equal(tensor, other[key]) for key, tensor in plain.items())


def test_gradients_are_those_of_a_plain_lora_with_the_same_factors(unet: nn.Module, text_encoder: nn.Module) -> None:
    network = attached(unet, text_encoder, conv_dim="2")
    forward(unet, text_encoder).square().mean().backward()
    found = {layer.target.name: layer.lora_up.weight.grad for layer in network.layers}
    state = network.state_dict()
    network.remove()
    plain = lora.create_network(1.0, 4, 2.0, None, text_encoder, unet, conv_dim="2")
    plain.apply_to(text_encoder, unet)
    plain.load_state_dict(state)
    plain.prepare_grad_etc(text_encoder, unet)
    forward(unet, text_encoder).square().mean().backward()
    for layer in plain.layers:
        torch.testing.assert_close(found[layer.target.name], layer.lora_up.weight.grad, rtol=1e-4, atol=1e-7)


def test_diffusers_and_our_own_lora_load_the_file(tiny_sd1: Path, tmp_path: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd1, safety_checker=None)
    unet, text_encoder = pipeline.unet.requires_grad_(False), pipeline.text_encoder.requires_grad_(False)
    network = attached(unet, text_encoder)
    path = tmp_path / "fa.safetensors"
    network.save_weights(path, None, {})
    expected = forward(unet, text_encoder)
    network.remove()
    pipeline.load_lora_weights(path)
    torch.testing.assert_close(forward(pipeline.unet, pipeline.text_encoder), expected, rtol=1e-4, atol=1e-4)
    unet, text_encoder = load_unet(tiny_sd1), load_text_encoder(tiny_sd1)
    ours, _ = lora.create_network_from_weights(1.0, path, None, text_encoder, unet)
    ours.apply_to(text_encoder, unet)
    ours.load_weights(path)
    torch.testing.assert_close(forward(unet, text_encoder), expected, rtol=1e-5, atol=1e-5)


def test_a_network_from_a_file_keeps_its_down_factors(unet: nn.Module, text_encoder: nn.Module, tmp_path: Path) -> None:
    first = attached(unet, text_encoder)
    path = tmp_path / "fa.safetensors"
    first.save_weights(path, None, {})
    expected = forward(unet, text_encoder)
    first.remove()
    again, _ = lora_fa.create_network_from_weights(1.0, path, None, text_encoder, unet)
    again.apply_to(text_encoder, unet)
    again.load_weights(path)
    assert torch.equal(forward(unet, text_encoder), expected)
    groups, _ = again.prepare_optimizer_params(1e-2, 1e-2, 1e-2)
    again.prepare_grad_etc(text_encoder, unet)
    forward(unet, text_encoder).square().mean().backward()
    torch.optim.SGD(groups).step()
    again.save_weights(tmp_path / "b.safetensors", None, {})
    before, after = load_file(path), load_file(tmp_path / "b.safetensors")
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert_ups_moved(moved, before)


@pytest.mark.parametrize(
    ("args", "says"),
    [({"dora": "true"}, "dora"), ({"loraplus_lr_ratio": "4"}, "loraplus"), ({"conv_dimm": "1"}, "conv_dim")],
)
def test_what_it_does_not_have_is_refused(
    args: dict[str, Any], says: str, unet: nn.Module, text_encoder: nn.Module
) -> None:
    with pytest.raises(UserError, match=says):
        lora_fa.create_network(1.0, 4, 1, None, text_encoder, unet, **args)
