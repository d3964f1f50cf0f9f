"""Norms of LoRAs from rank-sized matrices, against the dense product in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from networks import lora, norms
from networks.lora_layers import LoraLayer
from tests.networks.tiny_families import forward

LIMIT = 0.5


def filled(unet: nn.Module, text_encoder: nn.Module, **given: Any) -> lora.LoraNetwork:
    """A network with norms on both sides of the limit, of half of it, and with ranks above and below the sizes."""
    network = lora.create_network(1.0, 4, 3.0, None, text_encoder, unet, conv_dim="5", conv_alpha="2", **given)
    network.apply_to(text_encoder, unet)
    network.prepare_grad_etc(text_encoder, unet)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for place, layer in enumerate(network.layers):
            up = layer.lora_up.weight
            up.copy_(torch.randn(up.shape, generator=generator) * 0.5 ** (place % 7))
    return network


def dense(layer: LoraLayer) -> Tensor:
    """alpha / rank * up @ down in float64; a 3x3 one as the convolution of the two, as sd-scripts has it."""
    down, up = layer.lora_down.weight.detach().double(), layer.lora_up.weight.detach().double()
    factor = float(layer.alpha) / down.shape[0]
    if down.dim() == 4 and down.shape[2:] == (3, 3):
        return functional.conv2d(down.permute(1, 0, 2, 3), up).permute(1, 0, 2, 3) * factor
    return (up.flatten(1) @ down.flatten(1)) * factor


def test_scaling_is_that_of_the_dense_product(unet: nn.Module, text_encoder: nn.Module) -> None:
    network = filled(unet, text_encoder)
    before = {layer.target.name: dense(layer) for layer in network.layers}
    sizes = {name: float(product.norm()) for name, product in before.items()}
    count, mean, largest = network.apply_max_norm_regularization(LIMIT, "cpu")
    ratios = {name: min(max(size, LIMIT / 2), LIMIT) / max(size, LIMIT / 2) for name, size in sizes.items()}
    assert 0 < sum(ratio != 1 for ratio in ratios.values()) < len(ratios)
    assert {one.dim() for one in (count, mean, largest)} == {0}
    assert int(count) == sum(ratio != 1 for ratio in ratios.values())
    after = [sizes[name] * ratios[name] for name in sizes]
    assert float(mean) == pytest.approx(sum(after) / len(after), rel=1e-5)
    assert float(largest) == pytest.approx(max(after), rel=1e-5) == pytest.approx(LIMIT, rel=1e-5)
    for layer in network.layers:
        name = layer.target.name
        torch.testing.assert_close(dense(layer), before[name] * ratios[name], rtol=1e-5, atol=1e-8)


def test_what_is_small_enough_stays_bit_for_bit(unet: nn.Module, text_encoder: nn.Module) -> None:
    network = filled(unet, text_encoder)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    count, _, _ = network.apply_max_norm_regularization(1e6)
    assert int(count) == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_what_is_frozen_stays_although_it_is_too_large(unet: nn.Module, text_encoder: nn.Module) -> None:
    network = filled(unet, text_encoder)
    frozen = [layer for layer in network.layers if layer.target.part == "text_encoder"]
    for layer in frozen:
        layer.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.apply_max_norm_regularization(1e-3)
    names = {layer.target.name for layer in frozen}
    for name, tensor in network.state_dict().items():
        stays = name.partition(".")[0] in names or name.endswith("alpha")
        assert torch.equal(tensor, before[name]) == stays, name


def test_means_over_modules_are_those_of_dense_matrices(unet: nn.Module, text_encoder: nn.Module) -> None:
    network = filled(unet, text_encoder)
    assert network.mean_norms(True) == {}
    forward(unet, text_encoder).square().mean().backward()
    found = network.mean_norms(True) | network.mean_norms(False)
    products, together, gradients = [], [], []
    for layer in network.layers:
        product = dense(layer)
        products.append(float(product.norm()))
        together.append(float((layer.base.weight.double().view(product.shape) + product).norm()))
        every = [p.grad.double().square().sum() for p in layer.parameters() if p.grad is not None]
        gradients.append(math.sqrt(float(sum(every))))
    means = {"key": products, "combined": together, "grad": gradients}
    assert {tensor.dim() for tensor in found.values()} == {0}
    assert {name: float(mean) for name, mean in found.items()} == {
        f"norm/avg_{name}_norm": pytest.approx(sum(every) / len(every), rel=1e-5) for name, every in means.items()
    }


def test_norms_by_block_add_up_to_those_of_the_network(unet: nn.Module, text_encoder: nn.Module) -> None:
    network = filled(unet, text_encoder, dora="true")
    assert network.norms_by_block(True) == {}
    forward(unet, text_encoder).square().mean().backward()
    weights, gradients = network.norms_by_block(False), network.norms_by_block(True)
    assert set(weights) == {f"unet_block{place}" for place in range(1, 25)} | {
        f"textencoder_layer{place}" for place in range(5)
    }
    products = math.sqrt(sum(float(dense(layer).square().sum()) for layer in network.layers))
    assert math.hypot(*map(float, weights.values())) == pytest.approx(products, rel=1e-5)
    every = [float(p.grad.double().square().sum()) for p in network.parameters() if p.grad is not None]
    assert math.hypot(*map(float, gradients.values())) == pytest.approx(math.sqrt(sum(every)), rel=1e-5)
    block = [layer for layer in network.layers if "_down_blocks_0_attentions_1_" in layer.target.name]
    block += [layer for layer in network.layers if "_down_blocks_0_resnets_1_" in layer.target.name]
    expected = math.sqrt(sum(float(dense(layer).square().sum()) for layer in block))
    assert float(weights["unet_block2"]) == pytest.approx(expected, rel=1e-5)


def test_the_dense_product_is_never_made(unet: nn.Module, text_encoder: nn.Module) -> None:
    """No intermediate tensor is as large as the largest weight."""
    network = filled(unet, text_encoder)
    largest = max(layer.base.weight.numel() for layer in network.layers)
    made: list[int] = []

    class Watched(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and "mm" in str(func):
                made.append(out.numel() // (out.shape[0] if out.dim() == 3 else 1))
            return out

    with Watched():
        norms.limit_norms(network.layers, LIMIT)
    assert made and max(made) <= 25 < largest
