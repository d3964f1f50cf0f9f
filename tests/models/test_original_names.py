"""The names of the original layout, at the true size of every family, against diffusers' own way back."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection

from library.errors import UserError
from library.models import single_file
from library.models.families import FAMILIES, Family, FamilyName, Part
from library.models.headers import Entry, Header
from library.models.info import PartInfo
from library.models.original_names import Original, originals, prefix
from library.models.single_configs import packaged
from tests.full_size import shapes

BOTH = [(name, part) for name, family in FAMILIES.items() for part in family.parts]
SMALLER_UNET = {"block_out_channels": [320, 640, 1280], "layers_per_block": 1}


def built(family: Family, part: Part, config: Mapping[str, Any]) -> torch.nn.Module:
    """A part without values, by diffusers and transformers alone."""
    with torch.device("meta"):
        if part == "unet":
            return UNet2DConditionModel.from_config(dict(config))
        if part == "vae":
            return AutoencoderKL.from_config(dict(config))
        projects = next(one for one in family.text_encoders if one.part == part).projects
        return (CLIPTextModelWithProjection if projects else CLIPTextModel)(CLIPTextConfig(**config))


def table(
    family: Family, part: Part, config: Mapping[str, Any], module: torch.nn.Module
) -> tuple[list[Original], dict[str, tuple[int, ...]]]:
    """What is named, and the shapes of the module's tensors."""
    wanted = {name.removeprefix("text_model."): tuple(one.shape) for name, one in module.state_dict().items()}
    return list(originals(family, part, config, wanted)), wanted


def stood(named: list[Original], wanted: Mapping[str, tuple[int, ...]]) -> Header:
    """The header of a file that holds just this."""
    found = {one.name: one.shape([wanted[target] for target in one.targets]) for one in named}
    return Header(Path("model"), {name: Entry("F32", shape, 0, 0) for name, shape in found.items()}, {})


@pytest.mark.parametrize(("name", "part"), BOTH)
def test_diffusers_finds_each_tensor_again(name: FamilyName, part: Part) -> None:
    family = FAMILIES[name]
    config = packaged(name, part)
    module = built(family, part, config)
    named, wanted = table(family, part, config, module)
    info = PartInfo(config, (stood(named, wanted),), True, prefix(family, part), "model")
    found = {one.target: one for one in single_file.sources(family, part, info, module)}
    assert found.keys() == wanted.keys()
    for one in named:
        rows = 0
        for target in one.targets:
            assert found[target].name == one.name
            assert found[target].transpose == one.turned
            if len(one.targets) > 1:
                assert found[target].rows == (rows, rows := rows + wanted[target][0])
            without_ones = [side for side in found[target].shape if side != 1]
            assert without_ones == [side for side in wanted[target] if side != 1]


@pytest.mark.parametrize("name", FAMILIES)
def test_names_and_shapes_are_those_of_full_size_files(name: FamilyName) -> None:
    family = FAMILIES[name]
    found: dict[str, tuple[int, ...]] = {}
    for part in family.parts:
        config = packaged(name, part)
        named, wanted = table(family, part, config, built(family, part, config))
        found |= {one: entry.shape for one, entry in stood(named, wanted).entries.items()}
    written = shapes(name)
    left = {"cond_stage_model.model.logit_scale", "cond_stage_model.model.text_projection"} | {
        one for one in written if ".resblocks.23." in one and name == "sd2"
    }
    left.add("conditioner.embedders.1.model.logit_scale")
    squeezed = {one: tuple(s for s in shape if s != 1) for one, shape in written.items() if one not in left}
    assert {one: tuple(s for s in shape if s != 1) for one, shape in found.items()} == squeezed
    if name != "sd2":  # whose packaged config has kernels where files have matrices
        assert found == {one: shape for one, shape in written.items() if one not in left}


def test_shapes_are_those_of_published_files() -> None:
    inner = "model.diffusion_model.input_blocks.{}.1.proj_in.weight"
    published: list[tuple[FamilyName, int, tuple[int, ...]]] = [
        *(("sd1", 1, (320, 320, 1, 1)), ("sd2", 1, (320, 320)), ("sdxl", 4, (640, 640))),
    ]
    for name, block, shape in published:
        config = packaged(name, "unet")
        named, wanted = table(FAMILIES[name], "unet", config, built(FAMILIES[name], "unet", config))
        assert stood(named, wanted).shape(inner.format(block)) == shape
    config = packaged("sdxl", "vae")
    named, wanted = table(FAMILIES["sdxl"], "vae", config, built(FAMILIES["sdxl"], "vae", config))
    header = stood(named, wanted)
    assert header.shape("first_stage_model.encoder.mid.attn_1.q.weight") == (512, 512, 1, 1)
    assert header.shape("first_stage_model.encoder.mid.attn_1.norm.weight") == (512,)


def test_blocks_are_counted_by_the_config() -> None:
    family = FAMILIES["sd1"]
    config = packaged("sd1", "unet") | SMALLER_UNET
    config |= {key: config[key][:3] for key in ("down_block_types",)} | {"up_block_types": config["up_block_types"][1:]}
    module = built(family, "unet", config)
    named, wanted = table(family, "unet", config, module)
    info = PartInfo(config, (stood(named, wanted),), True, prefix(family, "unet"), "model")
    assert {one.target for one in single_file.sources(family, "unet", info, module)} == wanted.keys()


def test_what_has_no_name_is_refused() -> None:
    config = packaged("sd1", "unet")
    with pytest.raises(UserError, match="no name in the original layout"):
        list(originals(FAMILIES["sd1"], "unet", config, ["down_blocks.0.motion_modules.0.proj_in.weight"]))
    text = packaged("sd2", "text_encoder")
    alone = "encoder.layers.0.self_attn.q_proj.weight"
    with pytest.raises(UserError, match="no name in the original layout"):
        list(originals(FAMILIES["sd2"], "text_encoder", text, [alone]))
    assert replace(Original("a", ("b",)), dims=4).shape([(3, 2)]) == (3, 2, 1, 1)
