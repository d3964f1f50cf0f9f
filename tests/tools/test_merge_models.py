"""merge_models.py on tiny checkpoints, against sums in float64 and diffusers' own loader."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.models.inspect import inspect
from library.weights.checkpoints.blend import bent
from tests.lora_files import damage, write_kohya
from tests.original_layout import folder_as_single_file
from tests.programs import tool

merge = tool("merge_models")
Tiny = Callable[[str], Path]
UNET = "model.diffusion_model."


def other(path: Path, seed: int, folder: Path, **change: Any) -> Path:
    """A second model of the same shape: every float tensor of `path` with noise of a tenth of its size."""
    draws = torch.Generator().manual_seed(seed)
    found = {}
    for name, tensor in load_file(path).items():
        noise = torch.randn(tensor.shape, generator=draws) if tensor.is_floating_point() else 0
        found[name] = tensor + 0.1 * noise if tensor.is_floating_point() else tensor
    new = folder / f"other_{seed}.safetensors"
    save_file(found | change, new, {"modelspec.title": f"Model {seed}"})
    return new


def run(models: list[Path], out: Path, *more: object) -> dict[str, Tensor]:
    assert merge(["--models", *map(str, models), "--output", str(out), *map(str, more)]) == 0
    return load_file(out)


def check(
    found: dict[str, Tensor], files: list[Path], weights: list[float], dtype: torch.dtype = torch.float32
) -> None:
    tensors = [load_file(file) for file in files]
    assert found.keys() == tensors[0].keys()
    for name, tensor in found.items():
        exact = sum(weight * one[name].double() for weight, one in zip(weights, tensors, strict=True))
        assert torch.allclose(tensor.double(), torch.as_tensor(exact), rtol=3 * torch.finfo(dtype).eps, atol=1e-6), name


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_the_weighted_sum(family: str, tiny_models: Tiny, tmp_path: Path) -> None:
    first = tiny_models(f"{family}_file")
    files = [first, other(first, 1, tmp_path), other(first, 2, tmp_path)]
    found = run(files, tmp_path / "out.safetensors", "--ratios", 0.5, 0.3, 0.2)
    check(found, files, [0.5, 0.3, 0.2])
    check(run(files, tmp_path / "equal.safetensors"), files, [1 / 3] * 3)


def test_ratios_that_do_not_make_one_are_told(
    tiny_sd1_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tiny_sd1_file, other(tiny_sd1_file, 1, tmp_path)]
    check(run(files, tmp_path / "out.safetensors", "--ratios", 1.5, -1), files, [1.5, -1])
    assert "add up to 0.5" in capsys.readouterr().err


def test_the_difference(tiny_sd1_file: Path, tmp_path: Path) -> None:
    files = [tiny_sd1_file, other(tiny_sd1_file, 1, tmp_path), other(tiny_sd1_file, 2, tmp_path)]
    found = run(files, tmp_path / "out.safetensors", "--difference", "--ratios", 0.7)
    check(found, files, [1, 0.7, -0.7])
    same = run([files[0], files[1], files[1]], tmp_path / "same.safetensors", "--difference", "--ratios", 3)
    assert all(torch.equal(tensor, same[name]) for name, tensor in load_file(files[0]).items())


def test_what_is_the_same_in_both_stays_bit_for_bit(tiny_sdxl_file: Path, tmp_path: Path) -> None:
    half = {name: tensor.half() for name, tensor in load_file(tiny_sdxl_file).items()}
    save_file(half, tmp_path / "half.safetensors")
    found = run([tmp_path / "half.safetensors"] * 2, tmp_path / "out.safetensors", "--ratios", 0.3, 0.7)
    assert all(torch.equal(tensor, found[name]) and found[name].dtype == torch.float16 for name, tensor in half.items())


@pytest.mark.parametrize(
    ("family", "length", "ones"),
    [
        ("sd1", 26, {"input_blocks.4.", "output_blocks.11."}),
        ("sdxl", 20, {"input_blocks.4.", "output_blocks.8."}),
        ("sdxl", 12, {"input_blocks.4."}),
    ],
)
def test_block_weights(family: str, length: int, ones: set[str], tiny_models: Tiny, tmp_path: Path) -> None:
    first = tiny_models(f"{family}_file")
    second = other(first, 1, tmp_path)
    places = {26: (5, 25), 20: (5, 19), 12: (1,)}[length]
    numbers = [1.0 if place in places else 0.0 for place in range(length)]
    out = tmp_path / "out.safetensors"
    found = run([first, second], out, "--ratios", 0, 1, "--block_weights", json.dumps(numbers))
    one, two = load_file(first), load_file(second)
    unnamed = ("input_blocks.0.", "input_blocks.1.", "input_blocks.2.", "input_blocks.3.", "input_blocks.6.")
    late = tuple(f"output_blocks.{number}." for number in (6, 7, 8))
    named = [name for name in found if length != 12 or not name.startswith(tuple(UNET + b for b in (*unnamed, *late)))]
    named = [name for name in named if not name.startswith(tuple(UNET + end for end in ("out.", "time", "label")))]
    for name in named:
        source = two if name.startswith(tuple(UNET + block for block in ones)) else one
        assert torch.equal(found[name], source[name]), name
    assert len(named) > len(found) / 2


def test_block_weights_multiply_ratios_and_the_first_takes_the_rest(tiny_sd1_file: Path, tmp_path: Path) -> None:
    files = [tiny_sd1_file, other(tiny_sd1_file, 1, tmp_path), other(tiny_sd1_file, 2, tmp_path)]
    lists = ["[" + ",".join(["0.5"] * 26) + "]", ",".join(["2"] * 26)]
    found = run(files, tmp_path / "out.safetensors", "--ratios", 0.4, 0.4, 0.2, "--block_weights", *lists)
    check(found, files, [0.4, 0.2, 0.4])


def test_only_the_unet(tiny_sd1_file: Path, tmp_path: Path) -> None:
    files = [tiny_sd1_file, other(tiny_sd1_file, 1, tmp_path)]
    found = run(files, tmp_path / "out.safetensors", "--unet_only", "--ratios", 1, 1)
    tensors = [load_file(file) for file in files]
    for name, tensor in found.items():
        wanted = tensors[0][name] + tensors[1][name] if name.startswith(UNET) else tensors[0][name]
        assert torch.allclose(tensor, wanted, atol=1e-6), name


def test_what_unet_only_leaves_is_listed(
    tiny_sd1_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tiny_sd1_file, other(tiny_sd1_file, 1, tmp_path)]
    run(files, tmp_path / "out.safetensors", "--unet_only", "--show_skipped")
    told = capsys.readouterr()
    left = [name for name in load_file(tiny_sd1_file) if not name.startswith(UNET)]
    assert told.out.count("--unet_only") == len(left) > 100
    assert f"{len(load_file(tiny_sd1_file)) - len(left)} of " in told.err


@pytest.mark.parametrize(
    ("marks", "more", "told"),
    [
        (("", "v"), ("--ratios", 0.3, 0.7), "different predictions"),
        (("", "v"), ("--ratios", 0, 1), "0.safetensors, whose ratio is 0"),
        (("v", ""), ("--ratios", 1, 0), ""),
        (("v", "vz"), (), "different noise schedules"),
        (("", "v", "v"), ("--difference",), ""),
        (("", "v", ""), ("--difference",), "different predictions"),
        (("v", "v"), (), ""),
    ],
)
def test_models_that_predict_different_things_are_told(
    marks: tuple[str, ...],
    more: tuple[object, ...],
    told: str,
    tiny_sd1_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A file that predicts noise says nothing of it."""
    tensors = load_file(tiny_sd1_file)
    names = {"v": "v_pred", "z": "ztsnr"}
    files = [tmp_path / f"{number}.safetensors" for number in range(len(marks))]
    for file, mark in zip(files, marks, strict=True):
        save_file(tensors | {names[letter]: torch.zeros(0) for letter in mark}, file)
    out = tmp_path / "out.safetensors"
    found = run(files, out, *more)
    said = capsys.readouterr().err
    assert told in said if told else "warning" not in said
    assert ("v_pred" in found) == ("v" in marks[0])
    assert inspect(out).prediction_type == ("v_prediction" if "v" in marks[0] else "epsilon")


def test_interpolations_bend_the_second_ratio(tiny_sd1_file: Path, tmp_path: Path) -> None:
    files = [tiny_sd1_file, other(tiny_sd1_file, 1, tmp_path)]
    found = run(files, tmp_path / "out.safetensors", "--ratios", 0.75, 0.25, "--interpolation", "sigmoid")
    check(found, files, [1 - 0.15625, 0.15625])
    for ratio in np.linspace(0, 1, 11):
        assert bent(bent(float(ratio), "sigmoid"), "inv_sigmoid") == pytest.approx(ratio, abs=1e-12)


def test_files_of_different_precision_and_spelling(tiny_sd1: Path, tiny_sd1_file: Path, tmp_path: Path) -> None:
    second = tmp_path / "second.safetensors"
    folder_as_single_file(tiny_sd1, second, text_model=False, dtype="BF16")
    out = tmp_path / "out.safetensors"
    found = run([second, tiny_sd1_file], out, "--ratios", 0.5, 0.5)
    assert found.keys() == load_file(second).keys()
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    found = run([tiny_sd1_file, second], out, "--ratios", 0.5, 0.5, "--saving_precision", "fp16")
    assert {tensor.dtype for tensor in found.values()} == {torch.float16}
    for name, tensor in load_file(tiny_sd1_file).items():
        assert torch.allclose(found[name].float(), tensor, rtol=0.01, atol=1e-4), name


def test_what_a_file_lacks_stays_as_in_the_first(
    tiny_sd1: Path, tiny_sd1_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "out.safetensors"
    extra = {"model_ema.diffusion_modelx": torch.ones(3), "v_pred": torch.zeros(0), "betas": torch.ones(5)}
    ids = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    save_file(load_file(tiny_sd1_file) | extra | {ids: torch.arange(77)}, first)
    folder_as_single_file(tiny_sd1, second, parts=("unet", "text_encoder"), extra={"logvar": np.ones(4, np.float32)})
    found = run([first, second], out, "--ratios", 1, 1, "--show_skipped")
    original = load_file(first)
    assert found.keys() == original.keys() - {"model_ema.diffusion_modelx"}
    for name, tensor in found.items():
        if not name.startswith((UNET, "cond_stage_model.")) or name == ids:
            assert torch.equal(tensor, original[name]), name
    listed = capsys.readouterr().out
    assert "not in b.safetensors" in listed
    assert "first_stage_model.decoder.conv_in.weight" in listed
    assert "logvar" in listed
    assert "EMA copy, left out" in listed


def test_the_output_may_be_an_input(tiny_sd1_file: Path, tmp_path: Path) -> None:
    first = Path(shutil.copy(tiny_sd1_file, tmp_path / "a.safetensors"))
    second = other(first, 1, tmp_path)
    apart = run([first, second], tmp_path / "apart.safetensors")
    assert all(torch.equal(tensor, apart[name]) for name, tensor in run([first, second], first).items())


def test_metadata_tell_what_it_was_made_of(tiny_sd1_file: Path, tmp_path: Path) -> None:
    first, out = tmp_path / "a.safetensors", tmp_path / "out.safetensors"
    told = {"modelspec.hash_sha256": "0x" + "1" * 64, "modelspec.license": "mine", "modelspec.title": "A"}
    save_file(load_file(tiny_sd1_file), first, told)
    run([first, other(tiny_sd1_file, 1, tmp_path)], out)
    with safe_open(out, "pt") as file:
        found = file.metadata()
    assert found["modelspec.merged_from"] == "A, Model 1"
    assert found["modelspec.title"] == "out"
    assert found["modelspec.license"] == "mine"
    assert "modelspec.hash_sha256" not in found


def test_diffusers_loads_it(tiny_sd1: Path, tiny_sd1_file: Path, tmp_path: Path) -> None:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    second, out = other(tiny_sd1_file, 1, tmp_path), tmp_path / "out.safetensors"
    run([tiny_sd1_file, second], out, "--ratios", 0.25, 0.75)
    load: Any = StableDiffusionPipeline.from_single_file
    states = [
        load(str(file), config=str(tiny_sd1), local_files_only=True, safety_checker=None).unet.state_dict()
        for file in (tiny_sd1_file, second, out)
    ]
    for name, tensor in states[2].items():
        assert torch.allclose(tensor, 0.25 * states[0][name] + 0.75 * states[1][name], atol=1e-6), name


def test_values_too_large_for_the_dtype_are_refused(
    tiny_sd1_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = UNET + "out.2.bias"
    second = other(tiny_sd1_file, 1, tmp_path, **{name: torch.full((4,), 1e6)})
    out = tmp_path / "out.safetensors"
    flags = ["--models", str(tiny_sd1_file), str(second), "--output", str(out), "--saving_precision", "fp16"]
    assert merge(flags) == 2
    assert f"{name}: holds values that are too large for float16" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [second]


def test_bad_input(
    tiny_models: Tiny, tiny_sd1: Path, tiny_sd1_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, out = tiny_sd1_file, tmp_path / "out.safetensors"
    lora = write_kohya(tmp_path / "lora.safetensors", tiny_sd1)
    damaged = damage(Path(shutil.copy(first, tmp_path / "damaged.safetensors")), "truncated")
    wide = tmp_path / "wide.safetensors"
    name = UNET + "middle_block.1.proj_in.weight"
    save_file(load_file(first) | {name: torch.zeros(8, 8, 1, 1)}, wide)
    for models, flags, told in (
        ([first], (), "--models: 1 given"),
        ([first, first], ("--difference",), "--models: 2 given"),
        ([first, first], ("--ratios", 1), "--ratios: 1 given"),
        ([first, first], ("--ratios", 1, "nan"), "nan is no finite number"),
        ([first, first], ("--block_weights", "[1,2]"), "has 2 numbers"),
        ([first, first], ("--block_weights", "[" + "1," * 19 + "1]"), "has 20 numbers, but"),
        ([first, first], ("--block_weights", "1", "2"), "2 lists given"),
        ([first] * 3, ("--interpolation", "sigmoid"), "--interpolation: "),
        ([first, tiny_sd1], (), "is a folder; convert_checkpoint.py"),
        ([first, tmp_path / "none.safetensors"], (), "there is no such file"),
        ([first, tiny_models("sdxl_file")], (), "is an SDXL model"),
        ([first, lora], (), "is a LoRA"),
        ([first, damaged], (), "is truncated"),
        ([first, wide], (), f"its tensor {name} is [8, 8, 1, 1]"),
    ):
        assert merge(["--models", *map(str, models), "--output", str(out), *map(str, flags)]) == 2, told
        said = capsys.readouterr().err
        assert told in said
        assert "Traceback" not in said
        assert not out.exists()
    assert merge(["--models", str(first), str(lora), "--output", "x.ckpt", "--ratios", "1"]) == 2
    assert capsys.readouterr().err.count("error: ") == 2
