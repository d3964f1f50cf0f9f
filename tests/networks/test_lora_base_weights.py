"""`--base_weights`: LoRA files merged into the model, against the formula in float64, and their checks by header."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from library.errors import UserError
from library.models.inspect import inspect
from library.options import Options
from library.options.modules import LYCORIS
from library.training import start_weights
from library.training.start_weights import check_base_weights
from networks import foreign, lora, oft
from networks.base_weights import merge_base_weights
from networks.facade import text_encoder_facade, unet_facade
from networks.planned import all_targets
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
    assert problems(folder, strengths=(0.5,)) == []
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


def lycoris_file(folder: Path, file: Path, **args: str) -> Any:
    """A file of LyCORIS that does something; its network, not on these models."""
    unet, text_encoder = unet_facade(load_unet(folder)), text_encoder_facade(load_text_encoder(folder))
    given = {"dropout": None, **foreign.arguments(LYCORIS, args)}
    make = foreign.load(LYCORIS).create_network
    network = make(1.0, 4, 2.0, None, text_encoder, unet, neuron_dropout=None, **given)
    network.apply_to(text_encoder, unet, True, True)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    network.save_weights(str(file), None, {})
    return network


@pytest.mark.xdist_group("lycoris")
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_files_of_lycoris_are_merged_in_float32(
    family: str, layout: torch.memory_format, tiny_models: Finder, tmp_path: Path
) -> None:
    """LoHa by its formula, (a1 b1) * (a2 b2) * alpha / rank, into weights in bfloat16."""
    pytest.importorskip("lycoris")
    folder, file = tiny_models(family), tmp_path / "loha.safetensors"
    lycoris_file(folder, file, algo="loha", preset="attn-mlp")
    assert problems(folder, file) == []
    unet, text_encoder = load_unet(folder), load_text_encoder(folder)
    unet.to(torch.bfloat16, memory_format=layout)
    before = {name: weight.clone() for name, weight in unet.named_parameters()}
    held = load_file(file)
    names = {key.partition(".")[0] for key in held}
    (line,) = merge_base_weights(unet, text_encoder, [file], [0.5])
    assert line.endswith(f"at 0.5: {len(names)} modules")
    moved = set()
    for target in all_targets(inspect(str(folder))):
        if target.part != "unet" or target.name not in names:
            continue
        path = f"{target.path}.weight"
        a1, b1, a2, b2 = (held[f"{target.name}.hada_{which}"].double() for which in ("w1_a", "w1_b", "w2_a", "w2_b"))
        change = (a1 @ b1) * (a2 @ b2) * float(held[f"{target.name}.alpha"]) / len(b1)
        found = unet.get_parameter(path)
        exact = before[path].double() + 0.5 * change.view(found.shape)
        assert found.dtype == torch.bfloat16 and found.stride() == before[path].stride()
        assert (found.float() - exact.to(torch.bfloat16).float()).count_nonzero() <= found.numel() / 200
        moved.add(path)
    assert {name for name, weight in unet.named_parameters() if not torch.equal(weight, before[name])} == moved
    assert not any("forward" in module.__dict__ for module in unet.modules())


@pytest.mark.xdist_group("lycoris")
def test_files_of_lycoris_that_do_not_fit_are_told(
    tiny_models: Finder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lycoris")
    folder, file, half = tiny_models("sd1"), tmp_path / "lokr.safetensors", tmp_path / "half.safetensors"
    lycoris_file(tiny_models("sdxl"), file, algo="lokr")
    (told,) = problems(folder, file)
    assert "is a LyCORIS file (LoKr), and none of its" in told
    lycoris_file(folder, half, algo="lokr")
    save_file(load_file(half) | {"lora_unet_elsewhere.lokr_w1": torch.ones(2, 2)}, half)
    unet = load_unet(folder)
    before = {name: weight.clone() for name, weight in unet.named_parameters()}
    with pytest.raises(UserError, match=r"1 of its \d+ modules .* e\.g\. lora_unet_elsewhere"):
        merge_base_weights(unet, load_text_encoder(folder), [half])
    assert all(torch.equal(weight, before[name]) for name, weight in unet.named_parameters())
    monkeypatch.setattr(start_weights, "find_module", lambda name: f"there is no module {name}")
    (told,) = problems(folder, half)
    assert "LyCORIS isn't installed" in told


def test_an_oft_file_of_ours_is_named_as_such(tiny_models: Finder, tmp_path: Path) -> None:
    folder, file = tiny_models("sd1"), tmp_path / "oft.safetensors"
    network = oft.create_network(1.0, 4, 1e-3, None, None, load_unet(folder))
    network.apply_to(None, None)
    network.save_weights(file, None, {})
    (told,) = problems(folder, file)
    assert "is an OFT file of networks.oft" in told and "LyCORIS" not in told
