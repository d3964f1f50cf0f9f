"""Weights by block: slots of names in every spelling, and lists of all lengths."""

import pytest

from library.errors import UserError
from library.models.families import SD1, SD2, SDXL, Family
from library.models.lora_targets import targets
from library.models.single_configs import packaged
from library.weights.loras.block_weights import SLOTS, BlockList, block_list, read_numbers, slot_of


@pytest.mark.parametrize(
    ("name", "slot"),
    [
        ("lora_te_text_model_encoder_layers_3_mlp_fc1", "BASE"),
        ("lora_te2_text_model_encoder_layers_3_mlp_fc1", "BASE"),
        ("first_stage_model.decoder.up.0.block.1.conv1.weight", "BASE"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in", "IN01"),
        ("lora_unet_down_blocks_0_resnets_1_conv1", "IN02"),
        ("lora_unet_down_blocks_0_downsamplers_0_conv", "IN03"),
        ("lora_unet_down_blocks_2_attentions_1_transformer_blocks_0_attn1_to_q", "IN08"),
        ("lora_unet_down_blocks_3_resnets_1_conv2", "IN11"),
        ("lora_unet_mid_block_attentions_0_proj_out", "MID"),
        ("lora_unet_mid_block_resnets_1_conv1", "MID"),
        ("lora_unet_up_blocks_0_upsamplers_0_conv", "OUT02"),
        ("lora_unet_up_blocks_1_attentions_2_proj_in", "OUT05"),
        ("lora_unet_up_blocks_3_attentions_2_proj_in", "OUT11"),
        ("lora_unet_input_blocks_4_1_proj_in", "IN04"),
        ("lora_unet_input_blocks_3_0_op", "IN03"),
        ("lora_unet_middle_block_1_proj_in", "MID"),
        ("lora_unet_output_blocks_5_1_transformer_blocks_1_ff_net_2", "OUT05"),
        ("lora_unet_output_blocks_2_2_conv", "OUT02"),
        ("oft_unet_input_blocks_8_1_transformer_blocks_0_attn1_to_q", "IN08"),
        ("model.diffusion_model.input_blocks.0.0.weight", "IN00"),
        ("model.diffusion_model.time_embed.0.weight", "IN00"),
        ("model.diffusion_model.output_blocks.8.0.in_layers.2.bias", "OUT08"),
        ("unet.up_blocks.2.attentions.1.norm.weight", "OUT07"),
    ],
)
def test_slots(name: str, slot: str) -> None:
    assert SLOTS[slot_of(name, SD1)] == slot


@pytest.mark.parametrize(("family", "slot"), [(SD1, "OUT11"), (SD2, "OUT11"), (SDXL, "OUT08")])
def test_last_layers_go_with_the_last_block(family: Family, slot: str) -> None:
    for name in ("model.diffusion_model.out.2.weight", "unet.conv_out.weight", "lora_unet_out_0"):
        assert SLOTS[slot_of(name, family)] == slot


@pytest.mark.parametrize("family", [SD1, SD2, SDXL])
def test_both_spellings_and_each_family_s_lists_agree(family: Family) -> None:
    unet = packaged(family.name, "unet")
    found = targets(unet, [], conv=True, unet_key=family.unet_key)
    short, every = (12, 20) if family.takes_sizes else (17, 26)
    lists = {length: block_list((0.5,) * length, family, "") for length in (short, every)}
    for target in found:
        assert slot_of(target.name, family) == slot_of(f"unet.{target.path}", family)
        assert lists[every].names(target.name)
        if "attentions" in target.path:
            assert lists[short].names(target.name), target.name
            assert lists[short](target.name) == 0.5


def _at(found: BlockList) -> dict[str, float]:
    """The slots whose weight isn't 1."""
    return {slot: value for slot, value in zip(SLOTS, found.values, strict=True) if value != 1}


@pytest.mark.parametrize(
    ("length", "family", "slots"),
    [
        (12, SDXL, "BASE IN04 IN05 IN07 IN08 MID OUT00 OUT01 OUT02 OUT03 OUT04 OUT05"),
        (17, SD1, "BASE IN01 IN02 IN04 IN05 IN07 IN08 MID OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11"),
        (20, SDXL, f"BASE {' '.join(f'IN0{n}' for n in range(9))} MID {' '.join(f'OUT0{n}' for n in range(9))}"),
        (26, SD2, " ".join(SLOTS)),
    ],
)
def test_lists_name_these_slots(length: int, family: Family, slots: str) -> None:
    numbers = tuple(float(place + 2) for place in range(length))
    assert _at(block_list(numbers, family, "")) == dict(zip(slots.split(), numbers, strict=True))


def test_what_a_list_does_not_name_keeps_its_weight() -> None:
    found = block_list((0.0,) * 17, SD1, "")
    assert found("lora_unet_down_blocks_0_downsamplers_0_conv") == 1
    assert not found.names("lora_unet_down_blocks_0_downsamplers_0_conv")
    assert found("lora_unet_down_blocks_0_attentions_0_proj_in") == 0


def test_json_or_numbers_with_commas() -> None:
    assert read_numbers("[1, 0.5" + ", 0" * 10 + "]", "") == read_numbers("1,0.5" + ",0" * 10, "")


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("[1,2,3]", "has 3 numbers"),
        ("[1,2", "is no list"),
        ("[" + "true," * 11 + "true]", "true in it is no finite number"),
        ("[" + "NaN," * 11 + "1]", "NaN in it is no finite number"),
        ('["1"' + ",1" * 11 + "]", '"1" in it is no finite number'),
    ],
)
def test_what_is_no_list_is_one_line(text: str, wrong: str) -> None:
    with pytest.raises(UserError) as caught:
        read_numbers(text, "--lbws")
    (line,) = str(caught.value).splitlines()
    assert wrong in line


@pytest.mark.parametrize(("length", "family"), [(12, SD1), (20, SD2), (17, SDXL), (26, SDXL)])
def test_lists_for_another_family(length: int, family: Family) -> None:
    with pytest.raises(UserError, match=f"has {length} numbers, but the file is made for {family.title}"):
        block_list((1.0,) * length, family, "--lbws")
