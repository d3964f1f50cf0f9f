"""What is said of a network before a model is loaded is what the module then makes."""

import importlib
from pathlib import Path
from typing import Any

import pytest

from library.models.inspect import inspect
from networks import lora
from networks.planned import planned, planned_from_file
from tests.networks.tiny_families import FAMILIES, Finder, load_text_encoder, load_unet

SOME = ",".join(str(place % 4) for place in range(25))
CASES: list[tuple[str, dict[str, Any]]] = [
    ("networks.lora", {}),
    ("networks.lora", {"conv_dim": "2"}),
    ("networks.lora", {"conv_dim": "2", "dora": "true"}),
    ("networks.lora", {"down_lr_weight": "linear", "up_lr_weight": "zeros"}),
    ("networks.lora_fa", {}),
    ("networks.dylora", {"unit": "2"}),
    ("networks.oft", {}),
    ("networks.oft", {"enable_all_linear": "true", "enable_conv": "true"}),
]


@pytest.mark.parametrize(("module", "given"), CASES, ids=lambda value: str(value).removeprefix("networks."))
@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_is_what_is_made(family: str, module: str, given: dict[str, Any], tiny_models: Finder) -> None:
    folder = tiny_models(family)
    unet, text_encoder = load_unet(folder), load_text_encoder(folder)
    plan = planned(module, 4, 2.0, given, inspect(str(folder)), ("unet", "text_encoder"))
    assert plan is not None
    network = importlib.import_module(module).create_network(1.0, 4, 2.0, None, text_encoder, unet, **given)
    network.apply_to(text_encoder, unet, True, True)
    network.prepare_optimizer_params(1e-4, 1e-4, 1e-4)
    network.prepare_grad_etc(text_encoder, unet)
    layers = {layer.target.name: layer for layer in network.layers}
    assert [row.target.name for row in plan] == list(layers)
    for row in plan:
        trained = [p.numel() for p in layers[row.target.name].parameters() if p.requires_grad]
        assert row.parameters == sum(trained), row
        if module != "networks.oft":
            assert (row.rank, row.alpha) == (layers[row.target.name].rank, layers[row.target.name].alpha_value)


def test_block_ranks_and_parts_are_planned(tiny_sd1: Path) -> None:
    model = inspect(str(tiny_sd1))
    plan = planned("networks.lora", "4", None, {"block_dims": SOME}, model, ("unet",))
    assert plan is not None
    assert {row.rank for row in plan} == {1, 2, 3}
    assert {row.alpha for row in plan} == {4.0}
    assert {row.target.part for row in plan} == {"unet"}
    assert planned("lycoris.kohya", 4, 1, {}, model, ("unet",)) is None
    assert planned(None, 4, 1, {}, model, ("unet",)) is None


def test_a_file_tells_ranks_and_kinds(tiny_sd1: Path, tmp_path: Path) -> None:
    unet, text_encoder = load_unet(tiny_sd1), load_text_encoder(tiny_sd1)
    network = lora.create_network(1.0, 3, 1.0, None, text_encoder, unet, conv_dim="2", dora="true")
    network.apply_to(text_encoder, unet, False, True)
    network.save_weights(tmp_path / "a.safetensors", None, {})
    file, model = tmp_path / "a.safetensors", inspect(str(tiny_sd1))
    plan = planned_from_file("networks.lora", file, "--network_weights", model, ("unet", "text_encoder"))
    assert plan is not None
    assert {row.target.name: row.rank for row in plan} == {layer.target.name: layer.rank for layer in network.layers}
    assert sum(row.parameters for row in plan) == sum(parameter.numel() for parameter in network.parameters())
