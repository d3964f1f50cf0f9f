"""diffusers loads what tools write, and computes with it what it computes with the files that they were given: LoRAs
resized, merged, converted, extracted and cut, and base models with a LoRA in them, blended and converted."""

import copy
import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.weights.loras.alphas import otherwise_in_diffusers
from library.weights.loras.lora import read
from networks import dylora, lora
from tests import lora_files
from tests.networks.tiny_families import Finder, fill, load_text_encoder, load_unet
from tests.programs import tool

Changes = Mapping[str, Tensor]
CASES = [("sd1", "ours"), *(pytest.param(*one, marks=pytest.mark.slow) for one in (("sd2", "peft"), ("sdxl", "bf16")))]
MORE = [
    *(("sd1", name) for name in ("kohya", "peft", "no_alphas", "bf16", "old_diffusers", "processors", "rslora")),
    *(("sd2", name) for name in ("ours", "kohya", "no_alphas", "bf16")),
    *(("sdxl", name) for name in ("ours", "kohya", "kohya_diffusers", "peft", "no_alphas", "old_diffusers")),
]
RATIO = 0.8


def run(name: str, *words: object) -> None:
    assert tool(name)([str(word) for word in words]) == 0, words


def write(name: str, path: Path, folder: Path) -> Path:
    """An input by its name."""
    match name:
        case "ours":
            unet, text_encoder = load_unet(folder), load_text_encoder(folder)
            network = lora.create_network(1.0, 4, 3.0, None, text_encoder, unet)
            network.apply_to(text_encoder, unet)
            fill(network, 0.1)
            network.save_weights(path, None, lora_files.kohya_metadata(folder))
            return path
        case "peft":
            return lora_files.write_peft(path, folder, alpha=3.0)
        case "rslora":
            return lora_files.write_peft(path, folder, use_rslora=True)
        case "old_diffusers" | "processors":
            return lora_files.write_old_diffusers(path, folder, processors=name == "processors")
        case "no_alphas":
            return lora_files.write_kohya(path, folder, alphas=False, metadata={})
        case "bf16":
            return lora_files.write_kohya(path, folder, dtype=torch.bfloat16)
        case "other" | "other_conv":
            conv_rank = 3 if name == "other_conv" else None
            return lora_files.write_kohya(path, folder, rank=3, conv_rank=conv_rank, alpha=3.0, seed=7)
        case "kohya_diffusers":
            return lora_files.write_kohya(path, folder, blocks="diffusers", conv_rank=4)
        case _:
            return lora_files.write_kohya(path, folder, conv_rank=4)


@pytest.fixture(scope="module")
def given(tiny_models: Finder, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Path, Changes]]:
    """By family and name: a LoRA file, and what it changes as diffusers has it."""
    made: dict[tuple[str, str], tuple[Path, Changes]] = {}

    def find(family: str, name: str) -> tuple[Path, Changes]:
        if (family, name) not in made:
            folder = tiny_models(family)
            path = write(name, tmp_path_factory.mktemp(family) / f"{name}.safetensors", folder)
            made[family, name] = path, fused(path, folder)
        return made[family, name]

    return find


def differences(weights: Mapping[str, Tensor], folder: Path) -> Changes:
    """What weights have that the tiny model hasn't, in float64, in the model's shapes."""
    before = lora_files.base_weights(folder)
    assert weights.keys() == before.keys()
    return {name: weights[name].double().reshape(old.shape) - old.double() for name, old in before.items()}


def fused(path: Path, folder: Path) -> Changes:
    """What diffusers makes of a LoRA file."""
    return differences(lora_files.applied(path, folder), folder)


def model_changes(path: Path, folder: Path) -> Changes:
    """What diffusers reads from a checkpoint, a file or a folder, beyond the tiny model."""
    known = lora_files.pipeline(folder)
    if path.is_dir():
        loaded = type(known).from_pretrained(path, local_files_only=True)
    else:
        words = {name: part for name, part in known.components.items() if name.startswith("tokenizer")}
        load: Any = type(known).from_single_file
        loaded = load(str(path), config=str(folder), local_files_only=True, **words)
    states = {part: model.state_dict() for part, model in lora_files.parts(loaded).items()}
    return differences({f"{part}.{name}": one for part, state in states.items() for name, one in state.items()}, folder)


def assert_same(found: Changes, expected: Changes, ratio: float = 1.0, limit: float = 2e-6) -> None:
    """`found` is `ratio` times `expected`, within float32's rounding of weights."""
    moved = 0
    for name, change in expected.items():
        worst = float((found[name] - ratio * change).abs().max())
        assert worst <= limit, (name, worst, float(change.abs().max()))
        moved += bool(change.abs().max() > 1e-3)
    assert moved > 40


def truncated(change: Tensor, rank: int) -> Tensor:
    """The best approximation of a rank, by the whole matrix's singular values."""
    if not bool(change.any()) or change.ndim < 2:
        return change
    left, values, right = torch.linalg.svd(change.flatten(1), full_matrices=False)
    return ((left[:, :rank] * values[:rank]) @ right[:rank]).reshape(change.shape)


def check_loras(family: str, name: str, given: Any, tiny_models: Finder, place: Path, layouts: tuple[str, ...]) -> None:
    folder, (path, change), out = tiny_models(family), given(family, name), place / "out.safetensors"
    run("resize_lora", "--model", path, "--save_to", out, "--new_rank", 2)
    assert_same(fused(out, folder), {key: truncated(one, 2) for key, one in change.items()})
    other, second = given(family, "other_conv" if name == "ours" else "other")
    both = {key: RATIO * one - 0.5 * second[key] for key, one in change.items()}
    run("merge_lora", "--models", other, path, "--ratios", -0.5, RATIO, "--save_to", out)
    assert_same(fused(out, folder), both)
    if name == "ours":
        run("merge_lora", "--models", path, other, "--ratios", RATIO, -0.5, "--new_rank", 2, "--save_to", out)
        assert_same(fused(out, folder), {key: truncated(one, 2) for key, one in both.items()})
    for layout in layouts:
        run("convert_lora", path, out, "--to", layout)
        limit = 1e-3 if (name, layout) == ("bf16", "diffusers") else 2e-6
        assert_same(fused(out, folder), change, limit=limit)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_loras_resized_merged_and_converted(
    family: str, name: str, given: Any, tiny_models: Finder, tmp_path: Path
) -> None:
    layout = {"ours": "peft", "bf16": "diffusers", "peft": "kohya"}.get(name, "peft")
    check_loras(family, name, given, tiny_models, tmp_path, (layout,))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name"), MORE)
def test_loras_of_all_programs_resized_merged_and_converted(
    family: str, name: str, given: Any, tiny_models: Finder, tmp_path: Path
) -> None:
    check_loras(family, name, given, tiny_models, tmp_path, ("kohya", "kohya-diffusers", "peft", "diffusers"))


@pytest.mark.slow
def test_a_dylora_cut_to_its_first_ranks(tiny_sdxl: Path, tmp_path: Path) -> None:
    trained = {"ss_network_module": dylora.__name__, "ss_network_args": json.dumps({"unit": "2"})}
    metadata = lora_files.kohya_metadata(tiny_sdxl) | trained
    path = lora_files.write_kohya(tmp_path / "dylora.safetensors", tiny_sdxl, metadata=metadata)
    run("extract_lora_from_dylora", "--model", path, "--save_to", tmp_path / "cut.safetensors")
    tensors = {key: one.double() for key, one in load_file(path).items()}
    change = dict.fromkeys(lora_files.base_weights(tiny_sdxl), torch.zeros(1, dtype=torch.double))
    for name, part, place, _ in lora_files.targets(tiny_sdxl):
        up, down = tensors[f"{name}.lora_up.weight"][:, :2], tensors[f"{name}.lora_down.weight"][:2]
        change[f"{part}.{place}.weight"] = up @ down * (2.0 * (2 / 4) ** 0.5 / 2)
    assert_same(fused(tmp_path / "cut-0002.safetensors", tiny_sdxl), change)


@pytest.mark.parametrize("family", [*(pytest.param(one, marks=pytest.mark.slow) for one in ("sd1", "sdxl")), "sd2"])
def test_a_lora_through_all_tools_for_base_models(family: str, given: Any, tiny_models: Finder, tmp_path: Path) -> None:
    """Into a file; half of that blended with the base or added to it again; as a folder, and as a file again; taken
    out of a folder; and out of these as a LoRA."""
    folder, base, (path, change) = tiny_models(family), tiny_models(f"{family}_file"), given(family, "ours")
    merged, mixed, again = (tmp_path / f"{name}.safetensors" for name in ("merged", "mixed", "again"))
    run("merge_lora", "--sd_model", base, "--models", path, "--ratios", RATIO, "--save_to", merged)
    assert_same(model_changes(merged, folder), change, RATIO)
    if family == "sd2":
        total = 1.5 * RATIO
        run("merge_models", "--difference", "--models", merged, merged, base, "--ratios", 0.5, "--output", mixed)
    else:
        total = 0.25 * RATIO
        run("merge_models", "--models", base, merged, "--ratios", 0.75, 0.25, "--output", mixed)
    run("convert_checkpoint", mixed, tmp_path / "mixed")
    assert_same(model_changes(tmp_path / "mixed", folder), change, total)
    run("convert_checkpoint", tmp_path / "mixed", again)
    assert_same(model_changes(again, folder), change, total)
    less, out = tmp_path / "less", tmp_path / "extracted.safetensors"
    run("merge_lora", "--sd_model", folder, "--models", path, "--unmerge", "--save_to", less)
    run("extract_lora", "--model_org", less, "--model_tuned", merged, "--clamp_quantile", 1, "--save_to", out)
    assert_same(fused(out, folder), change, 1 + RATIO, limit=2e-5)


@pytest.mark.parametrize("family", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_ranks_and_alphas_that_differ_by_module(
    family: str, dtype: torch.dtype, tiny_models: Finder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """diffusers takes the commonest alpha for attention layers: what is resized by a criterion, or has one alpha, acts
    as the same modules in the layout peft, which it reads right, and `check_lora` knows which files don't."""
    folder = tiny_models(family)
    paths = [tmp_path / f"{name}.safetensors" for name in ("in", "small", "peft", "mixed", "one")]
    path, small, peft, mixed, one = paths
    limit = 3e-4 if dtype == torch.float16 else 2e-6
    lora_files.write_kohya(path, folder, conv_rank=2)
    words = ("--new_rank", 4, "--dynamic_method", "sv_fro", "--dynamic_param", 0.9, "--save_precision")
    run("resize_lora", "--model", path, "--save_to", small, *words, {torch.float16: "fp16"}.get(dtype, "float"))
    run("convert_lora", small, peft, "--to", "peft")
    tensors = load_file(small)
    assert len({len(tensor) for key, tensor in tensors.items() if "lora_down" in key}) > 1
    assert len({float(tensor) for key, tensor in tensors.items() if key.endswith("alpha")}) == 1
    right = fused(peft, folder)
    assert_same(fused(small, folder), right)
    for number, key in enumerate(key for key in tensors if key.endswith("alpha")):
        tensors[key] = torch.tensor((2.0, 1.0, 2.0, 3.0, 2.0)[number % 5])
    save_file(tensors, mixed, lora_files.metadata_of(small))
    run("convert_lora", mixed, peft, "--to", "peft")
    capsys.readouterr()
    run("convert_lora", mixed, tmp_path / "same.safetensors", "--to", "kohya")
    assert "--one_alpha makes them alike" in capsys.readouterr().err
    run("convert_lora", mixed, one, "--to", "kohya", "--one_alpha")
    right, wrong = fused(peft, folder), fused(mixed, folder)
    assert_same(fused(one, folder), right, limit=limit)
    told = otherwise_in_diffusers(read(mixed).modules)
    places = {name: f"{part}.{place}.weight" for name, part, place, _ in lora_files.targets(folder, conv=True)}
    for name, place in places.items():
        expected = right[place] * told.get(name, 1.0)
        assert float((wrong[place] - expected).abs().max()) <= limit, name
    assert 50 < len(told) < len(places)
    run("check_lora", mixed)
    assert f"alphas differ, and {len(told)} modules" in capsys.readouterr().out
    run("check_lora", one)
    assert "alphas differ" not in capsys.readouterr().out


@pytest.mark.slow
def test_files_of_different_modules_become_their_sum(tiny_sd1: Path, tmp_path: Path) -> None:
    one = lora_files.write_kohya(tmp_path / "a.safetensors", tiny_sd1, conv_rank=2)
    two = lora_files.write_old_diffusers(tmp_path / "b.safetensors", tiny_sd1)
    run("merge_lora", "--models", one, two, "--save_to", tmp_path / "out.safetensors")
    first, second = fused(one, tiny_sd1), fused(two, tiny_sd1)
    both = {key: change + second[key] for key, change in first.items()}
    assert_same(fused(tmp_path / "out.safetensors", tiny_sd1), both)


@pytest.mark.parametrize("kind", ["lokr", pytest.param("loha", marks=pytest.mark.slow)])
def test_lycoris_of_sd1_made_plain(kind: str, tiny_sd1: Path, tmp_path: Path) -> None:
    """SD1's `proj_in` is a 1x1 convolution, which LoHa and LoKr don't say and diffusers insists on."""
    path, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    only = "mid_block_att|down_blocks_1_att|te_.*layers_0"
    lora_files.write_lycoris(path, tiny_sd1, kind, only=only, rank=2, text=True)
    whole = lycoris_changes(path, tiny_sd1, 1.0)
    least = {key: truncated(one, 4) for key, one in whole.items()}
    run("resize_lora", "--model", path, "--new_rank", 4, "--save_to", out)
    assert_same(fused(out, tiny_sd1), least)
    told = lora_files.metadata_of(out)
    assert (told["ss_network_module"], told["ss_network_args"]) == ("networks.lora", "{}")
    run("merge_lora", "--models", path, "--new_rank", 4, "--save_to", out)
    assert_same(fused(out, tiny_sd1), least)
    run("convert_lora", path, out, "--to", "kohya", "--as_lora")
    assert_same(fused(out, tiny_sd1), whole, limit=1e-5)


LYCORIS: dict[str, tuple[str, dict[str, Any]]] = {
    "loha": ("loha", {}),
    "loha-tucker": ("loha", {"use_tucker": True}),
    "lokr": ("lokr", {"decompose_both": True, "factor": 4}),
    "locon-tucker": ("locon", {"use_tucker": True}),
    "locon-dora": ("locon", {"weight_decompose": True}),
    "full": ("full", {}),
}
SLOW = {"full", "loha", "loha-tucker", "lokr", "locon-dora"}


def lycoris_changes(path: Path, folder: Path, ratio: float) -> Changes:
    """What LyCORIS' own merge makes of the model's weights and biases, with the modules that it makes of a file."""
    modules: Any = importlib.import_module("lycoris.modules")
    before = lora_files.base_weights(folder)
    found = {name: torch.zeros_like(one, dtype=torch.double) for name, one in before.items()}
    tensors = load_file(path)
    for name, part, place, module in lora_files.targets(folder, conv=True):
        kind, leaves = modules.get_module(tensors, name)
        if kind is not None:
            layer = modules.make_module(kind, leaves, name, copy.deepcopy(module))
            layer.merge_to(ratio)
            for leaf, parameter in layer.org_module[0].named_parameters():
                key = f"{part}.{place}.{leaf}"
                found[key] = parameter.detach().double() - before[key].double()
    return found


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind in SLOW else kind for kind in LYCORIS]
)
def test_lycoris_in_checkpoints_and_as_plain_loras(kind: str, tiny_models: Finder, tmp_path: Path) -> None:
    """Against LyCORIS' own merge; where a kind has factors, diffusers computes the same with the plain LoRA."""
    folder, (algo, args) = tiny_models("sd2"), LYCORIS[kind]
    only = "mid_block|down_blocks_1|te_.*layers_0"
    path = tmp_path / "lycoris.safetensors"
    lora_files.write_lycoris(path, folder, algo, only=only, rank=2, text=True, **args)
    whole = lycoris_changes(path, folder, 1.0)
    run("merge_lora", "--sd_model", folder, "--models", path, "--save_to", tmp_path / "into")
    assert_same(model_changes(tmp_path / "into", folder), whole, limit=1e-5)
    if kind == "full":
        run("merge_lora", "--sd_model", folder, "--models", path, "--ratios", 0.5, "--save_to", tmp_path / "half")
        assert_same(model_changes(tmp_path / "half", folder), lycoris_changes(path, folder, 0.5), limit=1e-5)
        return
    out = tmp_path / "plain.safetensors"
    run("convert_lora", path, out, "--to", "peft", "--as_lora")
    assert_same(fused(out, folder), whole, limit=1e-5)
    if kind == "locon-dora":
        return
    run("resize_lora", "--model", path, "--save_to", out, "--new_rank", 2)
    assert_same(fused(out, folder), {key: truncated(one, 2) for key, one in whole.items()})
    run("merge_lora", "--models", path, path, "--ratios", 1, -0.5, "--svd", "--new_rank", 16, "--save_to", out)
    assert_same(fused(out, folder), {key: truncated(one, 16) for key, one in whole.items()}, 0.5)
