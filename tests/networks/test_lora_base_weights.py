"""`--base_weights`: LoRA files merged into the model, against the formula in float64, and their checks by header."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from library.models.inspect import inspect
from library.options import Options
from library.training.start_weights import check_base_weights
from networks import lora
from networks.base_weights import merge_base_weights
from tests.networks.tiny_families import FAMILIES, Finder, fill, load_text_encoder, load_unet


def saved(unet: nn.Module, text_encoder: Any, file: Path, **given: Any) -> lora.LoraNetwork:
    """A LoRA file that does something."""
    network = lora.create_network(1.0, 4, 3.0, None, text_encoder, unet, **given)
    network.apply_to(text_encoder, unet)
    fill(network, 0.1)
    network.save_weights(file, None, {})
    network.remove()
    return network


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_are_added_with_their_strengths(
    family: str, dtype: torch.dtype, tiny_models: Finder, tmp_path: Path
) -> None:
    unet, text_encoder = load_unet(tiny_models(family)), load_text_encoder(tiny_models(family))
    unet.to(dtype)
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    first = saved(unet, text_encoder, files[0], conv_dim="2", conv_alpha="5")
    saved(unet, text_encoder, files[1])
    before = {name: weight.clone() for name, weight in unet.named_parameters()}
    lines = merge_base_weights(unet, text_encoder, files, [0.5])
    assert len(lines) == 2 and "at 0.5: " in lines[0] and "at 1: " in lines[1]
    held = [load_file(file) for file in files]
    moved = set()
    for layer in first._built:
        if layer.target.part != "unet":
            continue
        name = layer.target.name
        path = f"{layer.target.path}.weight"
        exact = before[path].double()
        for tensors, strength in zip(held, (0.5, 1.0), strict=True):
            if f"{name}.alpha" in tensors:
                down, up = (tensors[f"{name}.lora_{which}.weight"].double() for which in ("down", "up"))
                factor = strength * float(tensors[f"{name}.alpha"]) / len(down)
                exact = (exact + (up.flatten(1) @ down.flatten(1)).view(exact.shape) * factor).to(dtype).double()
        found = unet.get_parameter(path)
        assert found.dtype == dtype
        close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
        torch.testing.assert_close(found.double(), exact, **close)
        moved.add(path)
    assert {name for name, weight in unet.named_parameters() if not torch.equal(weight, before[name])} == moved
    assert not any("forward" in module.__dict__ for module in unet.modules())


def problems(model: Path, *files: Path, strengths: tuple[float, ...] = ()) -> list[str]:
    options = Options.model_validate(
        {"network": {"base_weights": [str(file) for file in files], "base_weights_multiplier": strengths or None}}
    )
    return [str(one) for one in check_base_weights(options, inspect(str(model)))]


def test_headers_tell_what_does_not_fit(tiny_models: Finder, tmp_path: Path) -> None:
    folder = tiny_models("sd1")
    unet, text_encoder = load_unet(folder), load_text_encoder(folder)
    good, dora, other = (tmp_path / f"{name}.safetensors" for name in ("good", "dora", "other"))
    saved(unet, text_encoder, good, conv_dim="2")
    saved(unet, text_encoder, dora, dora="true")
    xl = tiny_models("sdxl")
    saved(load_unet(xl), load_text_encoder(xl), other)
    assert problems(folder, good, dora, strengths=(1.0, 0.5)) == []
    tensors = load_file(good)
    name = next(key for key in tensors if key.endswith("lora_up.weight"))
    save_file(tensors | {name: torch.zeros(3, 4)}, tmp_path / "size.safetensors")
    save_file({"lora_unet_x.hada_w1_a": torch.zeros(2)}, tmp_path / "loha.safetensors")
    cases = {
        "size": "has shape (3, 4)",
        "loha": "LyCORIS file (LoHa)",
        "other": "are not in this base model",
        "none": "there is no file",
    }
    found = problems(folder, *(tmp_path / f"{case}.safetensors" for case in cases), strengths=(1.0,) * 5)
    assert found[0].startswith("--base_weights_multiplier: 5 strengths for 4 files")
    assert len(found) == 1 + len(cases)
    for said, expected in zip(found[1:], cases.values(), strict=True):
        assert said.startswith("--base_weights") and expected in said
