"""Frozen weights in 8 bits: the same numbers as a plain cast, computed in 16 or 32 bits, and no copy that stays."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from library.models import fp8
from library.models.inspect import inspect
from library.models.load import load
from networks import lora
from networks.lora_math import FrozenLinearWithLora

E4M3 = torch.float8_e4m3fn


def frozen(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return module.requires_grad_(False)


def test_only_weights_of_linears_and_convolutions_change_and_names_stay() -> None:
    layers = (nn.Linear(5, 3), nn.Conv2d(3, 4, 3), nn.Embedding(7, 5), nn.LayerNorm(5), nn.GroupNorm(1, 3))
    module = frozen(nn.Sequential(*layers))
    module.append(nn.Linear(5, 3))
    names = list(module.state_dict())
    assert fp8.store(module) == (5 * 3 + 3 * 4 * 9) * 3
    assert list(module.state_dict()) == names
    stored = {name for name, tensor in module.state_dict().items() if tensor.dtype == E4M3}
    assert stored == {"0.weight", "1.weight"}, "biases, embeddings, norms and what trains stay"
    assert fp8.store(module) == 0


def test_a_weight_that_float8_can_not_hold_stays() -> None:
    module = frozen(nn.Linear(2, 2))
    module.weight.data[0, 0] = 449.0
    assert fp8.store(module) == 0 and type(module) is nn.Linear and float(module.weight[0, 0]) == 449.0


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(6, 4), (2, 5, 6)),
        (nn.Linear(6, 4, bias=False), (6,)),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 7, 8)),
        (nn.Conv2d(4, 6, (3, 1), padding=(1, 0), dilation=(2, 1), groups=2, bias=False), (1, 4, 8, 5)),
    ],
)
def test_outputs_and_gradients_are_those_of_the_rounded_weight(module: nn.Module, shape: tuple[int, ...]) -> None:
    frozen(module).double()
    exact = module.weight.data.clone()
    assert fp8.store(module) > 0
    rounded = exact.to(E4M3).double()
    plain = nn.Linear(1, 1) if isinstance(module, nn.Linear) else nn.Conv2d(1, 1, 1)
    plain.__dict__.update({key: value for key, value in module.__dict__.items() if key != "_parameters"})
    plain._parameters = {"weight": nn.Parameter(rounded, requires_grad=False), "bias": module.bias}
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(1))
    results = []
    for one in (module, plain):
        y = one(x)
        (gradient,) = torch.autograd.grad((y * torch.arange(y.numel()).view_as(y)).sum(), x)
        results.append((y.detach(), gradient))
    (y, gradient), (y_expected, gradient_expected) = results
    assert torch.allclose(y, y_expected, rtol=1e-12, atol=1e-12)
    assert torch.allclose(gradient, gradient_expected, rtol=1e-12, atol=1e-12)
    assert not torch.equal(rounded, exact)


def kept_for_backward(run: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run().sum().backward()
    return kept


@pytest.mark.parametrize("kind", ["linear", "conv", "lora"])
def test_no_copy_in_16_bits_lives_until_the_backward(kind: str) -> None:
    base = frozen(nn.Conv2d(12, 20, 3) if kind == "conv" else nn.Linear(12, 20)).to(torch.bfloat16)
    fp8.store(base)
    x = torch.randn(1, 12, 7, 7) if kind == "conv" else torch.randn(7, 12)
    x = x.to(torch.bfloat16).requires_grad_()
    down, up = torch.randn(2, 12, requires_grad=True), torch.randn(20, 2, requires_grad=True)

    def with_lora() -> torch.Tensor:
        return FrozenLinearWithLora.apply(x, base.weight, base.bias, down, up, 1.0, None)

    kept = kept_for_backward(with_lora if kind == "lora" else lambda: base(x))
    of_weight = [tensor.dtype for tensor in kept if tensor.numel() == base.weight.numel()]
    assert of_weight == [E4M3]
    assert x.grad is not None and x.grad.dtype == torch.bfloat16 and x.grad.abs().sum() > 0


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_lora_on_8_bits_trains_as_on_the_rounded_model(family: str, tiny_models: Callable[[str], Path]) -> None:
    results = []
    for stored in (True, False):
        model = load(inspect(str(tiny_models(family))), with_vae=False)
        if stored:
            before = model.text_encoder_id()
            assert model.store_in_fp8(unet=True, text_encoders=True) > 10_000_000 // 4
            assert model.text_encoder_id() != before, "what is cached for other weights doesn't count"
        else:
            for part in (model.unet, *model.text_encoders):
                for one in part.modules():
                    if type(one) in (nn.Linear, nn.Conv2d):
                        one.weight.data = one.weight.data.to(E4M3).float()
        network = lora.create_network(1.0, 4, 2.0, None, model.network_text_encoder, model.unet, seed=1, conv_dim=2)
        network.apply_to(model.network_text_encoder, model.unet)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(2))
        noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
        out = model.predict(noisy, torch.tensor([5, 900]), model.encode_prompts(["a cat", "a dog"]))
        out.square().mean().backward()
        gradients = {name: one.grad for name, one in network.named_parameters() if one.grad is not None}
        results.append((out.detach(), gradients))
    (out, gradients), (expected, expected_gradients) = results
    assert torch.allclose(out, expected, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys() and any(name.startswith("lora_te") for name in gradients)
    for name, gradient in gradients.items():
        scale = float(expected_gradients[name].norm())
        assert float((gradient - expected_gradients[name]).norm()) <= 1e-3 * scale + 1e-9, name


def test_text_encoders_that_are_read_again_are_stored_in_8_bits_too(tiny_sd1: Path) -> None:
    model = load(inspect(str(tiny_sd1)), dtype=torch.bfloat16, with_vae=False)
    model.store_in_fp8(unet=True, text_encoders=True)
    first = model.encode_prompts(["a cat"]).states
    model.release_text_encoders()
    assert torch.equal(model.encode_prompts(["a cat"]).states, first) and first.dtype == torch.bfloat16
    layer = model.text_encoders[0].encoder.layers[0].mlp.fc1
    assert layer.weight.dtype == E4M3 and layer.bias.dtype == torch.bfloat16
    assert model.text_encoders[0].embeddings.token_embedding.weight.dtype == torch.bfloat16
    predicted = model.predict(torch.randn(1, 4, 8, 8), torch.tensor([300]), model.encode_prompts(["a cat"]))
    assert predicted.isfinite().all()
