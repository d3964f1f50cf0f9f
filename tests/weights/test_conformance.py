"""library.weights.loras.conformance: what programs take, by the lists of modules and by what diffusers does."""

import csv
import hashlib
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.models.families import FAMILIES, Family, FamilyName
from library.models.lora_targets import targets
from library.models.single_configs import packaged
from library.weights.loras.conformance import Verdict, metadata_gaps, verdicts
from library.weights.loras.spelled import family_for, other_sizes, sort_keys, strangers
from tests.lora_files import pipeline, write_kohya, write_lycoris, write_peft
from tests.programs import ROOT

Shapes = dict[str, tuple[int, ...]]
ALL = {"A1111", "ComfyUI", "diffusers", "InvokeAI"}


@lru_cache
def golden(family: str) -> Mapping[str, tuple[int, ...]]:
    """Every key of a rank-4 LoRA-C3Lier of a full-size model, from the list of sd-scripts' modules."""
    found: Shapes = {}
    with (ROOT / "tests/data/lora_modules.tsv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            if row["family"] == family:
                window = {"-": (), "1x1": (1, 1), "3x3": (3, 3)}[row["kernel"]]
                found[f"{row['module']}.alpha"] = ()
                found[f"{row['module']}.lora_down.weight"] = (4, int(row["in"]), *window)
                found[f"{row['module']}.lora_up.weight"] = (int(row["out"]), 4, *(1 for _ in window))
    return found


def diffusers_spelled(family: FamilyName) -> Shapes:
    """The same of the U-Net, in diffusers' spelling of blocks."""
    return {
        f"lora_unet_{target.path.replace('.', '_')}.{leaf}": shape
        for target in targets(packaged(family, "unet"), [], conv=True)
        for leaf, shape in zip(("lora_down.weight", "lora_up.weight"), target.shapes(4), strict=True)
    }


def judged(shapes: Mapping[str, tuple[int, ...]], family: FamilyName, **metadata: str) -> dict[str, Verdict]:
    keys = sort_keys(shapes)
    return {one.program: one for one in verdicts(keys, FAMILIES[family], metadata)}


def without(shapes: Mapping[str, tuple[int, ...]], *names: str) -> Shapes:
    return {key: shape for key, shape in shapes.items() if key.partition(".")[0] not in names}


def renamed(shapes: Mapping[str, tuple[int, ...]], old: str, new: str) -> Shapes:
    return {key.replace(old, new, 1): shape for key, shape in shapes.items()}


@pytest.mark.parametrize("listed", ["sd1", "sd2_folder", "sd2_single_file", "sdxl"])
def test_the_golden_lists_are_taken_whole_by_all(listed: str) -> None:
    shapes, name = golden(listed), listed.partition("_")[0]
    keys = sort_keys(shapes)
    family = family_for(keys, {})
    assert family is not None
    assert family.name == name
    assert not strangers(keys, family)
    assert not other_sizes(keys, family)
    found = verdicts(keys, family, {})
    assert {one.program for one in found if one.takes == "all"} == ALL
    assert {(one.taken, one.dropped, one.notes) for one in found} == {(len(shapes) // 3, (), ())}


def test_sdxl_in_diffusers_spelling_loses_one_module_in_a1111() -> None:
    found = judged(diffusers_spelled("sdxl"), "sdxl")
    assert [key for key, _ in found["A1111"].dropped] == ["lora_unet_up_blocks_0_upsamplers_0_conv"]
    assert {name for name, one in found.items() if one.takes == "all"} == ALL - {"A1111"}


def test_blocks_spelled_in_two_ways() -> None:
    original = {key: shape for key, shape in golden("sdxl").items() if "output_blocks_0_1" in key}
    both = original | {key: shape for key, shape in diffusers_spelled("sdxl").items() if "down_blocks" in key}
    found = judged(both, "sdxl")
    assert "spelled in two ways" in found["InvokeAI"].refused
    assert {key for key, _ in found["diffusers"].dropped} == {key.partition(".")[0] for key in original}
    assert found["A1111"].takes == found["ComfyUI"].takes == "all"


@pytest.mark.parametrize(("listed", "prefix"), [("sdxl", "lora_te2"), ("sd2_folder", "lora_te"), ("sd1", "lora_te")])
def test_a1111_needs_all_four_projections_of_an_open_clip_layer(listed: str, prefix: str) -> None:
    layer = f"{prefix}_text_model_encoder_layers_3_self_attn"
    family: FamilyName = "sdxl" if listed == "sdxl" else "sd2" if listed == "sd2_folder" else "sd1"
    found = judged(without(golden(listed), f"{layer}_q_proj"), family)
    lost = set() if listed == "sd1" else {f"{layer}_{way}_proj" for way in ("k", "v", "out")}
    assert {key for key, _ in found["A1111"].dropped} == lost
    assert {name for name, one in found.items() if one.takes == "all"} >= ALL - {"A1111"}


@pytest.mark.parametrize(
    ("family", "old", "new", "taking"),
    [
        ("sd1", "lora_te_", "lora_te1_", {"A1111", "ComfyUI", "diffusers"}),
        ("sd2", "lora_te_", "lora_te1_", {"ComfyUI", "diffusers"}),
        ("sdxl", "lora_te1_", "lora_te_", {"ComfyUI", "diffusers"}),
        ("sd1", "lora_unet_", "lycoris_", {"ComfyUI"}),
    ],
)
def test_prefixes(family: FamilyName, old: str, new: str, taking: set[str]) -> None:
    found = judged(renamed(golden("sd2_folder" if family == "sd2" else family), old, new), family)
    assert {name for name, one in found.items() if one.takes == "all"} == taking


def test_bundled_embeddings_are_strays_to_strict_programs() -> None:
    found = judged({**golden("sd1"), "bundle_emb.cat.string_to_param.*": (2, 768)}, "sd1")
    assert {name for name, one in found.items() if one.takes == "all"} == {"A1111", "ComfyUI"}
    assert "bundle_emb" in found["diffusers"].refused


NAME = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
HADA = {f"hada_w{number}_{side}": (4, 4) for number in (1, 2) for side in "ab"}


@pytest.mark.parametrize(
    ("name", "leaves", "taking"),
    [
        (NAME, HADA, {"A1111", "ComfyUI", "InvokeAI"}),
        (NAME, {"lokr_w1": (4, 4), "lokr_w2": (4, 4)}, {"A1111", "ComfyUI", "InvokeAI"}),
        (NAME, {"diff": (8, 8)}, {"A1111", "ComfyUI", "InvokeAI"}),
        (NAME, {"weight": (8,), "on_input": ()}, {"A1111", "InvokeAI"}),
        (NAME, {f"{one}.weight": (4, 4) for one in ("a1", "a2", "b1", "b2")}, {"A1111", "ComfyUI"}),
        ("lora_unet_down_blocks_0_resnets_0_norm1", {"w_norm": (8,), "b_norm": (8,)}, {"A1111", "ComfyUI", "InvokeAI"}),
        ("lora_unet_conv_in", {"diff": (8, 4, 3, 3)}, {"A1111", "ComfyUI", "InvokeAI"}),
        ("lora_unet_of_nobody", {"lora_down.weight": (4, 8), "lora_up.weight": (8, 4)}, set()),
    ],
)
def test_kinds_of_modules(name: str, leaves: Shapes, taking: set[str]) -> None:
    found = judged({f"{name}.{leaf}": shape for leaf, shape in leaves.items()}, "sd1")
    assert {program for program, one in found.items() if one.takes == "all"} == taking


def test_oft_is_for_a1111_and_original_names() -> None:
    shapes = {"oft_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.oft_blocks": (4, 160, 160)}
    assert {name for name, one in judged(shapes, "sdxl").items() if one.taken} == {"A1111"}
    shapes = {"oft_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.oft_blocks": (4, 160, 160)}
    assert not any(one.taken for one in judged(shapes, "sd1").values())


def test_dora_is_computed_otherwise() -> None:
    shapes = {f"{NAME}.lora_down.weight": (4, 8), f"{NAME}.lora_up.weight": (8, 4), f"{NAME}.dora_scale": (8, 1)}
    found = judged(shapes, "sd1")
    assert all(one.takes == "all" and "DoRA" in one.notes[0] for one in found.values())


def test_families_are_told_by_tensors_before_metadata() -> None:
    def told(shapes: Mapping[str, tuple[int, ...]], **metadata: str) -> Family | None:
        return family_for(sort_keys(shapes), metadata)

    assert told(golden("sd2_folder"), ss_base_model_version="sd_v1") == FAMILIES["sd2"]
    small = {f"{NAME}.lora_down.weight": (4, 32), f"{NAME}.lora_up.weight": (32, 4)}
    assert told(small, ss_base_model_version="sd_v2_v") == FAMILIES["sd2"]
    assert told(small) == FAMILIES["sd1"]
    assert told({"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": (4, 4)}) is None


def test_the_last_layer_of_sd2s_text_encoder_is_in_two_programs_only() -> None:
    layer = {
        key.replace("_layers_22_", "_layers_23_"): shape
        for key, shape in golden("sd2_folder").items()
        if "_layers_22_" in key
    }
    found = judged({**golden("sd2_folder"), **layer}, "sd2")
    assert {name: len(one.dropped) for name, one in found.items()} == {
        "A1111": 0,
        "ComfyUI": 0,
        "diffusers": 6,
        "InvokeAI": 6,
    }


def _small(path: Path, word: str = "proj_in") -> dict[str, torch.Tensor]:
    return {key: one for key, one in load_file(path).items() if word in key and "proj_in" in key}


def _file(kind: str, folder: Path, path: Path) -> Path:
    """A file of the U-Net's first projections alone, which are loaded quickly."""
    match kind:
        case "peft":
            tensors = _small(write_peft(path, folder, text=False))
        case "loha":
            tensors = _small(write_lycoris(path, folder, "loha", only="input_blocks_4_1_proj_in"))
        case "stray":
            found = _small(write_kohya(path, folder, text=False))
            tensors = {**found, "bundle_emb.cat.clip_l": torch.ones(1, 32)}
        case "mixed":
            original = _small(write_kohya(path, folder, text=False), "output_blocks")
            tensors = original | _small(write_kohya(path, folder, text=False, blocks="diffusers"), "down_blocks")
        case _:
            blocks: Literal["kohya", "diffusers"] = "kohya" if kind == "original" else "diffusers"
            tensors = _small(write_kohya(path, folder, text=False, blocks=blocks))
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("kind", ["original", "diffusers", "peft", "stray", "loha", "mixed"])
def test_diffusers_does_what_is_said_of_it(kind: str, tiny_sdxl: Path, tmp_path: Path) -> None:
    path = _file(kind, tiny_sdxl, tmp_path / f"{kind}.safetensors")
    shapes = {key: tuple(tensor.shape) for key, tensor in load_file(path).items()}
    said = judged(shapes, "sdxl")["diffusers"]
    loaded: Any = pipeline(tiny_sdxl)
    refused = ""
    try:
        loaded.load_lora_weights(path.parent, weight_name=path.name)
    except (ValueError, KeyError, RuntimeError) as fault:
        refused = str(fault)
    assert bool(said.refused) == bool(refused), refused
    if not refused:
        assert said.taken == sum(hasattr(module, "lora_A") for module in loaded.unet.modules())


METADATA = {
    "ss_v2": "False",
    "ss_base_model_version": "sd_v1",
    "ss_network_module": "networks.lora",
    "ss_network_dim": "4",
    "ss_network_alpha": "2",
    "ss_network_args": "{}",
    "ss_output_name": "cat",
}


@pytest.fixture
def hashed(tmp_path: Path) -> Callable[[Mapping[str, str]], Path]:
    """A file of one tensor, with metadata and the right hash."""

    def write(metadata: Mapping[str, str]) -> Path:
        path = tmp_path / "file.safetensors"
        save_file({"a": torch.ones(3)}, path, dict(metadata))
        return path

    return write


@pytest.mark.parametrize(
    ("change", "family", "lines"),
    [
        ({}, "sd1", []),
        ({"ss_base_model_version": None}, "sd1", ["missing: ss_base_model_version"]),
        ({"ss_network_dim": "8"}, "sd1", ["ss_network_dim is 8"]),
        ({"ss_output_name": ""}, "sd1", ["ss_output_name is missing"]),
        ({}, "sdxl", ["ss_base_model_version is sd_v1", "A1111 lists the file as SD1"]),
        ({"ss_base_model_version": "sd_v2"}, "sd2", ["A1111 lists the file as SD1"]),
        ({"sshs_model_hash": None}, "sd1", ["sshs_model_hash is missing"]),
        ({"sshs_model_hash": "0" * 64}, "sd1", ["not the tensors' hash: sshs_model_hash"]),
        ({"modelspec.hash_sha256": "0x" + "1" * 64}, "sd1", ["not the tensors' hash: modelspec.hash_sha256"]),
    ],
)
def test_metadata_gaps(
    hashed: Callable[[Mapping[str, str]], Path],
    change: Mapping[str, str | None],
    family: FamilyName,
    lines: Iterable[str],
) -> None:
    right = hashlib.sha256(torch.ones(3).numpy().tobytes()).hexdigest()
    told = {**METADATA, "sshs_model_hash": right, **change}
    metadata = {key: text for key, text in told.items() if text is not None}
    found = metadata_gaps(metadata, FAMILIES[family], {4}, hashed(metadata))
    assert len(found) == len(list(lines))
    assert all(gap.startswith(line) for gap, line in zip(found, lines, strict=True))


def test_no_metadata_is_one_gap(hashed: Callable[[Mapping[str, str]], Path]) -> None:
    assert len(metadata_gaps({}, FAMILIES["sd1"], {4}, hashed({}))) == 1
