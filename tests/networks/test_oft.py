"""networks.oft against its formula in float64: what it computes, its gradients, its files, and merged weights."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from library.errors import UserError
from library.models.lora_targets import Kernel, LoraTarget
from networks import lora, oft
from networks.oft_layers import OftLayer
from tests.networks.tiny_families import FAMILIES, Finder, fill, forward, load_text_encoder, load_unet

KINDS: tuple[Kernel, ...] = ("linear", "1x1", "3x3")


def layer(kind: Kernel, alpha: float = 10.0, size: float = 0.3) -> tuple[OftLayer, nn.Module]:
    """An attached float64 layer of two blocks that turn, and its frozen module."""
    base = nn.Linear(5, 6) if kind == "linear" else nn.Conv2d(5, 6, int(kind[0]), padding=int(kind[0]) // 2)
    base = base.double().requires_grad_(False)
    found = OftLayer(LoraTarget("module", "unet", "module", 5, 6, kind), base, 2, alpha).double()
    fill(found, size)
    found.attach()
    return found, base


def sample(kind: Kernel) -> torch.Tensor:
    shape = (2, 4, 5) if kind == "linear" else (2, 5, 4, 4)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def rotations(blocks: torch.Tensor, limit: float) -> list[torch.Tensor]:
    """R of every block, written out."""
    skews = [block - block.T for block in blocks]
    norm = torch.stack([(skew**2).sum() for skew in skews]).sum().sqrt()
    shrink = torch.where(norm > limit, limit / norm, torch.ones_like(norm))
    one = torch.eye(blocks.shape[-1], dtype=blocks.dtype)
    return [(one + skew * shrink) @ torch.linalg.inv(one - skew * shrink) for skew in skews]


def turned_weight(weight: torch.Tensor, blocks: torch.Tensor, alpha: float, multiplier: float = 1.0) -> torch.Tensor:
    """The new weight, written out block by block."""
    rows = weight.flatten(1)
    side = blocks.shape[-1]
    one = torch.eye(side, dtype=weight.dtype)
    parts = []
    for number, rotation in enumerate(rotations(blocks, alpha * rows.shape[0])):
        mixed = one + multiplier * (rotation - one)
        parts.append(mixed.T @ rows[number * side : (number + 1) * side])
    return torch.cat(parts).view(weight.shape)


def plain(base: nn.Module, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if isinstance(base, nn.Linear):
        return nn.functional.linear(x, weight, base.bias)
    return nn.functional.conv2d(x, weight, base.bias, padding=base.padding)


@pytest.mark.parametrize("alpha", [10.0, 0.01])
@pytest.mark.parametrize("multiplier", [1.0, 0.4])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_the_formulas(kind: Kernel, multiplier: float, alpha: float) -> None:
    found, base = layer(kind, alpha)
    found.multiplier = multiplier
    x = sample(kind).requires_grad_()
    twin_x, twin_blocks = x.detach().clone().requires_grad_(), found.oft_blocks.detach().clone().requires_grad_()
    out = base(x)
    expected = plain(base, twin_x, turned_weight(base.weight, twin_blocks, alpha, multiplier))
    torch.testing.assert_close(out, expected, rtol=1e-7, atol=1e-7)
    push = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
    (out * push).sum().backward()
    (expected * push).sum().backward()
    torch.testing.assert_close(x.grad, twin_x.grad, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.oft_blocks.grad, twin_blocks.grad, rtol=1e-5, atol=1e-7)


def test_matrices_are_orthogonal_and_bounded() -> None:
    found, _ = layer("linear", alpha=0.05, size=2.0)
    rotation = found.rotation().detach()
    one = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(rotation @ rotation.mT, one.expand_as(rotation), rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(2, dtype=torch.float64))
    cayley = torch.linalg.solve(rotation + one, rotation - one)
    assert torch.linalg.vector_norm(cayley) == pytest.approx(0.05 * 6, rel=1e-6)


def test_a_turned_weight_keeps_the_norms_of_its_columns() -> None:
    """What OFT promises: neurons are turned together, so that angles between inputs' images stay."""
    found, base = layer("linear")
    torch.testing.assert_close(found.weight().norm(dim=0), base.weight.norm(dim=0), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(found.weight(), base.weight, atol=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_above_another_network_outputs_are_turned(kind: Kernel) -> None:
    found, base = layer(kind)
    x = sample(kind)
    expected = base(x)
    found._forward_was_plain = False
    torch.testing.assert_close(base(x), expected, rtol=1e-9, atol=1e-9)


def attached(unet: nn.Module, text_encoder: Any, dim: int = 4, alpha: float = 0.1, **args: Any) -> oft.OftNetwork:
    """A network whose modules turn."""
    network = oft.create_network(1.0, dim, alpha, None, text_encoder, unet, **args)
    network.apply_to(text_encoder, unet, False, True)
    network.prepare_grad_etc(text_encoder, unet)
    fill(network)
    return network


@pytest.mark.parametrize(
    ("args", "inside"),
    [
        ({}, {"attn1", "attn2"}),
        ({"enable_all_linear": "True"}, {"attn1", "attn2", "ff", "proj"}),
        ({"enable_conv": "True"}, {"attn1", "attn2", "resnet"}),
        ({"enable_all_linear": "true", "enable_conv": "1"}, {"attn1", "attn2", "ff", "proj", "resnet"}),
        ({"enable_all_linear": "False"}, {"attn1", "attn2"}),
    ],
)
def test_settings_choose_the_modules(
    args: dict[str, Any], inside: set[str], unet: nn.Module, text_encoder: nn.Module
) -> None:
    network = oft.create_network(1.0, 2, 1e-3, None, text_encoder, unet, **args)
    network.apply_to(text_encoder, unet, False, True)

    def kind(path: str) -> str:
        if "attentions" not in path:
            return "resnet"
        return next((part for part in ("attn1", "attn2", "ff") if f".{part}." in path), "proj")

    assert {kind(layer.target.path) for layer in network.layers} == inside
    assert {layer.target.kernel for layer in network.layers} >= ({"3x3"} if "resnet" in inside else {"linear"})


@pytest.mark.parametrize("family", FAMILIES)
def test_files_have_sd_scripts_keys_and_come_back(family: str, tiny_models: Finder, tmp_path: Path) -> None:
    unet, text_encoder = load_unet(tiny_models(family)), load_text_encoder(tiny_models(family))
    before = forward(unet, text_encoder)
    network = attached(unet, text_encoder, dim=2, enable_all_linear="True", enable_conv="True")
    expected = forward(unet, text_encoder)
    assert (expected - before).abs().max() > 1e-3
    path = tmp_path / "oft.safetensors"
    network.save_weights(path, None, {"ss_v2": "False"})
    tensors = load_file(path)
    names = {key.partition(".")[0] for key in tensors}
    assert {key.partition(".")[2] for key in tensors} == {"oft_blocks", "alpha"}
    ours = lora.create_network(1.0, 2, 1, None, None, unet, conv_dim="2")
    assert names == {layer.target.name.replace("lora_unet_", "oft_unet_") for layer in ours._built}
    for layer in network.layers:
        side = layer.target.out_features // 2
        assert tensors[f"{layer.target.name}.oft_blocks"].shape == (2, side, side)
        assert tensors[f"{layer.target.name}.alpha"].shape == ()
    network.remove()
    assert torch.equal(forward(unet, text_encoder), before)

    other = oft.create_network(1.0, 2, 5.0, None, text_encoder, unet, enable_all_linear="True", enable_conv="True")
    other.apply_to(text_encoder, unet)
    assert f"{len(names)} of {len(names)}" in other.load_weights(path)
    torch.testing.assert_close(forward(unet, text_encoder), expected, rtol=0, atol=0)
    other.remove()

    again, held = oft.create_network_from_weights(1.0, path, None, text_encoder, unet)
    again.apply_to(text_encoder, unet)
    again.load_weights(path)
    assert torch.equal(forward(unet, text_encoder), expected)
    again.save_weights(tmp_path / "b.safetensors", None, {"ss_v2": "False"})
    assert (tmp_path / "b.safetensors").read_bytes() == path.read_bytes()
    again.remove()

    merged, held = oft.create_network_from_weights(1.0, path, None, text_encoder, unet, for_inference=True)
    merged.merge_to(text_encoder, unet, held)
    torch.testing.assert_close(forward(unet, text_encoder), expected, rtol=1e-3, atol=1e-4)


def test_diffusers_names_of_sdxl_are_read_too(tiny_sdxl: Path, tmp_path: Path) -> None:
    unet, text_encoder = load_unet(tiny_sdxl), load_text_encoder(tiny_sdxl)
    network = attached(unet, text_encoder)
    renamed = {}
    for layer in network.layers:
        for leaf in ("oft_blocks", "alpha"):
            tensor = network.file_tensors()[f"{layer.target.name}.{leaf}"]
            renamed[f"oft_unet_{layer.target.path.replace('.', '_')}.{leaf}"] = tensor
        if len(renamed) > 6:
            break
    save_file(renamed, tmp_path / "a.safetensors")
    again, _ = oft.create_network_from_weights(
        1.0, tmp_path / "a.safetensors", None, text_encoder, load_unet(tiny_sdxl)
    )
    assert len(again._built) == len(renamed) / 2


def test_a_new_network_changes_nothing_and_its_multiplier_goes_to_the_base(
    unet: nn.Module, text_encoder: nn.Module
) -> None:
    before = forward(unet, text_encoder)
    network = oft.create_network(1.0, 4, 1e-3, None, text_encoder, unet)
    network.apply_to(text_encoder, unet, False, True)
    torch.testing.assert_close(forward(unet, text_encoder), before, rtol=1e-5, atol=1e-5)
    fill(network)
    network.set_multiplier(0.0)
    assert torch.equal(forward(unet, text_encoder), before)
    assert not any("text_model" in name for name, _ in network.named_parameters())


def test_groups_hold_the_unet_alone(unet: nn.Module, text_encoder: nn.Module) -> None:
    network = attached(unet, text_encoder)
    groups, names = network.prepare_optimizer_params_with_multiple_te_lrs([1e-5], None, 1e-4)
    assert names == ["unet"]
    assert [group["lr"] for group in groups] == [1e-4]
    assert {id(one) for one in groups[0]["params"]} == {id(one) for one in network.get_trainable_params()}
    assert network.prepare_optimizer_params(1e-5, 0.0, 1e-4) == ([], [])
    fresh = oft.create_network(1.0, 4, 1e-3, None, text_encoder, unet)
    with pytest.raises(UserError, match="U-Net only"):
        fresh.apply_to(text_encoder, unet, True, False)


def test_a_bfloat16_base_trains_under_autocast(unet: nn.Module, text_encoder: nn.Module) -> None:
    wide = attached(unet, text_encoder, enable_all_linear="True", enable_conv="True")
    expected = forward(unet, text_encoder)
    for model in (unet, text_encoder):
        model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out = forward(unet, text_encoder)
    assert out.dtype == torch.bfloat16
    assert (out - expected).abs().max() < 0.1 * expected.abs().max()
    out.float().square().mean().backward()
    assert {one.grad.dtype for one in wide.parameters() if one.grad is not None} == {torch.float32}


def test_recomputation_gives_the_same_gradients(unet: nn.Module, text_encoder: nn.Module) -> None:
    network = attached(unet, text_encoder)
    states = text_encoder(torch.arange(77)[None])[0].detach()
    found = []
    for again in (False, True):
        network.zero_grad()
        noisy = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        time = torch.tensor([500])
        out = checkpoint(unet, noisy, time, states, use_reentrant=False) if again else unet(noisy, time, states)
        out.sample.square().mean().backward()
        found.append({name: one.grad for name, one in network.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-8)


def test_logged_norms_are_those_of_the_turned_weights(unet: nn.Module, text_encoder: nn.Module) -> None:
    network = attached(unet, text_encoder, enable_conv="true")
    network.set_multiplier(0.5)
    assert network.norms_by_block(True) == network.mean_norms(True) == {}
    forward(unet, text_encoder).square().mean().backward()
    moved, turned, gradients = [], [], []
    for one in network.layers:
        weight = one.base.weight.double()
        whole = turned_weight(weight, one.oft_blocks.detach().double(), 0.1)
        moved.append(float((whole - weight).norm()))
        turned.append(float(whole.norm()))
        assert one.oft_blocks.grad is not None
        gradients.append(float(one.oft_blocks.grad.double().norm()))
    means = {"key": moved, "combined": turned, "grad": gradients}
    found = network.mean_norms(True) | network.mean_norms(False)
    assert {name: float(mean) for name, mean in found.items()} == {
        f"norm/avg_{name}_norm": pytest.approx(sum(every) / len(every), rel=1e-4) for name, every in means.items()
    }
    for each, of_gradients in ((moved, False), (gradients, True)):
        blocks = network.norms_by_block(of_gradients)
        assert len(blocks) > 5 and all(name.startswith("unet_block") for name in blocks)
        assert math.hypot(*map(float, blocks.values())) == pytest.approx(math.hypot(*each), rel=1e-4)


@pytest.mark.parametrize(
    ("dim", "alpha", "args", "says"),
    [
        (5, 1e-3, {}, "5 blocks don't divide"),
        (4, 0, {}, "network_alpha"),
        (4, 1e-3, {"enable_conv": "maybe"}, "enable_conv"),
        (4, 1e-3, {"enable_linear": "1"}, "enable_linear"),
        (4, 1e-3, {"dropout": None, "neuron_dropout": 0.1}, "no dropout"),
    ],
)
def test_bad_settings_are_refused(
    dim: int, alpha: float, args: dict[str, Any], says: str, unet: nn.Module, text_encoder: nn.Module
) -> None:
    with pytest.raises(UserError, match=says):
        oft.create_network(1.0, dim, alpha, None, text_encoder, unet, **args)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("lora", "no key of an OFT file"),
        ("lycoris", "an OFT of LyCORIS"),
        ("alpha", "lacks alpha"),
        ("blocks", "2 blocks, the network 4"),
        ("shape", "don't make up"),
        ("family", "fits"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    change: str, says: str, unet: nn.Module, text_encoder: nn.Module, tmp_path: Path
) -> None:
    network = attached(unet, text_encoder)
    tensors = network.file_tensors()
    name = next(iter(tensors)).partition(".")[0]
    side = tensors[f"{name}.oft_blocks"].shape[-1]
    match change:
        case "lora":
            tensors = {"lora_unet_a.lora_down.weight": torch.zeros(2, 2)}
        case "lycoris":
            tensors = {name.replace("oft_", "lora_") + ".oft_blocks": torch.zeros(2, 2, 2)}
        case "alpha":
            del tensors[f"{name}.alpha"]
        case "blocks":
            tensors[f"{name}.oft_blocks"] = torch.zeros(2, side * 2, side * 2)
        case "shape":
            tensors[f"{name}.oft_blocks"] = torch.zeros(4, side + 1, side + 1)
        case "family":
            tensors = {"oft_unet_x.oft_blocks": torch.zeros(4, 2, 2), "oft_unet_x.alpha": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "bad.safetensors")
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    with pytest.raises(UserError, match=says):
        network.load_weights(tmp_path / "bad.safetensors")
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
    if change in ("shape", "family", "alpha"):
        with pytest.raises(UserError):
            oft.create_network_from_weights(1.0, tmp_path / "bad.safetensors", None, text_encoder, unet)
