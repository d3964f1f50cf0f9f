"""LoRAs merged into base models on disk, against `merge_base_weights` on the loaded model, diffusers' own fusing, and
the formulas of LyCORIS and networks.oft."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.models.inspect import inspect
from library.weights.checkpoints.merge import merge_into
from library.weights.loras.lora import read
from library.weights.loras.merging import Weighted
from networks.base_weights import merge_base_weights
from tests import lora_files
from tests.merging_weights import assert_close, folder_weights, loaded_weights, merge
from tests.networks.tiny_families import FAMILIES, Finder, load_text_encoder, load_unet
from tests.original_layout import folder_as_single_file


@pytest.fixture(scope="module")
def merged(tiny_models: Finder, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """By family: a LoRA file with convolutions and text encoders, and the folder with it in at 0.7."""
    made: dict[str, tuple[Path, Path]] = {}

    def find(family: str) -> tuple[Path, Path]:
        if family not in made:
            place = tmp_path_factory.mktemp(family)
            lora = lora_files.write_kohya(place / "lora.safetensors", tiny_models(family), conv_rank=2, alpha=3.0)
            merge(tiny_models(family), lora, place / "merged", 0.7)
            made[family] = lora, place / "merged"
        return made[family]

    return find


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_is_what_base_weights_are(family: str, merged: Any, tiny_models: Finder) -> None:
    lora, folder = merged(family)
    unet, encoders = load_unet(tiny_models(family)), load_text_encoder(tiny_models(family))
    merge_base_weights(unet, encoders, [lora], [0.7])
    found = folder_weights(folder)
    assert_close(found, loaded_weights(unet, encoders))
    before = folder_weights(tiny_models(family))
    moved = {name for name in before if not torch.equal(before[name], found[name])}
    held = {key.partition(".")[0] for key in load_file(lora)}
    assert len(moved) == len(held)
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {
        str(path.relative_to(tiny_models(family))) for path in tiny_models(family).rglob("*") if path.is_file()
    }
    assert (folder / "vae/config.json").read_bytes() == (tiny_models(family) / "vae/config.json").read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_is_what_diffusers_fuses(family: str, merged: Any, tiny_models: Finder) -> None:
    lora, folder = merged(family)
    fused = lora_files.applied(lora, tiny_models(family), 0.7)
    expected = {}
    for name, value in fused.items():
        part, _, rest = name.partition(".")
        expected[f"{part}.{rest.removeprefix('text_model.')}"] = value
    found = folder_weights(folder)
    assert_close(found, {name: value for name, value in expected.items() if name in found}, 1e-5)
    lora_files.pipeline(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_is_what_the_folder_is(family: str, merged: Any, tiny_models: Finder, tmp_path: Path) -> None:
    lora, folder = merged(family)
    source = tiny_models(f"{family}_file")
    report = merge(source, lora, tmp_path / "merged.safetensors", 0.7)
    folder_as_single_file(folder, tmp_path / "expected.safetensors")
    found, expected = load_file(tmp_path / "merged.safetensors"), load_file(tmp_path / "expected.safetensors")
    assert found.keys() == expected.keys()
    spare = {name for name in found if family == "sd2" and ".resblocks.5." in name}
    assert_close(found, {name: value for name, value in expected.items() if name not in spare}, 1e-6)
    before = load_file(source)
    moved = [name for name in before if not torch.equal(before[name], found[name])]
    assert not spare & set(moved)
    assert len(moved) == report.tensors <= report.modules and not report.unknown
    assert report.size == sum(value.nbytes for value in found.values())
    assert inspect(tmp_path / "merged.safetensors").family_name == family


@pytest.mark.parametrize("family", FAMILIES)
def test_unmerge_undoes_a_merge(family: str, merged: Any, tiny_models: Finder, tmp_path: Path) -> None:
    lora, _ = merged(family)
    other = lora_files.write_kohya(tmp_path / "other.safetensors", tiny_models(family), rank=3, seed=1)
    given = [Weighted(read(lora), 0.7), Weighted(read(other), -0.4)]
    source = tiny_models(f"{family}_file")
    merge_into(source, given, tmp_path / "there.safetensors")
    merge_into(tmp_path / "there.safetensors", given, tmp_path / "back.safetensors", unmerge=True)
    there, back, before = (
        load_file(path) for path in (tmp_path / "there.safetensors", tmp_path / "back.safetensors", source)
    )
    assert max((there[name] - before[name]).abs().max() for name in before) > 0.01
    assert_close(back, before, 1e-6)


@pytest.mark.parametrize("writer", ["peft", "diffusers_blocks", "no_alphas", "bf16"])
def test_files_of_other_programs(writer: str, tiny_models: Finder, tmp_path: Path) -> None:
    folder = tiny_models("sdxl" if writer in ("peft", "diffusers_blocks") else "sd1")
    lora = tmp_path / "lora.safetensors"
    if writer == "peft":
        lora_files.write_peft(lora, folder, alpha=3.0)
    elif writer == "diffusers_blocks":
        lora_files.write_kohya(lora, folder, blocks="diffusers", conv_rank=2)
    elif writer == "no_alphas":
        lora_files.write_kohya(lora, folder, alphas=False)
    else:
        lora_files.write_kohya(lora, folder, dtype=torch.bfloat16)
    merge(folder, lora, tmp_path / "merged", 0.5)
    fused = lora_files.applied(lora, folder, 0.5)
    found = folder_weights(tmp_path / "merged")
    expected = {}
    for name, value in fused.items():
        part, _, rest = name.partition(".")
        expected[f"{part}.{rest.removeprefix('text_model.')}"] = value
    limit = 2e-2 if writer == "bf16" else 1e-5
    assert_close(found, {name: value for name, value in expected.items() if name in found}, limit)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_half_precision_files_are_rounded_once(dtype: str, tiny_models: Finder, tmp_path: Path) -> None:
    """Two LoRAs on a 16-bit weight: the sum in float64, rounded; what isn't changed has the same bytes."""
    folder_as_single_file(tiny_models("sd1"), tmp_path / "base.safetensors", dtype=dtype)
    loras = [
        lora_files.write_kohya(tmp_path / f"{n}.safetensors", tiny_models("sd1"), seed=n, rank=4 + n) for n in (0, 1)
    ]
    merge_into(tmp_path / "base.safetensors", [Weighted(read(one), 0.5) for one in loras], tmp_path / "out.safetensors")
    before, found = load_file(tmp_path / "base.safetensors"), load_file(tmp_path / "out.safetensors")
    name = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    exact = before[name].double()
    for number, one in enumerate(loras):
        held = load_file(one)
        stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
        up, down = (held[f"{stem}.lora_{way}.weight"].double() for way in ("up", "down"))
        exact += 0.5 * 2.0 / (4 + number) * up @ down
    assert found[name].dtype == before[name].dtype
    assert (found[name] != exact.to(found[name].dtype)).float().mean() < 0.005
    untouched = [name for name in before if name.startswith("first_stage_model.")]
    assert untouched and all(torch.equal(before[name], found[name]) for name in untouched)


def test_save_precision_and_fp8(tiny_models: Finder, tmp_path: Path) -> None:
    source = tiny_models("sd1_file")
    lora = lora_files.write_kohya(tmp_path / "lora.safetensors", tiny_models("sd1"))
    merge(source, lora, tmp_path / "half.safetensors", dtype=torch.float16)
    assert {value.dtype for value in load_file(tmp_path / "half.safetensors").values()} == {torch.float16}
    tensors = load_file(source)
    ids = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    small = {name: value.to(torch.float8_e4m3fn) if "attn" in name else value for name, value in tensors.items()}
    save_file(small | {ids: torch.arange(77)[None]}, tmp_path / "fp8.safetensors")
    merge(tmp_path / "fp8.safetensors", lora, tmp_path / "out.safetensors")
    found, plain = load_file(tmp_path / "out.safetensors"), load_file(tmp_path / "half.safetensors")
    assert {name: value.dtype for name, value in found.items() if name != ids} == {n: v.dtype for n, v in small.items()}
    assert torch.equal(found[ids], torch.arange(77)[None])
    assert_close({n: found[n].float() for n in plain}, plain, 0.07)


def test_a_model_without_vae_and_text_encoder(tiny_models: Finder, merged: Any, tmp_path: Path) -> None:
    for family in FAMILIES:
        lora, folder = merged(family)
        folder_as_single_file(tiny_models(family), tmp_path / f"{family}.safetensors", parts=["unet"])
        report = merge(tmp_path / f"{family}.safetensors", lora, tmp_path / f"{family}_out.safetensors", 0.7)
        folder_as_single_file(folder, tmp_path / "expected.safetensors", parts=["unet"])
        assert_close(load_file(tmp_path / f"{family}_out.safetensors"), load_file(tmp_path / "expected.safetensors"))
        (strangers,) = report.unknown.values()
        assert strangers and all(name.startswith("lora_te") for name in strangers)


def test_ema_copies_stay(tiny_models: Finder, merged: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora, _ = merged("sd1")
    names = ("model_ema.decay", "model_ema.diffusion_modelinput_blocks00weight")
    ema = {name: np.ones(3, np.float32) for name in names}
    folder_as_single_file(tiny_models("sd1"), tmp_path / "base.safetensors", extra=ema)
    merge(tmp_path / "base.safetensors", lora, tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert torch.equal(found["model_ema.diffusion_modelinput_blocks00weight"], torch.ones(3))
    assert "EMA" in capsys.readouterr().err


def test_a_pickle_becomes_safetensors_and_a_file_may_replace_itself(
    tiny_models: Finder, merged: Any, tmp_path: Path
) -> None:
    lora, folder = merged("sd1")
    torch.save({"state_dict": load_file(tiny_models("sd1_file"))}, tmp_path / "base.ckpt")
    merge(tmp_path / "base.ckpt", lora, tmp_path / "out.safetensors", 0.7)
    (tmp_path / "own.safetensors").write_bytes(tiny_models("sd1_file").read_bytes())
    merge(tmp_path / "own.safetensors", lora, tmp_path / "own.safetensors", 0.7)
    folder_as_single_file(folder, tmp_path / "expected.safetensors")
    expected = load_file(tmp_path / "expected.safetensors")
    for name in ("out", "own"):
        assert_close(load_file(tmp_path / f"{name}.safetensors"), expected)


def test_metadata(tiny_models: Finder, merged: Any, tmp_path: Path) -> None:
    lora, _ = merged("sdxl")
    own = {"modelspec.title": "Base", "modelspec.author": "me", "modelspec.hash_sha256": "0x" + "0" * 64}
    folder_as_single_file(tiny_models("sdxl"), tmp_path / "base.safetensors", metadata=own)
    merge(tmp_path / "base.safetensors", lora, tmp_path / "new.safetensors")
    with safe_open(tmp_path / "new.safetensors", "pt") as file:
        found = file.metadata()
    title = lora_files.metadata_of(lora).get("modelspec.title", "lora")
    assert found["modelspec.merged_from"] == f"Base, {title}"
    assert found["modelspec.title"] == "new" and found["modelspec.author"] == "me"
    assert found["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert not any("hash" in key for key in found)
    inspect(tmp_path / "new.safetensors")
    merge(tmp_path / "base.safetensors", lora, tmp_path / "bare.safetensors", with_metadata=False)
    with safe_open(tmp_path / "bare.safetensors", "pt") as file:
        assert not file.metadata()


def test_variants_and_shards_of_a_folder(tiny_models: Finder, merged: Any, tmp_path: Path) -> None:
    """Another variant would be the old weights; shards of pickles become shards of safetensors."""
    import shutil

    lora, expected = merged("sd1")
    base = tmp_path / "base"
    shutil.copytree(tiny_models("sd1"), base)
    unet = base / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(unet)
    torch.save({name: value.half() for name, value in tensors.items()}, base / "unet/diffusion_pytorch_model.fp16.bin")
    names = sorted(tensors)
    shards = {"1": names[::2], "2": names[1::2]}
    for number, its in shards.items():
        torch.save(
            {name: tensors[name] for name in its}, base / f"unet/diffusion_pytorch_model-0000{number}-of-00002.bin"
        )
    table = {
        name: f"diffusion_pytorch_model-0000{number}-of-00002.bin" for number, its in shards.items() for name in its
    }
    unet.unlink()
    (base / "unet/diffusion_pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    merge(base, lora, tmp_path / "out", 0.7)
    lora_files.pipeline(tmp_path / "out")
    held = sorted(path.name for path in (tmp_path / "out/unet").iterdir())
    assert held == [
        "config.json",
        "diffusion_pytorch_model-00001-of-00002.safetensors",
        "diffusion_pytorch_model-00002-of-00002.safetensors",
        "diffusion_pytorch_model.safetensors.index.json",
    ]
    assert_close(folder_weights(tmp_path / "out"), folder_weights(expected))


def test_the_text_projection_is_turned_in_files(tiny_models: Finder, tmp_path: Path) -> None:
    """The original layout has it as (in, out)."""
    width, inner = 48, 64
    factors = {"down": torch.randn(3, inner), "up": torch.randn(width, 3)}
    stem = "lora_te2_text_projection"
    tensors = {f"{stem}.lora_{way}.weight": value for way, value in factors.items()}
    save_file(tensors, tmp_path / "lora.safetensors", {"ss_base_model_version": "sdxl_base_v1-0"})
    merge(tiny_models("sdxl"), tmp_path / "lora.safetensors", tmp_path / "merged", 0.5)
    merge(tiny_models("sdxl_file"), tmp_path / "lora.safetensors", tmp_path / "merged.safetensors", 0.5)
    before, found = folder_weights(tiny_models("sdxl")), folder_weights(tmp_path / "merged")
    name = "text_encoder_2.text_projection.weight"
    assert_close(found, before | {name: before[name] + 0.5 * factors["up"] @ factors["down"]})
    folder_as_single_file(tmp_path / "merged", tmp_path / "expected.safetensors")
    assert_close(load_file(tmp_path / "merged.safetensors"), load_file(tmp_path / "expected.safetensors"))


def refused(model: Path, lora: Path, save_to: Path, **more: Any) -> str:
    """The message of a merge that can't be; nothing is left behind."""
    before = set(save_to.parent.iterdir())
    with pytest.raises(UserError) as caught:
        merge(model, lora, save_to, **more)
    assert set(save_to.parent.iterdir()) == before
    return str(caught.value)


def test_what_can_not_be_merged_is_told(tiny_models: Finder, tmp_path: Path) -> None:
    place = tmp_path / "out"
    place.mkdir()
    sd1, sd2, sdxl = (
        lora_files.write_kohya(tmp_path / f"{family}.safetensors", tiny_models(family)) for family in FAMILIES
    )
    model, target = tiny_models("sd1_file"), place / "x.safetensors"
    assert "none of its" in refused(model, sdxl, target)
    assert "same model" in (said := refused(model, sd2, target)) or "models of this size" in said
    assert "safetensors" in refused(model, sd1, place / "x.ckpt")
    assert "is the name of a file" in refused(tiny_models("sd1"), sd1, target)
    assert "base model" in refused(sd1, sd1, target)
    folder = place / "there"
    folder.mkdir()
    (folder / "file").touch()
    assert "is there already" in refused(tiny_models("sd1"), sd1, folder)
    broken = lora_files.damage(lora_files.write_kohya(tmp_path / "nan.safetensors", tiny_models("sd1")), "nan")
    assert "no finite numbers" in refused(model, broken, target)
    huge = lora_files.write_kohya(tmp_path / "huge.safetensors", tiny_models("sd1"), scale=300.0)
    assert "float16" in refused(model, huge, target, dtype=torch.float16)
    large = {"first_stage_model.extra": np.full(3, 1e6, np.float32)}
    folder_as_single_file(tiny_models("sd1"), tmp_path / "large.safetensors", extra=large)
    assert "first_stage_model.extra" in refused(tmp_path / "large.safetensors", sd1, target, dtype=torch.float16)
    key = "lora_unet_down_blocks_0_attentions_0_proj_in"
    glora = {f"{key}.{name}.weight": torch.zeros(2, 2) for name in ("a1", "a2", "b1", "b2")}
    save_file(glora, tmp_path / "glora.safetensors")
    assert "glora" in refused(model, tmp_path / "glora.safetensors", target)


def test_blocks_weigh_modules(tiny_models: Finder, tmp_path: Path) -> None:
    lora = read(lora_files.write_kohya(tmp_path / "lora.safetensors", tiny_models("sd1")))
    merge_into(tiny_models("sd1"), [Weighted(lora, 1.0, lambda name: float("_te_" in name))], tmp_path / "out")
    before, found = folder_weights(tiny_models("sd1")), folder_weights(tmp_path / "out")
    moved = {name for name in before if not torch.equal(before[name], found[name])}
    assert moved and all(name.startswith("text_encoder.") for name in moved)
    assert math.isclose(len(moved), sum("_te_" in name for name in lora.modules))


def test_what_a_model_predicts_stays_known_and_a_guess_stays_one(
    tiny_models: Finder, merged: Any, tmp_path: Path
) -> None:
    """Also where metadata alone tells it, and none is wanted."""
    lora, _ = merged("sdxl")
    key = "modelspec.prediction_type"
    folder_as_single_file(tiny_models("sdxl"), tmp_path / "v.safetensors", metadata={key: "v", "modelspec.title": "V"})
    folder_as_single_file(tiny_models("sdxl"), tmp_path / "mute.safetensors")
    merge(tmp_path / "v.safetensors", lora, tmp_path / "bare.safetensors", with_metadata=False)
    merge(tmp_path / "v.safetensors", lora, tmp_path / "told.safetensors")
    merge(tmp_path / "mute.safetensors", lora, tmp_path / "guess.safetensors")
    found = {}
    for name in ("bare", "told", "guess"):
        with safe_open(tmp_path / f"{name}.safetensors", "pt") as file:
            found[name] = file.metadata()
    assert found["bare"] == {key: "v"}
    assert found["told"][key] == "v"
    assert key not in found["guess"] and "modelspec.architecture" in found["guess"]
    assert inspect(tmp_path / "bare.safetensors").prediction_type == "v_prediction"


def test_a_precision_is_for_weights_alone(tiny_models: Finder, merged: Any, tmp_path: Path) -> None:
    """A schedule that ends in pure noise has an infinite buffer; a broken weight is the model's fault."""
    lora, _ = merged("sd1")
    kept = {"sqrt_recip_alphas_cumprod": np.array([1, np.inf], np.float32), "model_ema.decay": np.ones(2, np.float32)}
    folder_as_single_file(tiny_models("sd1"), tmp_path / "base.safetensors", extra=kept)
    merge(tmp_path / "base.safetensors", lora, tmp_path / "out.safetensors", dtype=torch.float16)
    found = load_file(tmp_path / "out.safetensors")
    for name, value in kept.items():
        assert found.pop(name).equal(torch.from_numpy(value))
    assert {value.dtype for value in found.values()} == {torch.float16}
    place = tmp_path / "place"
    place.mkdir()
    tensors = load_file(tiny_models("sd1_file"))
    for name in ("first_stage_model.decoder.conv_in.bias", "model.diffusion_model.middle_block.1.proj_in.weight"):
        broken = tensors[name].clone()
        broken.view(-1)[0] = torch.nan
        save_file(tensors | {name: broken}, tmp_path / "broken.safetensors")
        said = refused(tmp_path / "broken.safetensors", lora, place / "x.safetensors", dtype=torch.float16)
        assert f"its tensor {name} holds values that are no finite numbers" in said and "LoRA" not in said


def test_halves_in_a_folder_load_into_one_pipeline(tiny_models: Finder, merged: Any, tmp_path: Path) -> None:
    import shutil

    lora, _ = merged("sdxl")
    base = Path(shutil.copytree(tiny_models("sdxl"), tmp_path / "base"))
    for part, told in (("text_encoder", {}), ("text_encoder_2", {"torch_dtype": "float16"})):
        file = base / part / "config.json"
        plain = {key: value for key, value in json.loads(file.read_text()).items() if not key.endswith("dtype")}
        file.write_text(json.dumps(plain | told))
    merge(base, lora, tmp_path / "same")
    assert "dtype" not in json.loads((tmp_path / "same/text_encoder/config.json").read_text())
    merge(base, lora, tmp_path / "half", dtype=torch.float16)
    assert json.loads((tmp_path / "half/text_encoder/config.json").read_text())["dtype"] == "float32"
    other = json.loads((tmp_path / "half/text_encoder_2/config.json").read_text())
    assert other["torch_dtype"] == "float16" and "dtype" not in other
    assert lora_files.pipeline(tmp_path / "half").text_encoder.dtype == torch.float32


def test_room_for_a_folder_is_what_it_will_take(
    tiny_models: Finder, merged: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of halves half as much, and what is copied besides."""
    import shutil
    from types import SimpleNamespace

    lora, _ = merged("sd1")
    merge(tiny_models("sd1"), lora, tmp_path / "half", dtype=torch.float16)
    whole, written = (
        sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        for folder in (tiny_models("sd1"), tmp_path / "half")
    )
    assert written < 0.75 * whole
    free = {"free": written}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(**free))
    merge(tiny_models("sd1"), lora, tmp_path / "fits", dtype=torch.float16)
    copied = sum(file.stat().st_size for file in (tmp_path / "half").rglob("*") if file.suffix != ".safetensors")
    free["free"] = written - copied // 2
    with pytest.raises(UserError, match=r"MB don't fit, its disk has [\d.]+ MB left"):
        merge(tiny_models("sd1"), lora, tmp_path / "full", dtype=torch.float16)


def test_folders_are_looked_through_without_modules(tiny_models: Finder, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take seconds to import."""
    from library.models import parts
    from library.weights.checkpoints.opened import open_model

    expected = open_model(tiny_models("sdxl_file"))
    wanted = {part: {*expected.places_of(part)} for part in expected.info.parts}
    monkeypatch.setattr(parts, "build", None)
    folder = open_model(tiny_models("sdxl"))
    for part, names in wanted.items():
        assert {*folder.places_of(part)} >= names


def test_the_first_text_encoder_alone_may_be_spelled_as_the_only_one(tiny_models: Finder, tmp_path: Path) -> None:
    """As files of it are where nothing tells that it is SDXL's."""
    whole = read(lora_files.write_kohya(tmp_path / "lora.safetensors", tiny_models("sdxl")))
    first = {name: one for name, one in whole.modules.items() if name.startswith("lora_te1_")}
    spelled = {name.replace("te1", "te"): replace(one, name=name.replace("te1", "te")) for name, one in first.items()}
    for name, modules in (("a", first), ("b", spelled)):
        merge_into(tiny_models("sdxl"), [Weighted(replace(whole, modules=modules, metadata={}))], tmp_path / name)
    found, other = folder_weights(tmp_path / "a"), folder_weights(tmp_path / "b")
    assert not all(torch.equal(found[name], old) for name, old in folder_weights(tiny_models("sdxl")).items())
    assert all(torch.equal(found[name], other[name]) for name in found)
