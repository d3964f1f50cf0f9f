"""Base models from one layout into the other and back: the same bits, and nothing lost without a word."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.models.inspect import inspect
from library.models.tensors import Reader
from library.weights.checkpoints import folders
from library.weights.checkpoints.layouts import file_shaped, groups, held, unused
from library.weights.checkpoints.opened import BaseModel
from library.weights.checkpoints.single_files import taken_over, write_file
from tests.original_layout import folder_as_single_file, original_tensors

FAMILIES = ["sd1", "sd2", "sdxl"]
WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "text_encoder_2": "text_encoder_2/model.safetensors",
}
SPARE = "cond_stage_model.model.transformer.resblocks.5."
EXTRAS = {
    "betas": np.linspace(0.1, 0.2, 7),
    "model_ema.diffusion_modeltime_embed0bias": np.ones(3),
    "first_stage_model.loss.logvar": np.ones(1),
}
Find = Callable[[str], Path]
Tensors = dict[str, torch.Tensor]


def opened(path: Path) -> BaseModel:
    info = inspect(path)
    return BaseModel(file_shaped(dataclasses.replace(info, prediction_type=info.prediction_type or "v_prediction")))


def to_folder(source: Path, target: Path, dtype: torch.dtype | None = None) -> Path:
    model = opened(source)
    with Reader() as reader:
        folders.write_model(model, held(model), target, reader, dtype=dtype)
    return target


def to_file(source: Path, target: Path, dtype: torch.dtype | None = None, reference: Path | None = None) -> Path:
    model = opened(source)
    tensors = held(model)
    spare = taken_over(opened(reference), model, tensors, "reference") if reference else []
    with Reader() as reader:
        write_file(model, tensors, target, reader, dtype=dtype, spare=spare)
    return target


def weights(folder: Path) -> Tensors:
    """All tensors of a folder, by part, without the level that not all files have."""
    return {
        f"{part}/{name.removeprefix('text_model.')}": tensor
        for part, file in WEIGHTS.items()
        if (folder / file).is_file()
        for name, tensor in load_file(folder / file).items()
        if not name.endswith("position_ids")
    }


def assert_same(first: Tensors, second: Tensors) -> None:
    """Names, shapes, dtypes and bits."""
    assert first.keys() == second.keys()
    for name, one in first.items():
        other = second[name]
        assert (one.dtype, one.shape) == (other.dtype, other.shape), name
        assert one.reshape(-1).view(torch.uint8).equal(other.reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_comes_back_bit_by_bit(family: str, tiny_models: Find, tmp_path: Path) -> None:
    source = tiny_models(family)
    back = to_folder(to_file(source, tmp_path / "model.safetensors"), tmp_path / "back")
    assert_same(weights(source), weights(back))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_so_does_one_of_another_dtype(dtype: torch.dtype, tiny_models: Find, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_models("sdxl"), source)
    for weight in WEIGHTS.values():
        save_file({name: tensor.to(dtype) for name, tensor in load_file(source / weight).items()}, source / weight)
    file = to_file(source, tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {dtype}
    assert_same(weights(source), weights(to_folder(file, tmp_path / "back")))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_has_the_names_and_values_of_published_ones(family: str, tiny_models: Find, tmp_path: Path) -> None:
    found = load_file(to_file(tiny_models(family), tmp_path / "model.safetensors"))
    expected = {name: torch.from_numpy(array) for name, array in original_tensors(tiny_models(family)).items()}
    expected.pop("conditioner.embedders.1.model.logit_scale", None)
    if (scale := "cond_stage_model.model.logit_scale") in expected:
        expected[scale] = expected[scale].reshape(())
    assert_same(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_comes_back_with_what_the_first_one_held(family: str, tiny_models: Find, tmp_path: Path) -> None:
    source = tmp_path / "source.safetensors"
    folder_as_single_file(tiny_models(family), source, dtype="F16", extra=EXTRAS)
    before = load_file(source)
    if family == "sd2":  # such files have another last layer, projection and scale than the made up ones
        draws = torch.Generator().manual_seed(1)
        for name in before:
            if name.startswith((SPARE, "cond_stage_model.model.text_projection")):
                before[name] = torch.randn(before[name].shape, generator=draws).half()
        save_file(before, source)
    folder = to_folder(source, tmp_path / "folder")

    plain = load_file(to_file(folder, tmp_path / "plain.safetensors"))
    model = opened(source)
    left = {one.name for one in unused(model, held(model))}
    assert plain.keys() - left == before.keys() - left
    assert_same({name: plain[name] for name in before.keys() - left}, {n: before[n] for n in before.keys() - left})

    with_reference = load_file(to_file(folder, tmp_path / "whole.safetensors", reference=source))
    assert_same(with_reference, {name: one for name, one in before.items() if not name.startswith("model_ema.")})


def test_what_has_no_place_in_a_folder_is_told_by_kind(tiny_models: Find, tmp_path: Path) -> None:
    source = tmp_path / "source.safetensors"
    marks = {"v_pred": np.zeros(0), "cond_stage_model.model.positional.position_ids": np.zeros(1)}
    folder_as_single_file(tiny_models("sd2"), source, extra={**EXTRAS, **marks})
    model = opened(source)
    found = groups(model, unused(model, held(model)))
    assert {kind: len(names) for kind, names in found.items()} == {
        "the text_encoder's last layer, which no pipeline uses": 12,
        "the text_encoder's text_projection": 1,
        "the text_encoder's logit_scale": 1,
        "buffers of the noise schedule": 1,
        "EMA copies": 1,
        "marks of the prediction type, which stand in the scheduler's config": 1,
        "position ids": 1,
        "tensors of no part of the model": 1,
    }


def test_names_without_text_model_are_read(tiny_models: Find, tmp_path: Path) -> None:
    source = tmp_path / "source.safetensors"
    folder_as_single_file(tiny_models("sdxl"), source, text_model=False)
    assert_same(weights(tiny_models("sdxl")), weights(to_folder(source, tmp_path / "folder")))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_what_a_model_predicts_survives(family: str, tiny_models: Find, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_models(family), source)
    file = source / "scheduler/scheduler_config.json"
    told = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    file.write_text(json.dumps(json.loads(file.read_text()) | told))
    written = to_file(source, tmp_path / "model.safetensors")
    with safe_open(written, "pt") as opened_file:
        assert {"v_pred", "ztsnr"} <= set(opened_file.keys())
        assert opened_file.metadata()["modelspec.prediction_type"] == "v"
        assert opened_file.metadata()["modelspec.architecture"].count("/") == 0
    found = inspect(written)
    assert (found.prediction_type, found.zero_terminal_snr) == ("v_prediction", True)
    back = json.loads((to_folder(written, tmp_path / "back") / "scheduler/scheduler_config.json").read_text())
    assert {key: back[key] for key in told} == told
    assert back["timestep_spacing"] == "trailing"


def test_a_file_keeps_its_metadata_but_no_hash(tiny_models: Find, tmp_path: Path) -> None:
    source = tmp_path / "source.safetensors"
    text = {"modelspec.author": "me", "modelspec.prediction_type": "v", "modelspec.title": "A title"}
    folder_as_single_file(tiny_models("sd1"), source, metadata=text)
    plain = opened(source)
    header = plain.info.parts["unet"].headers[0]
    header.metadata["modelspec.hash_sha256"] = "0x" + "0" * 64
    with Reader() as reader:
        write_file(plain, held(plain), tmp_path / "new.safetensors", reader, metadata={"ss_steps": "9"})
    with safe_open(tmp_path / "new.safetensors", "pt") as file:
        found = file.metadata()
    assert text.items() <= found.items()
    assert found["ss_steps"] == "9"
    assert "modelspec.hash_sha256" not in found


def test_numbers_that_are_too_large_for_a_dtype_are_refused(tiny_models: Find, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_models("sd1"), source)
    tensors = load_file(source / WEIGHTS["vae"])
    tensors["quant_conv.bias"][0] = 1e6
    save_file(tensors, source / WEIGHTS["vae"])
    writers = ((to_folder, tmp_path / "folder"), (to_file, tmp_path / "file.safetensors"))
    for write, target in writers:
        with pytest.raises(UserError, match=r"quant_conv\.bias: holds values that are too large for float16"):
            write(source, target, torch.float16)
    assert [one.name for one in tmp_path.iterdir()] == ["source"]
    to_file(source, tmp_path / "file.safetensors", torch.bfloat16)


def test_an_incomplete_model_and_one_of_other_shapes_are_refused(tiny_models: Find, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_models("sd1"), source)
    tensors = load_file(source / WEIGHTS["unet"])
    del tensors["conv_in.bias"]
    save_file(tensors, source / WEIGHTS["unet"])
    tensors = load_file(source / WEIGHTS["vae"])
    tensors["decoder.conv_in.bias"] = torch.zeros(5)
    save_file(tensors, source / WEIGHTS["vae"])
    with pytest.raises(UserError) as fault:
        held(opened(source))
    lacks, shape = map(str, fault.value.problems)
    assert "lacks 1 of" in lacks
    assert "conv_in.bias" in lacks
    assert "decoder.conv_in.bias" in shape
    assert "(5,)" in shape


def test_a_reference_of_another_kind_is_refused(tiny_models: Find, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is an SD1 model, not SD2"):
        to_file(tiny_models("sd2"), tmp_path / "new.safetensors", reference=tiny_models("sd1_file"))
    with pytest.raises(UserError, match="is a folder"):
        to_file(tiny_models("sd2"), tmp_path / "new.safetensors", reference=tiny_models("sd2"))
    assert not list(tmp_path.iterdir())


def test_matrices_around_transformers_are_as_the_file_has_them_or_as_asked(tiny_models: Find) -> None:
    info = inspect(tiny_models("sd2_file"))
    assert info.unet_config["use_linear_projection"] is False
    assert file_shaped(info).unet_config["use_linear_projection"] is True
    first = file_shaped(inspect(tiny_models("sd1_file")))
    assert first.unet_config["use_linear_projection"] is False
    assert file_shaped(first, linear=True).unet_config["use_linear_projection"] is True
