"""networks.dylora against its formula in float64: which ranks act, which have gradients, and what decides the draw."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from library.errors import UserError
from library.models.lora_targets import Kernel, LoraTarget
from networks import dylora, lora
from networks.lora_args import LoraArgs
from networks.lora_layers import RandomContext
from tests.networks.tiny_families import FAMILIES, Finder, fill, forward, load_text_encoder, load_unet

RANK, UNIT = 6, 2
KINDS: tuple[Kernel, ...] = ("linear", "1x1", "3x3")


def layer(kind: Kernel, context: RandomContext) -> tuple[dylora.DyloraLayer, nn.Module]:
    """An attached float64 layer with factors that are not zero, and its frozen module."""
    base = nn.Linear(5, 7) if kind == "linear" else nn.Conv2d(5, 7, int(kind[0]), padding=int(kind[0]) // 2)
    base = base.double().requires_grad_(False)
    target = LoraTarget("module", "unet", "module", 5, 7, kind)
    found = dylora.DyloraLayer(target, base, RANK, 3.0, LoraArgs(RANK, 3.0), context).double()
    found.unit = UNIT
    fill(found, 1.0)
    found.attach()
    return found, base


def sample(kind: Kernel) -> torch.Tensor:
    shape = (2, 4, 5) if kind == "linear" else (2, 5, 4, 4)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def product(x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    if x.dim() == 3:
        return x @ down.t() @ up.t()
    hidden = nn.functional.conv2d(x, down, padding=down.shape[-1] // 2)
    return nn.functional.conv2d(hidden, up)


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_forward_is_the_formula_for_its_block(kind: Kernel) -> None:
    context = RandomContext(4, 0, 0, (0, 1))
    dynamic, base = layer(kind, context)
    x, down, up = sample(kind), dynamic.lora_down.weight, dynamic.lora_up.weight
    plain = base.__class__.forward(base, x)
    seen = set()
    for index in range(12):
        context.index = index
        start = dynamic._block()
        end = start + UNIT
        seen.add(start)
        dynamic.zero_grad()
        out = base(x)
        scale = 3.0 / RANK * (RANK / end) ** 0.5
        torch.testing.assert_close(out, plain + scale * product(x, down[:end], up[:, :end]), rtol=1e-10, atol=1e-10)
        out.square().sum().backward()
        found = {"down": down.grad.clone(), "up": up.grad.clone()}
        with torch.enable_grad():
            twin_down, twin_up = down.detach().clone().requires_grad_(), up.detach().clone().requires_grad_()
            (plain + scale * product(x, twin_down[:end], twin_up[:, :end])).square().sum().backward()
        torch.testing.assert_close(found["down"][start:end], twin_down.grad[start:end], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found["up"][:, start:end], twin_up.grad[:, start:end], rtol=1e-9, atol=1e-9)
        outside = [rank for rank in range(RANK) if not start <= rank < end]
        assert not found["down"][outside].any()
        assert not found["up"][:, outside].any()
    assert seen == {0, 2, 4}


@pytest.mark.parametrize("kind", KINDS)
def test_outside_of_training_it_is_a_plain_lora(kind: Kernel) -> None:
    dynamic, base = layer(kind, RandomContext())
    x = sample(kind)
    dynamic.eval()
    whole = product(x, dynamic.lora_down.weight, dynamic.lora_up.weight)
    torch.testing.assert_close(base(x), base.__class__.forward(base, x) + 0.5 * whole, rtol=1e-10, atol=1e-10)


def test_every_block_is_drawn_as_often_and_by_place_alone() -> None:
    def blocks(epoch: int, positions: Sequence[int]) -> list[int]:
        context = RandomContext(7, epoch, 0, tuple(positions))
        dynamic, _ = layer("linear", context)
        found = []
        for context.index in range(3000):
            found.append(dynamic._block())
        return found

    first = blocks(0, (0, 1))
    assert blocks(0, (5,)) == first, "processes with other samples of the same micro-batch must agree"
    assert blocks(1, (0, 1)) != first
    counts = Counter(first)
    assert set(counts) == {0, 2, 4}
    assert all(abs(count - 1000) < 150 for count in counts.values())


def test_training_without_a_place_is_refused() -> None:
    _, base = layer("linear", RandomContext())
    with pytest.raises(RuntimeError, match="set_random_context"):
        base(sample("linear"))


def attached(unet: nn.Module, text_encoder: Any, dim: int = 4, **args: Any) -> dylora.DyloraNetwork:
    """A network on both models whose factors are not zero, in training at a place of the run."""
    network = dylora.create_network(1.0, dim, 2.0, None, text_encoder, unet, **args)
    network.apply_to(text_encoder, unet, True, True)
    network.prepare_grad_etc(text_encoder, unet)
    fill(network)
    network.on_epoch_start(text_encoder, unet)
    network.set_random_context(1, 0, 0, (0,))
    return network


def test_recomputation_sees_the_same_block(unet: nn.Module, text_encoder: nn.Module) -> None:
    network = attached(unet, text_encoder, unit="2", conv_dim="4")
    noisy, times = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    states = text_encoder(torch.arange(77)[None])[0].detach()

    def predict(sample: torch.Tensor) -> torch.Tensor:
        return unet(sample, times, states).sample

    found = []
    for again in (False, True):
        network.zero_grad()
        noisy.requires_grad_()
        out = checkpoint(predict, noisy, use_reentrant=False) if again else predict(noisy)
        out.square().mean().backward()
        found.append({name: one.grad for name, one in network.named_parameters() if one.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("family", FAMILIES)
def test_files_are_those_of_networks_lora(family: str, tiny_models: Finder, tmp_path: Path) -> None:
    unet, text_encoder = load_unet(tiny_models(family)), load_text_encoder(tiny_models(family))
    network = attached(unet, text_encoder, unit="2", conv_dim="4")
    others = load_text_encoder(tiny_models(family)), load_unet(tiny_models(family))
    plain = lora.create_network(1.0, 4, 2.0, None, *others, conv_dim="4")
    plain.apply_to(None, None)
    expected = {name: tensor.shape for name, tensor in plain.file_tensors().items()}
    path = tmp_path / "dylora.safetensors"
    network.save_weights(path, None, {})
    assert {name: tensor.shape for name, tensor in load_file(path).items()} == expected
    network.eval()
    whole = forward(unet, text_encoder)
    network.remove()
    again, _ = dylora.create_network_from_weights(1.0, path, None, text_encoder, unet, unit="4")
    again.apply_to(text_encoder, unet)
    again.load_weights(path)
    again.eval()
    assert torch.equal(forward(unet, text_encoder), whole)


def test_diffusers_loads_the_file(tiny_sd1: Path, tmp_path: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd1, safety_checker=None)
    unet, text_encoder = pipeline.unet.requires_grad_(False), pipeline.text_encoder.requires_grad_(False)
    network = attached(unet, text_encoder)
    network.save_weights(tmp_path / "a.safetensors", None, {})
    network.eval()
    expected = forward(unet, text_encoder)
    network.remove()
    pipeline.load_lora_weights(tmp_path / "a.safetensors")
    torch.testing.assert_close(forward(pipeline.unet, pipeline.text_encoder), expected, rtol=1e-4, atol=1e-4)


def test_lora_plus_gives_up_factors_their_own_rate(unet: nn.Module, text_encoder: nn.Module) -> None:
    network = attached(unet, text_encoder, loraplus_unet_lr_ratio="4")
    groups, names = network.prepare_optimizer_params(1e-4, 1e-3, None)
    assert dict(zip(names, [group["lr"] for group in groups], strict=True)) == {
        "textencoder": 1e-4,
        "unet": 1e-3,
        "unet plus": 4e-3,
    }


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"unit": "3"}, "doesn't divide rank 4"),
        ({"unit": "0"}, "unit"),
        ({"conv_dim": "2"}, "one rank"),
        ({"block_dims": "1,2"}, "block_dims"),
        ({"units": "2"}, "did you mean unit"),
    ],
)
def test_bad_settings_are_refused(args: dict[str, Any], says: str, unet: nn.Module, text_encoder: nn.Module) -> None:
    with pytest.raises(UserError, match=says):
        dylora.create_network(1.0, 4, 1, None, text_encoder, unet, **args)
