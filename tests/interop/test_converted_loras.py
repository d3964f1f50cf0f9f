"""diffusers, with peft, loads what tools/convert_lora.py writes in each layout, and fuses the same weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.weights.loras.lora import read
from tests import lora_files
from tests.programs import tool

Finder = Callable[[str], Path]
FAMILIES = ("sd1", "sd2", "sdxl")
LAYOUTS = ("kohya-diffusers", "peft", "diffusers")


def convert(*words: object) -> None:
    assert tool("convert_lora")([str(word) for word in words]) == 0


def alike(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(tensor, other[key], rtol=0, atol=tolerance, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_weights_from_every_layout(family: str, tiny_models: Finder, tmp_path: Path) -> None:
    """Ranks and alphas differ between modules, so that settings have patterns."""
    folder = tiny_models(family)
    path = lora_files.write_kohya(tmp_path / "k.safetensors", folder, conv_rank=2, alpha=3.0)
    expected, base = lora_files.applied(path, folder), lora_files.base_weights(folder)
    assert sum(not torch.equal(tensor, base[key]) for key, tensor in expected.items()) == len(read(path).modules)
    for layout in LAYOUTS:
        convert(path, tmp_path / "other.safetensors", "--to", layout)
        alike(lora_files.applied(tmp_path / "other.safetensors", folder), expected)


@pytest.mark.parametrize("family", ["sdxl"])
def test_a_file_of_peft_in_kohyas_layout(family: str, tiny_models: Finder, tmp_path: Path) -> None:
    folder = tiny_models(family)
    path = lora_files.write_peft(tmp_path / "p.safetensors", folder, conv=True, rank=4, alpha=3.0)
    convert(path, tmp_path / "k.safetensors", "--to", "kohya")
    alike(lora_files.applied(tmp_path / "k.safetensors", folder), lora_files.applied(path, folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dora_in_pefts_layout(family: str, tiny_models: Finder, tmp_path: Path) -> None:
    """diffusers leaves `dora_scale` out of kohya's layout; of peft's it makes m (W + D) / ||W + D||."""
    folder = tiny_models(family)
    path = lora_files.write_dora(tmp_path / "d.safetensors", folder, conv_rank=2)
    convert(path, tmp_path / "p.safetensors", "--to", "peft")
    found, base, modules = lora_files.applied(tmp_path / "p.safetensors", folder), lora_files.base_weights(folder), {}
    tensors = load_file(path)
    for name, part, place, _ in lora_files.targets(folder, conv=True):
        weight = base[f"{part}.{place}.weight"]
        up, down = (tensors[f"{name}.lora_{way}.weight"].flatten(1) for way in ("up", "down"))
        both = weight.flatten(1) + up @ down * (2.0 / down.shape[0])
        modules[name] = both * (tensors[f"{name}.dora_scale"].flatten() / both.norm(dim=1))[:, None]
        key = f"{part}.{place}.weight"
        torch.testing.assert_close(found[key], modules[name].view(weight.shape), rtol=1e-4, atol=1e-4)
    assert len(modules) == len(read(path).modules)


def test_lycoris_as_a_plain_lora_is_loaded(tiny_sd1: Path, tmp_path: Path) -> None:
    """Of a LoHa on all that LyCORIS trains here diffusers takes nothing; made plain it gives what LyCORIS computes."""
    only = "down_blocks_0_(attentions_0_.*attn|resnets_0_conv)|lora_te_.*layers_0"
    path = lora_files.write_lycoris(tmp_path / "l.safetensors", tiny_sd1, "loha", only=only, rank=2, text=True)
    convert(path, tmp_path / "p.safetensors", "--to", "peft", "--as_lora")
    found, base = lora_files.applied(tmp_path / "p.safetensors", tiny_sd1), lora_files.base_weights(tiny_sd1)
    layers = lora_files.lycoris_layers(tiny_sd1, "loha", only=only, rank=2, text=True)
    for name, part, place, _ in lora_files.targets(tiny_sd1, conv=True):
        if name in layers:
            key = f"{part}.{place}.weight"
            change = layers[name].get_weight(layers[name].shape).detach().view(base[key].shape)
            torch.testing.assert_close(found[key] - base[key], change, rtol=1e-4, atol=1e-6)
    assert len(layers) == sum(not torch.equal(base[key], tensor) for key, tensor in found.items())
