"""What modules of a file mean as numbers, against LyCORIS' own words and the formula."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from library.weights.loras.forms import as_leaves, delta, factors, kind
from library.weights.loras.lora import Module, read
from tests import lora_files

pytestmark = pytest.mark.xdist_group("lycoris")
Finder = Callable[[str], Path]
SOME = "0_attentions_0_.*(attn2_to_k|attn1_to_q|ff_net_0|proj_in)|down_blocks_1_resnets_0_conv|time_emb"
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "locon": ("locon", "lora", {}),
    "tucker": ("locon", "tucker", {"use_tucker": True}),
    "wide tucker": ("locon", "tucker", {"use_tucker": True, "rank": 40}),
    "loha": ("loha", "loha", {}),
    "loha of Tucker": ("loha", "loha", {"use_tucker": True}),
    "wide loha": ("loha", "loha", {"rank": 9}),
    "lokr": ("lokr", "lokr", {"factor": 4}),
    "lokr of four": ("lokr", "lokr", {"factor": 8, "decompose_both": True, "rank": 2}),
    "lokr of Tucker": ("lokr", "lokr", {"use_tucker": True, "factor": 4}),
    "whole lokr": ("lokr", "lokr", {"rank": 1000}),
    "dylora": ("dylora", "lora", {}),
}


@pytest.mark.parametrize("what", KINDS)
def test_factors_are_those_of_lycoris(what: str, tiny_models: Finder, tmp_path: Path) -> None:
    algo, name, more = KINDS[what]
    args: dict[str, Any] = {"only": SOME, "alpha": 3.0, **more}
    folder = tiny_models("sd1")
    path = lora_files.write_lycoris(tmp_path / "theirs.safetensors", folder, algo, **args)
    theirs = lora_files.lycoris_layers(folder, algo, **args)
    ours = read(path).modules
    assert ours.keys() == theirs.keys()
    told = {kind(module) for module in ours.values()}
    assert name in told
    for key, module in ours.items():
        made, whole = factors(module), delta(module)
        assert made is not None
        assert whole is not None
        with torch.no_grad():
            layer = theirs[key].double()
            layer.train()
            expected = _difference(layer, algo)
        assert tuple(whole.shape) == made.shape, key
        if expected.shape[2:] == (3, 3):
            assert whole.shape == expected.shape, key
        expected = expected.view(whole.shape)
        torch.testing.assert_close(whole, expected, rtol=1e-6, atol=1e-8, msg=lambda m, key=key: f"{key}: {m}")
        torch.testing.assert_close((made.up @ made.down).mul(made.scale).view(made.shape), whole)


def _difference(layer: Any, algo: str) -> torch.Tensor:
    """The change that a layer of LyCORIS makes of its weight; `get_diff_weight` of LoHa and LoKr counts the scale
    twice, their forward, which uses `get_weight`, once."""
    if algo in ("loha", "lokr"):
        once: torch.Tensor = layer.get_weight(layer.shape)
        return once
    if algo == "dylora":
        down, up = torch.cat(list(layer.down_list)), torch.cat(list(layer.up_list), dim=1)
        return (up @ down).mul(layer.alpha / layer.lora_dim).view(layer.shape)
    found: torch.Tensor = layer.get_diff_weight(1)[0].view(layer.shape)
    return found


def test_whole_matrices_have_a_change_and_no_factors(tiny_models: Finder, tmp_path: Path) -> None:
    folder = tiny_models("sd1")
    path = lora_files.write_lycoris(tmp_path / "full.safetensors", folder, "full", only=SOME)
    for name, layer in lora_files.lycoris_layers(folder, "full", only=SOME).items():
        module = read(path).modules[name]
        assert factors(module) is None
        found = delta(module)
        assert found is not None
        torch.testing.assert_close(found.float(), layer.state_dict()["diff"])


@pytest.mark.parametrize("algo", ["ia3", "glora", "diag-oft", "boft"])
def test_what_depends_on_the_weight_is_no_plain_change(algo: str, tiny_models: Finder, tmp_path: Path) -> None:
    path = lora_files.write_lycoris(tmp_path / "other.safetensors", tiny_models("sd1"), algo, only=SOME)
    modules = read(path).modules
    assert modules
    for module in modules.values():
        assert delta(module) is None
        assert factors(module) is None


def test_a_dora_has_the_factors_of_its_direction(tiny_models: Finder, tmp_path: Path) -> None:
    folder = tiny_models("sd2")
    plain = read(lora_files.write_kohya(tmp_path / "plain.safetensors", folder, conv_rank=2)).modules
    dora = read(lora_files.write_dora(tmp_path / "dora.safetensors", folder, conv_rank=2)).modules
    assert plain.keys() == dora.keys()
    for name, module in dora.items():
        assert kind(module) == "dora"
        assert delta(module) is None
        made, expected = factors(module), factors(plain[name])
        assert made is not None
        assert expected is not None
        assert torch.equal(made.product(), expected.product())


def test_leaves_of_factors_mean_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    for kernel in ((), (1, 1), (3, 3)):
        down, up = torch.randn(3, 5, *kernel, generator=generator), torch.randn(7, 3, generator=generator)
        leaves = {"lora_down.weight": down, "lora_up.weight": up.view(7, 3, *(1 for _ in kernel))}
        made = factors(Module("lora_unet_x", leaves, 1.5), torch.float32)
        assert made is not None
        back = as_leaves(made, torch.float32)
        assert all(torch.equal(back[leaf], tensor) for leaf, tensor in leaves.items())
        whole = torch.einsum("or,ri...->oi...", up, down) * 0.5
        torch.testing.assert_close(made.product(), whole)


def test_a_file_without_alphas_counts_as_it_is() -> None:
    leaves = {"lora_down.weight": torch.eye(2), "lora_up.weight": torch.eye(2)}
    found = delta(Module("lora_unet_x", leaves))
    assert found is not None
    assert torch.equal(found, torch.eye(2, dtype=torch.float64))
