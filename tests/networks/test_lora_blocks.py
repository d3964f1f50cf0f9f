"""Ranks, alphas and learning rates by block, against the numbering that sd-scripts documents."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from library.errors import UserError
from library.models.families import SD1, SDXL, diffusers_key
from library.models.lora_targets import targets
from library.models.sgm_names import sgm_key
from library.options.block_lists import BlockWeights, read_block_list
from networks import lora
from networks.blocks import block_index, block_notices, block_problems, block_weights, shaped
from networks.lora_args import LoraArgs, parse
from tests.networks.tiny_families import Finder, forward, load_text_encoder, load_unet

SD = {"block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768}
XL = {
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": [1, 2, 10],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "time_embedding_dim": 1280,
}
TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
INDICES = {
    "lora_unet_down_blocks_0_attentions_0_proj_in": 1,
    "lora_unet_down_blocks_0_resnets_1_conv1": 2,
    "lora_unet_down_blocks_0_downsamplers_0_conv": 3,
    "lora_unet_down_blocks_2_attentions_1_proj_in": 8,
    "lora_unet_down_blocks_3_resnets_1_conv1": 11,
    "lora_unet_mid_block_attentions_0_proj_in": 12,
    "lora_unet_mid_block_resnets_1_conv1": 12,
    "lora_unet_up_blocks_0_resnets_0_conv1": 13,
    "lora_unet_up_blocks_0_upsamplers_0_conv": 15,
    "lora_unet_up_blocks_1_attentions_2_proj_in": 18,
    "lora_unet_up_blocks_3_attentions_2_proj_in": 24,
    "lora_unet_input_blocks_1_0_in_layers_2": 2,
    "lora_unet_input_blocks_3_0_op": 4,
    "lora_unet_input_blocks_8_1_proj_in": 9,
    "lora_unet_middle_block_0_in_layers_2": 10,
    "lora_unet_middle_block_1_proj_in": 11,
    "lora_unet_middle_block_2_in_layers_2": 12,
    "lora_unet_output_blocks_0_1_proj_in": 13,
    "lora_unet_output_blocks_2_2_conv": 15,
    "lora_unet_output_blocks_8_0_out_layers_3": 21,
}


def test_blocks_are_numbered_as_sd_scripts_numbers_them() -> None:
    found = {}
    for config, family, key in ((SD, SD1, diffusers_key), (XL, SDXL, sgm_key)):
        for target in targets(config, [], conv=True, unet_key=key):
            found[target.name] = block_index(target, family.blocks)
    assert {name: found[name] for name in INDICES} == INDICES
    assert (SD1.blocks.length, SDXL.blocks.length) == (25, 23)
    ours = [index for name, index in found.items() if "_blocks_" in name and ("down_" in name or "up_" in name)]
    assert set(ours) | {12} == set(range(1, 25))
    assert {index for name, index in found.items() if "put_blocks" in name or "middle" in name} == set(range(2, 22))


def listed(values: Mapping[int, float], length: int, rest: float = 0) -> str:
    return ",".join(f"{values.get(place, rest):g}" for place in range(length))


def shapes(given: dict[str, str], dim: int = 4) -> dict[str, tuple[int, float]]:
    args = parse(dim, 2, given)
    found = targets(SD, [TEXT], conv=True)
    return {target.name: (rank, alpha) for target, rank, alpha in shaped(found, args, SD1.blocks)}


def test_each_block_has_its_rank_and_alpha_and_rank_0_trains_nothing() -> None:
    given = {"block_dims": listed({1: 8, 12: 16}, 25), "block_alphas": listed({1: 3}, 25)}
    found = shapes(given)
    unet = {name: shape for name, shape in found.items() if "unet" in name}
    assert Counter(unet.values()) == {(8, 3.0): 12, (16, 16.0): 12}
    assert {shape for name, shape in found.items() if "unet" not in name} == {(4, 2.0)}
    conv = shapes(given | {"conv_block_dims": listed({1: 2, 2: 5}, 25), "conv_alpha": "0.5"})
    three = {name: shape for name, shape in conv.items() if name.endswith(("conv1", "conv2", "_conv"))}
    assert three == {
        **{f"lora_unet_down_blocks_0_resnets_0_conv{number}": (2, 0.5) for number in (1, 2)},
        **{f"lora_unet_down_blocks_0_resnets_1_conv{number}": (5, 0.5) for number in (1, 2)},
    }
    assert conv["lora_unet_down_blocks_0_resnets_0_time_emb_proj"] == (8, 3.0)
    assert shapes(given | {"conv_dim": "6"})["lora_unet_up_blocks_0_upsamplers_0_conv"] == (6, 1.0)


def test_weights_alone_take_the_ranks_of_the_network_and_leave_out_blocks_with_weight_0() -> None:
    found = shapes({"down_lr_weight": "0,1,.5,1,1,1,1,1,1,1,1,1", "up_lr_weight": "zeros", "mid_lr_weight": ""})
    unet = [name for name in found if "unet" in name]
    assert {found[name] for name in unet} == {(4, 2.0)}
    assert {INDICES.get(name) for name in unet if name in INDICES} == {1, 8, 12}
    assert not any("_up_blocks_" in name for name in unet)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cosine", [math.sin(math.pi / 2 * place / 8) for place in range(8, -1, -1)]),
        ("sine", [math.sin(math.pi / 2 * place / 8) for place in range(9)]),
        ("linear", [place / 8 for place in range(9)]),
        ("reverse_linear", [place / 8 for place in range(8, -1, -1)]),
        ("zeros+.25", [0.25] * 9),
        ("sine+0.5", [math.sin(math.pi / 2 * place / 8) + 0.5 for place in range(9)]),
        ("1,,3", [1, 0, 3, 1, 1, 1, 1, 1, 1]),
        ("1,2,3,4,5,6,7,8,9,10,11,12", [1, 2, 3, 4, 5, 6, 7, 8, 9]),
    ],
)
def test_weights_are_numbers_or_presets(text: str, expected: list[float]) -> None:
    weights = read_block_list("down_lr_weight", text)
    assert isinstance(weights, BlockWeights)
    assert weights.values(9) == pytest.approx(expected)
    found = block_weights(LoraArgs(4, 4.0, down_lr_weight=weights, block_lr_zero_threshold=0.25), SDXL.blocks)
    kept = [value if value > 0.25 else 0 for value in expected]
    assert found == pytest.approx([1.0, *kept, *[1.0] * 3, *[1.0] * 9, 1.0])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"down_lr_weight": "cosinus"}, "did you mean cosine?"),
        ({"down_lr_weight": "0.5"}, "neither numbers with commas nor a preset"),
        ({"up_lr_weight": "1,a"}, "'a' is not a number"),
        ({"block_dims": "4,4.5"}, "'4.5' is not a whole number"),
        ({"block_alphas": "4,-1"}, "'-1' is not a number from 0"),
        ({"block_dimms": "4"}, "did you mean block_dims?"),
        ({"loraplus_lr_ratio": "0"}, "must be above 0"),
        ({"dora": "yes"}, "neither true nor false"),
    ],
)
def test_what_cannot_be_read_is_refused(given: dict[str, str], says: str) -> None:
    with pytest.raises(UserError, match=says.replace("?", r"\?")):
        parse(4, 1, given)


def test_lengths_are_checked_as_soon_as_the_family_is_known() -> None:
    given = {"block_dims": listed({}, 25, 4), "conv_block_alphas": "1,1"}
    assert [str(one) for one in block_problems(given, SD1)] == [
        "--network_args: conv_block_alphas has 2 entries, and SD1 has 25 blocks; write 12 down + 1 mid + 12 up"
    ]
    problems = list(block_problems(given, SDXL))
    assert "block_dims has 25 entries, and SDXL has 23 blocks; write 1 + 9 down + 3 mid + 9 up + 1" in str(problems[0])
    assert len(problems) == 2
    with pytest.raises(UserError, match="block_dims has 25 entries"):
        list(shaped((), parse(4, 1, given), SDXL.blocks))
    weights = {"down_lr_weight": listed({}, 12, 1), "mid_lr_weight": "0.5", "up_lr_weight": "sine"}
    assert not list(block_notices(weights, SD1))
    assert [line.partition(": ")[2] for line in block_notices(weights, SDXL)] == [
        "down_lr_weight has 12 numbers for the 9 blocks of SDXL; the last ones are left out",
        "mid_lr_weight has 1 numbers for the 3 blocks of SDXL; the rest count as 1",
    ]


def groups_of(
    unet: nn.Module, text_encoder: Any, **given: Any
) -> tuple[lora.LoraNetwork, dict[str, tuple[float, list[nn.Parameter]]]]:
    network = lora.create_network(1.0, 4, 2.0, None, text_encoder, unet, **given)
    network.apply_to(text_encoder, unet)
    groups, names = network.prepare_optimizer_params_with_multiple_te_lrs([1e-5], 1e-4, 1e-3)
    assert len(set(names)) == len(names) == len(groups)
    return network, {name: (group["lr"], group["params"]) for name, group in zip(names, groups, strict=True)}


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_groups_by_block_with_lora_plus_hold_every_parameter_once(family: str, tiny_models: Finder) -> None:
    unet, text_encoder = load_unet(tiny_models(family)), load_text_encoder(tiny_models(family))
    down = (SD1 if family == "sd1" else SDXL).blocks.down
    given = {"down_lr_weight": "linear+1", "loraplus_lr_ratio": "4", "loraplus_text_encoder_lr_ratio": "2"}
    network, groups = groups_of(unet, text_encoder, conv_dim="2", dora="true", **given)
    everything = [parameter for _, parameters in groups.values() for parameter in parameters]
    assert {id(one) for one in everything} == {id(one) for one in network.parameters()}
    assert len(everything) == len(list(network.parameters()))
    first = 1 if family == "sd1" else 2
    for place in range(first, first + 3):
        weight = 1 + (place - (family == "sdxl")) / (down - 1)
        assert groups[f"unet_block{place}"][0] == pytest.approx(1e-4 * weight)
        assert groups[f"unet_block{place} plus"][0] == pytest.approx(4e-4 * weight)
    encoders = ["textencoder"] if family == "sd1" else ["textencoder1", "textencoder2"]
    for name in encoders:
        assert (groups[name][0], groups[f"{name} plus"][0]) == (1e-5, 2e-5)
    ups = {id(layer.lora_up.weight) for layer in network.layers}
    assert {id(one) for name, (_, params) in groups.items() if name.endswith("plus") for one in params} == ups


def test_lora_plus_of_the_unet_alone(unet: nn.Module, text_encoder: nn.Module) -> None:
    _, groups = groups_of(unet, text_encoder, loraplus_unet_lr_ratio="16")
    assert {name: rate for name, (rate, _) in groups.items()} == {"textencoder": 1e-5, "unet": 1e-4, "unet plus": 16e-4}


def test_blocks_of_a_file_with_weight_0_stay_as_they_are(
    unet: nn.Module, text_encoder: nn.Module, tmp_path: Any
) -> None:
    first = lora.create_network(1.0, 4, 2.0, None, text_encoder, unet)
    first.apply_to(text_encoder, unet)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(0.01)
    expected = forward(unet, text_encoder)
    first.save_weights(tmp_path / "a.safetensors", None, {})
    first.remove()
    again, _ = lora.create_network_from_weights(
        1.0, tmp_path / "a.safetensors", None, text_encoder, unet, up_lr_weight="zeros"
    )
    again.apply_to(text_encoder, unet)
    again.load_weights(tmp_path / "a.safetensors")
    groups, names = again.prepare_optimizer_params(1e-4, 1e-4, 1e-4)
    again.prepare_grad_etc(text_encoder, unet)
    assert torch.equal(forward(unet, text_encoder), expected)
    frozen = {name for name, parameter in again.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in again.named_parameters() if "_up_blocks_" in name}
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in again.get_trainable_params()}
    assert "unet_block12" in names and "unet_block13" not in names
    assert set(again.file_tensors()) == set(first_names(tmp_path / "a.safetensors"))


def first_names(file: Any) -> list[str]:
    from safetensors.torch import load_file

    return list(load_file(file))
