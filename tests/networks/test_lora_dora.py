"""DoRA as an argument of networks.lora: the formula in float64, its gradients, its dropouts and its files."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from library.errors import UserError
from library.models.lora_targets import Kernel, LoraTarget
from networks import lora
from networks.dora import DoraLayer
from networks.lora_args import LoraArgs
from networks.lora_layers import RandomContext
from tests.networks.tiny_families import FAMILIES, Finder, fill, forward, load_text_encoder, load_unet

DORA: dict[str, Any] = {"dora": "true", "conv_dim": "3", "conv_alpha": "2"}


def target_of(base: nn.Module) -> LoraTarget:
    kernel: Kernel = "linear" if isinstance(base, nn.Linear) else "3x3" if base.kernel_size == (3, 3) else "1x1"
    return LoraTarget("lora_unet_x", "unet", "x", 6, 5, kernel)


def layer_on(kind: str, **settings: Any) -> tuple[DoraLayer, nn.Module]:
    """A filled layer in float64 on a frozen module of 6 inputs and 5 outputs."""
    torch.manual_seed(0)
    base: nn.Module = {
        "linear": lambda: nn.Linear(6, 5),
        "bare": lambda: nn.Linear(6, 5, bias=False),
        "1x1": lambda: nn.Conv2d(6, 5, 1),
        "3x3": lambda: nn.Conv2d(6, 5, 3, stride=2, padding=1),
    }[kind]()
    args = replace(LoraArgs(2, 1.5), **settings)
    layer = DoraLayer(target_of(base), base.requires_grad_(False), 2, 1.5, args, RandomContext())
    with torch.no_grad():
        for parameter in (layer.lora_down.weight, layer.lora_up.weight, layer.dora_scale):
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    layer.attach()
    return layer, base


def inputs(base: nn.Module) -> Tensor:
    shape = (3, 6, 8, 8) if isinstance(base, nn.Conv2d) else (3, 7, 6)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def applied(base: Any, x: Tensor, weight: Tensor) -> Tensor:
    """The module with another weight, in float64."""
    bias = None if base.bias is None else base.bias.double()
    if isinstance(base, nn.Linear):
        return functional.linear(x.double(), weight, bias)
    return functional.conv2d(x.double(), weight, bias, base.stride, base.padding)


def formula(layer: DoraLayer, base: Any, strength: float = 1.0) -> tuple[Tensor, list[Tensor]]:
    """The weight m (W + D) / ||W + D|| in float64 with a constant norm, and the parameters that it was made from."""
    given = [layer.lora_down.weight, layer.lora_up.weight, layer.dora_scale]
    down, up, size = (parameter.detach().double().requires_grad_() for parameter in given)
    frozen = base.weight.double()
    moved = frozen + ((up.flatten(1) @ down.flatten(1)) * (1.5 / 2)).view(frozen.shape)
    axes = tuple(range(1, frozen.dim()))
    whole = size * moved / torch.linalg.vector_norm(moved.detach(), dim=axes, keepdim=True)
    return frozen + strength * (whole - frozen), [down, up, size]


@pytest.mark.parametrize("kind", ["linear", "bare", "1x1", "3x3"])
@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_output_and_gradients_are_the_formulas(kind: str, strength: float) -> None:
    layer, base = layer_on(kind)
    layer.multiplier = strength
    weight, parameters = formula(layer, base, strength)
    x = inputs(base).requires_grad_()
    exact = inputs(base).double().requires_grad_()
    expected, found = applied(base, exact, weight), base(x)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.delta().double() + base.weight, weight, rtol=1e-5, atol=1e-6)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (expected * direction.double()).sum().backward()
    (found * direction).sum().backward()
    pairs = [
        *zip([layer.lora_down.weight, layer.lora_up.weight, layer.dora_scale], parameters, strict=True),
        (x, exact),
    ]
    for ours, theirs in pairs:
        assert ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "3x3"])
def test_a_new_layer_has_the_magnitudes_of_the_frozen_weight(kind: str) -> None:
    _, base = layer_on(kind)
    layer = DoraLayer(target_of(base), base, 2, 1.5, LoraArgs(2, 1.5), RandomContext())
    assert layer.dora_scale.shape == (5, *(1,) * (base.weight.dim() - 1))
    torch.testing.assert_close(layer.dora_scale.flatten(), base.weight.flatten(1).norm(dim=1))
    assert float(layer.delta().abs().max()) < 1e-6


@pytest.mark.parametrize("kind", ["linear", "3x3"])
def test_dropouts_act_on_the_factors_input_and_the_norm_stays_whole(kind: str) -> None:
    layer, base = layer_on(kind, dropout=0.5, rank_dropout=0.3)
    layer.train()
    layer._context.positions = (0, 1, 2)
    x = inputs(base)
    weight, (down, up, _) = formula(layer, base)
    found = base(x)
    plain = applied(base, x, base.weight.double())
    gains = (weight / (base.weight + (up.flatten(1) @ down.flatten(1) * 0.75).view(base.weight.shape))).flatten(1)[:, 0]
    side = (-1, 1, 1) if kind == "3x3" else (-1,)
    bias = base.bias.double().view(side)
    if kind == "3x3":
        hidden = functional.conv2d(x.double(), down, stride=2, padding=1)
        mask, kept = layer._mask(tuple(hidden.shape), x.device)
        added = functional.conv2d(hidden * mask, up) * 0.75 / kept
    else:
        hidden = functional.linear(x.double(), down)
        mask, kept = layer._mask(tuple(hidden.shape), x.device)
        added = functional.linear(hidden * mask, up) * 0.75 / kept
    assert mask is not None and 0 < float(mask.mean()) < 1
    torch.testing.assert_close(found.double(), gains.view(side) * (plain - bias + added) + bias, rtol=1e-5, atol=1e-5)


def test_module_dropout_gives_a_sample_the_frozen_layer() -> None:
    layer, base = layer_on("linear", module_dropout=0.5)
    layer.train()
    layer._context.positions = tuple(range(8))
    x = torch.randn(16, 7, 6)
    found, frozen = base(x), functional.linear(x, base.weight, base.bias)
    layer.eval()
    whole = base(x)
    spared = [bool(torch.equal(a, b)) for a, b in zip(found, frozen, strict=True)]
    acting = [bool(torch.allclose(a, b)) for a, b in zip(found, whole, strict=True)]
    assert [not one for one in spared] == acting
    assert spared[::2] == spared[1::2] and 0 < sum(spared) < 16


def test_magnitudes_have_exact_gradients_under_autocast() -> None:
    layer, base = layer_on("linear")
    with torch.no_grad():
        layer.lora_up.weight.zero_()
        layer.match_magnitudes()
        layer.dora_scale.mul_(1.001)
    base.bias.zero_()
    x = inputs(base)
    with torch.autocast("cpu", torch.bfloat16):
        found = base(x)
    torch.testing.assert_close(found.float(), functional.linear(x, base.weight * 1.001), rtol=2e-2, atol=2e-2)
    found.float().sum().backward()
    assert layer.dora_scale.grad is not None and layer.dora_scale.grad.dtype == torch.float32
    expected = functional.linear(x.double(), base.weight.double()).sum((0, 1)) / base.weight.double().norm(dim=1)
    torch.testing.assert_close(layer.dora_scale.grad.flatten().double(), expected, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_dora_network_changes_nothing_and_its_file_comes_back(
    family: str, tiny_models: Finder, tmp_path: Path
) -> None:
    folder = tiny_models(family)
    unet, text_encoder = load_unet(folder), load_text_encoder(folder)
    before = forward(unet, text_encoder)
    network = lora.create_network(1.0, 4, 2.0, None, text_encoder, unet, **DORA)
    network.apply_to(text_encoder, unet)
    torch.testing.assert_close(forward(unet, text_encoder), before, rtol=1e-4, atol=1e-5)
    plan = sum(parameter.numel() for parameter in network.parameters())
    start = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    fill(network)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("dora_scale"):
                tensor.copy_(start[name] * 1.3)
    expected = forward(unet, text_encoder)
    file = tmp_path / "dora.safetensors"
    network.save_weights(file, None, {})
    held = load_file(file)
    assert {key.partition(".")[2] for key in held} == {"alpha", "lora_down.weight", "lora_up.weight", "dora_scale"}
    assert sum(tensor.numel() for key, tensor in held.items() if not key.endswith("alpha")) == plan
    network.remove()
    again, tensors = lora.create_network_from_weights(1.0, file, None, text_encoder, unet)
    again.apply_to(text_encoder, unet)
    again.load_weights(file)
    assert torch.equal(forward(unet, text_encoder), expected)
    again.remove()
    again.merge_to(text_encoder, unet, tensors)
    torch.testing.assert_close(forward(unet, text_encoder), expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(expected, before, atol=1e-2)


def test_kinds_of_files_and_networks(unet: nn.Module, text_encoder: nn.Module, tmp_path: Path) -> None:
    plain = lora.create_network(1.0, 4, 2.0, None, text_encoder, unet)
    plain.apply_to(text_encoder, unet)
    fill(plain)
    expected = forward(unet, text_encoder)
    plain.save_weights(tmp_path / "plain.safetensors", None, {})
    plain.remove()
    dora = lora.create_network(1.0, 4, 2.0, None, text_encoder, unet, dora_wd="True")
    dora.apply_to(text_encoder, unet)
    dora.load_weights(tmp_path / "plain.safetensors")
    torch.testing.assert_close(forward(unet, text_encoder), expected, rtol=1e-4, atol=1e-4)
    dora.save_weights(tmp_path / "dora.safetensors", None, {})
    dora.remove()
    plain.apply_to(text_encoder, unet)
    with pytest.raises(UserError, match="add dora=true"):
        plain.load_weights(tmp_path / "dora.safetensors")
    plain.remove()
    tensors = load_file(tmp_path / "dora.safetensors")
    turned = {key: t.flatten()[None] if key.endswith("dora_scale") else t for key, t in tensors.items()}
    save_file({key: t.contiguous() for key, t in turned.items()}, tmp_path / "inputs.safetensors")
    dora.apply_to(text_encoder, unet)
    with pytest.raises(UserError, match="not one number for each output"):
        dora.load_weights(tmp_path / "inputs.safetensors")
