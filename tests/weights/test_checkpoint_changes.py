"""Every kind of module in a base model's weights: DoRA, networks.oft, what LyCORIS makes, norms and biases, against the
networks themselves and their formulas."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from library.errors import UserError
from library.weights.checkpoints.changes import changed, leaves_of
from library.weights.loras.lora import Module, read
from networks import oft
from networks.base_weights import merge_base_weights
from tests import lora_files
from tests.merging_weights import assert_close, folder_weights, loaded_weights, merge
from tests.networks.tiny_families import Finder, fill, load_text_encoder, load_unet


@pytest.mark.parametrize("per_input", [False, True])
def test_dora(per_input: bool, tiny_models: Finder, tmp_path: Path) -> None:
    """The new weight has the magnitudes of the file; other strengths go straight there. LyCORIS can weigh inputs."""
    lora = lora_files.write_dora(tmp_path / "dora.safetensors", tiny_models("sd1"), conv_rank=2)
    if per_input:
        module = next(iter(read(lora).modules.values()))
        down, up = module.leaves["lora_down.weight"], module.leaves["lora_up.weight"]
        weight = torch.randn(len(up), *down.shape[1:])
        leaves = {**module.leaves, "dora_scale": torch.rand(1, down.shape[1], *(1,) * (down.dim() - 2)) + 0.5}
        both = weight.double() + (up.double().flatten(1) @ down.double().flatten(1)).view(weight.shape) * 0.5
        norms = both.transpose(0, 1).flatten(1).norm(dim=1).view(leaves["dora_scale"].shape)
        expected = weight.double() + 0.3 * (both / norms * leaves["dora_scale"] - weight.double())
        found = changed(weight.clone(), Module(module.name, leaves, 2.0), 0.3)
        assert (found - expected).abs().max() < 1e-6
        return
    merge(tiny_models("sd1"), lora, tmp_path / "out", 0.6)
    unet, encoder = load_unet(tiny_models("sd1")), load_text_encoder(tiny_models("sd1"))
    merge_base_weights(unet, encoder, [lora], [0.6])
    assert_close(folder_weights(tmp_path / "out"), loaded_weights(unet, encoder))
    with pytest.raises(UserError, match="DoRA"):
        merge(tmp_path / "out", lora, tmp_path / "back", 0.6, unmerge=True)
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_oft(family: str, tiny_models: Finder, tmp_path: Path) -> None:
    unet = load_unet(tiny_models(family))
    network = oft.create_network(1.0, 4, 0.05, None, None, unet, enable_conv="true")
    network.apply_to(None, unet)
    fill(network, 0.3)
    network.save_weights(tmp_path / "oft.safetensors", None, {})
    network.remove()
    merge(tiny_models(family), tmp_path / "oft.safetensors", tmp_path / "out", 0.6)
    again, tensors = oft.create_network_from_weights(0.6, tmp_path / "oft.safetensors", None, None, unet)
    again.merge_to(None, unet, tensors)
    expected = {f"unet.{name}": value for name, value in unet.state_dict().items()}
    assert_close(folder_weights(tmp_path / "out"), expected, 1e-5)
    merge(tmp_path / "out", tmp_path / "oft.safetensors", tmp_path / "back", 0.6, unmerge=True)
    assert_close(folder_weights(tmp_path / "back"), folder_weights(tiny_models(family)), 1e-5)


LYCORIS: dict[str, tuple[str, dict[str, Any]]] = {
    "locon": ("locon", {}),
    "tucker": ("locon", {"use_tucker": True}),
    "loha": ("loha", {}),
    "loha_tucker": ("loha", {"use_tucker": True}),
    "lokr": ("lokr", {"factor": 4}),
    "lokr_both": ("lokr", {"factor": 4, "decompose_both": True}),
    "full": ("full", {}),
    "ia3": ("ia3", {}),
    "ia3_inputs": ("ia3", {"train_on_input": True}),
    "dora_loha": ("loha", {"weight_decompose": True, "wd_on_out": True}),
    "dora_lokr_inputs": ("lokr", {"factor": 4, "weight_decompose": True, "wd_on_out": False}),
}


@pytest.mark.xdist_group("lycoris")
@pytest.mark.parametrize("kind", LYCORIS)
def test_kinds_of_lycoris(kind: str, tiny_models: Finder, tmp_path: Path) -> None:
    """What LyCORIS' own layers make of the weights, on two families' worth of linears and convolutions."""
    pytest.importorskip("lycoris")
    algo, args = LYCORIS[kind]
    given = {"only": "down_blocks_1_|mid_block", "rank": 4, "alpha": 2.0, **args}
    folder = tiny_models("sd1")
    layers = lora_files.lycoris_layers(folder, algo, **given)
    file = lora_files.write_lycoris(tmp_path / "lora.safetensors", folder, algo, **given)
    merge(folder, file, tmp_path / "out")
    found = folder_weights(tmp_path / "out")
    paths = {name: path for name, _, path, _ in lora_files.targets(folder, conv=True)}
    assert layers
    held = load_file(file)
    for name, layer in layers.items():
        weight, bias = layer.org_module[0].weight.detach(), layer.org_module[0].bias
        moved = found[f"unet.{paths[name]}.weight"]
        assert not torch.equal(moved, weight)
        if algo == "full":
            assert torch.equal(moved, weight + held[f"{name}.diff"])
            continue
        with torch.no_grad():
            layer.apply_to()
            layer.eval()
            if weight.dim() == 2:
                x = torch.randn(3, weight.shape[1])
                given_out = functional.linear(x, moved, bias)
            else:
                x = torch.randn(1, weight.shape[1], 5, 5)
                conv = layer.org_module[0]
                given_out = functional.conv2d(x, moved, bias, conv.stride, conv.padding)
            expected = layer(x)
        assert (given_out - expected).abs().max() < 1e-5 * max(1, expected.abs().max()), name
    if "dora" not in kind:
        merge(tmp_path / "out", file, tmp_path / "back", unmerge=True)
        assert_close(folder_weights(tmp_path / "back"), folder_weights(folder), 1e-5)


def test_norms_and_biases(tiny_models: Finder, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    names = {
        "lora_unet_input_blocks_1_0_in_layers_0": "down_blocks.0.resnets.0.norm1",
        "lora_unet_input_blocks_4_1_norm": "down_blocks.1.attentions.0.norm",
        "lora_te1_text_model_final_layer_norm": "final_layer_norm",
    }
    before = folder_weights(tiny_models("sdxl"))
    tensors, expected = {}, {}
    for key, path in names.items():
        part = "text_encoder" if "_te1_" in key else "unet"
        for leaf, ours in (("w_norm", "weight"), ("b_norm", "bias")):
            stem = f"{part}.{path}.{ours}"
            tensors[f"{key}.{leaf}"] = torch.randn(before[stem].shape, generator=draw)
            expected[stem] = before[stem] + 0.5 * tensors[f"{key}.{leaf}"]
    conv = "unet.down_blocks.0.resnets.0.conv1"
    for leaf, ours in (("diff", "weight"), ("diff_b", "bias")):
        value = torch.randn(before[f"{conv}.{ours}"].shape, generator=draw)
        tensors[f"lora_unet_input_blocks_1_0_in_layers_2.{leaf}"] = value
        expected[f"{conv}.{ours}"] = before[f"{conv}.{ours}"] + 0.5 * value
    save_file(tensors, tmp_path / "norms.safetensors", {"ss_base_model_version": "sdxl_base_v1-0"})
    report = merge(tiny_models("sdxl"), tmp_path / "norms.safetensors", tmp_path / "out", 0.5)
    assert report.modules == 4 and report.tensors == 8
    assert_close(folder_weights(tmp_path / "out"), before | expected)


def test_an_alpha_that_is_no_number_is_refused() -> None:
    leaves = {"lora_up.weight": torch.ones(2, 1), "lora_down.weight": torch.ones(1, 2)}
    assert leaves_of(Module("lora_unet_x", leaves, 1.0), "a.safetensors") == ("weight",)
    with pytest.raises(UserError, match=r"a.safetensors: lora_unet_x.alpha is no finite number"):
        leaves_of(Module("lora_unet_x", leaves, float("nan")), "a.safetensors")


def test_ia3_that_scales_to_zero_can_not_be_undone() -> None:
    module = Module("lora_unet_x", {"weight": torch.tensor([-1.0, 0.0]), "on_input": torch.tensor(0)})
    weight = torch.randn(2, 3)
    assert not changed(weight.clone(), module, 1.0)[0].any()
    with pytest.raises(UserError, match="can't be undone"):
        changed(weight, module, 1.0, undo=True)
