"""tools/merge_lora.py on files of other programs, against what diffusers makes of them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.weights.loras import lora
from tests.lora_files import (
    applied,
    base_weights,
    damage,
    metadata_of,
    targets,
    write_dora,
    write_kohya,
    write_lycoris,
    write_peft,
)
from tests.programs import ROOT, tool

SCRIPT = ROOT / "tools/merge_lora.py"
Models = Callable[[str], Path]


def merge(*words: object) -> int:
    """The tool's exit code."""
    main = tool("merge_lora")
    return main([str(word) for word in words])


def fused(path: Path, folder: Path) -> dict[str, Tensor]:
    """What diffusers makes of a LoRA file: the difference of every weight, in float64."""
    before = base_weights(folder)
    return {name: weight.double() - before[name].double() for name, weight in applied(path, folder).items()}


def changes(path: Path, folder: Path) -> dict[str, Tensor]:
    """What a file of sd-scripts' layout means: alpha / rank * up @ down for the weight of each module, in float64."""
    read = torch.load if path.suffix == ".pt" else load_file
    tensors = {key: tensor.double() for key, tensor in read(path).items()}
    found = {}
    for name, part, place, module in targets(folder, conv=True):
        if f"{name}.lora_up.weight" in tensors:
            down, up = (tensors[f"{name}.lora_{way}.weight"] for way in ("down", "up"))
            alpha = float(tensors.get(f"{name}.alpha", down.shape[0]))
            product = up.flatten(1) @ down.flatten(1) * (alpha / down.shape[0])
            weight = module.weight
            assert isinstance(weight, Tensor)
            found[f"{part}.{place}.weight"] = product.reshape(weight.shape)
    return found


def assert_sum(here: dict[str, Tensor], parts: list[tuple[dict[str, Tensor], float]], tolerance: float = 1e-5) -> None:
    """Changes are the weighted sum of others, relative to the greatest number in these."""
    touched = 0
    for name in {name for part, _ in parts for name in part}:
        summands = [part[name] * ratio for part, ratio in parts if name in part]
        total = sum(summands[1:], summands[0])
        change = here.get(name, torch.zeros_like(total))
        bound = tolerance * sum(float(one.abs().max()) for one in summands)
        assert float((change - total).abs().max()) <= bound + 1e-6, name
        touched += bool(total.abs().max() > 1e-3)
    assert touched > 50


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_two_files_become_their_sum(name: str, tiny_models: Models, tmp_path: Path) -> None:
    folder = tiny_models(name)
    one = write_kohya(tmp_path / "cat.safetensors", folder, rank=4, alpha=2, conv_rank=2, seed=1)
    write = write_peft if name == "sd1" else write_kohya
    other = write(tmp_path / "style.safetensors", folder, rank=6, alpha=3, seed=2)
    out = tmp_path / "new/both.safetensors"
    assert merge("--models", one, other, "--ratios", 0.8, -0.5, "--save_to", out, "--concat", "--shuffle") == 0
    second = fused(other, folder) if name == "sd1" else changes(other, folder)
    assert_sum(fused(out, folder), [(changes(one, folder), 0.8), (second, -0.5)])
    told = metadata_of(out)
    assert told["modelspec.merged_from"] == ("tiny, style" if name == "sd1" else "tiny, tiny")
    assert told["modelspec.title"] == "both"
    assert (told["ss_network_dim"], told["ss_network_module"]) == ("Dynamic", "networks.lora")
    assert json.loads(told["ss_tag_frequency"]) == {"2_cat": {"cat": 3, "sitting": 2, "outdoors": 1}}
    assert len(told["sshs_model_hash"]) == 64
    assert told["sshs_model_hash"] != "0" * 64
    alphas = {(tensor.dtype, float(tensor)) for key, tensor in load_file(out).items() if key.endswith(".alpha")}
    assert alphas == {(torch.float32, float(told["ss_network_alpha"]))}


@pytest.mark.parametrize("layout", ["kohya-diffusers", "peft"])
def test_layouts(layout: str, tiny_models: Models, tmp_path: Path) -> None:
    folder = tiny_models("sdxl")
    one = write_kohya(tmp_path / "a.safetensors", folder, seed=1)
    out = tmp_path / "out.safetensors"
    assert merge("--models", one, one, "--layout", layout, "--save_to", out) == 0
    assert lora.read(out).layout == layout
    assert_sum(fused(out, folder), [(changes(one, folder), 2.0)])


def test_what_a_layout_cannot_hold_is_refused_before_any_sum(
    tiny_models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = write_kohya(tmp_path / "a.safetensors", tiny_models("sd1"))
    save_file(load_file(one) | {"bundle_emb.cat.string_to_param.*": torch.ones(2, 8)}, one, metadata_of(one))
    assert merge("--models", one, one, "--layout", "peft", "--save_to", tmp_path / "out.safetensors") == 2
    said = capsys.readouterr().err
    assert "has embeddings, for which the layout peft has no place" in said
    assert "merge:" not in said


def test_missing_alphas_bfloat16_and_torch_files(tiny_models: Models, tmp_path: Path) -> None:
    folder = tiny_models("sd1")
    one = write_kohya(tmp_path / "a.safetensors", folder, alphas=False, dtype=torch.bfloat16, metadata={}, seed=1)
    other = write_kohya(tmp_path / "b.pt", folder, rank=2, alpha=4, text=False, seed=2)
    out = tmp_path / "both.safetensors"
    assert merge("--models", other, one, "--save_to", out, "--save_precision", "fp16") == 0
    assert_sum(changes(out, folder), [(changes(one, folder), 1.0), (changes(other, folder), 1.0)], tolerance=2e-3)
    found = load_file(out)
    assert {t.dtype for key, t in found.items() if not key.endswith("alpha")} == {torch.float16}


def test_cut_to_ranks(tiny_models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_models("sd1")
    one = write_kohya(tmp_path / "a.safetensors", folder, rank=5, conv_rank=5, seed=1)
    other = write_kohya(tmp_path / "b.safetensors", folder, rank=3, conv_rank=3, seed=2)
    out = tmp_path / "c.safetensors"
    assert merge("--models", one, other, "--new_conv_rank", 2, "--save_to", out, "--no_metadata") == 0
    ranks = {(3 if t.shape[2:] == (3, 3) else 1): t.shape[0] for key, t in load_file(out).items() if "down.w" in key}
    assert ranks == {1: 4, 3: 2}
    told = metadata_of(out)
    assert json.loads(told["ss_network_args"]) == {"conv_dim": "2", "conv_alpha": "4.0"}
    assert not any(key.startswith(("modelspec.", "ss_tag")) for key in told)
    assert "OUT11" in capsys.readouterr().out
    assert merge("--models", one, "--svd", "--new_rank", 5, "--save_to", out) == 0
    assert_sum(changes(out, folder), [(changes(one, folder), 1.0)])


def test_taking_a_file_out_again(tiny_models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_models("sd1")
    one = write_kohya(tmp_path / "a.safetensors", folder, rank=3, text=False, seed=1)
    other = write_kohya(tmp_path / "b.safetensors", folder, rank=2, conv_rank=1, seed=2)
    both, back = tmp_path / "both.safetensors", tmp_path / "back.safetensors"
    assert merge("--models", one, other, "--ratios", 1, 0.5, "--save_to", both) == 0
    assert merge("--unmerge", "--models", both, other, "--ratios", 1, 0.5, "--save_to", back) == 0
    assert_sum(changes(back, folder), [(changes(one, folder), 1.0)])
    assert {t.shape[0] for key, t in load_file(back).items() if "lora_down" in key} == {3}
    assert lora.read(back).modules.keys() == lora.read(one).modules.keys()
    assert "came to nothing" in capsys.readouterr().err
    assert merge("--unmerge", "--models", both, both, "--save_to", back) == 2
    assert "nothing is left" in capsys.readouterr().err


def test_weights_by_block(tiny_models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_models("sd1")
    one = write_kohya(tmp_path / "a.safetensors", folder, conv_rank=2, seed=1)
    out = tmp_path / "out.safetensors"
    weights = [0.5, *[0] * 6, 0.25, *[0] * 9]
    assert merge("--models", one, "--lbws", json.dumps(weights), "--save_to", out) == 0
    after = changes(out, folder)
    for name, before in changes(one, folder).items():
        short = (
            "attentions" not in name
            and "unet" in name
            and any(part in name for part in ("downsamplers", "down_blocks.3", "up_blocks.0"))
        )
        factor = 0.5 if name.startswith("text") else 0.25 if "mid_block" in name else 1.0 if short else 0.0
        change = after.get(name, torch.zeros_like(before))
        assert torch.allclose(change, before * factor, atol=1e-6), name
    assert len(after) > 20
    assert "a list of 17 doesn't name" in capsys.readouterr().err


def test_lycoris_whose_factors_are_exact(tiny_models: Models, tmp_path: Path) -> None:
    folder = tiny_models("sd1")
    one = write_lycoris(tmp_path / "a.safetensors", folder, "loha", rank=2, only="mid_block|up_blocks_1")
    other = write_kohya(tmp_path / "b.safetensors", folder, seed=2)
    out = tmp_path / "out.safetensors"
    assert merge("--models", other, one, "--save_to", out) == 0
    added = changes_of_loha(one)
    found, base = lora.read(out).modules, lora.read(other).modules
    assert added
    for name, whole in added.items():
        product = sum_of(found[name]) - (sum_of(base[name]) if name in base else 0)
        assert torch.allclose(product.reshape(whole.shape), whole, atol=1e-6), name


def sum_of(module: lora.Module) -> Tensor:
    up, down = (module.leaves[f"lora_{way}.weight"].double().flatten(1) for way in ("up", "down"))
    assert module.alpha is not None
    return up @ down * (module.alpha / down.shape[0])


def changes_of_loha(path: Path) -> dict[str, Tensor]:
    """(w1_a @ w1_b) * (w2_a @ w2_b) * alpha / rank, for modules without Tucker cores."""
    tensors = {key: tensor.double() for key, tensor in load_file(path).items()}
    names = {key.partition(".")[0] for key in tensors}
    found = {}
    for name in names:
        one, two = (tensors[f"{name}.hada_w{n}_a"] @ tensors[f"{name}.hada_w{n}_b"] for n in (1, 2))
        found[name] = one * two * (tensors[f"{name}.alpha"] / tensors[f"{name}.hada_w1_b"].shape[0])
    return found


@pytest.mark.parametrize("name", ["sd1", "sdxl_file"])
def test_into_a_base_model_and_out_again(
    name: str, tiny_models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, folder = tiny_models(name), tiny_models(name.partition("_")[0])
    one = write_kohya(tmp_path / "a.safetensors", folder, seed=1)
    ending = ".safetensors" if model.is_file() else ""
    into, back = tmp_path / f"into{ending}", tmp_path / f"back{ending}"
    assert merge("--sd_model", model, "--models", one, "--ratios", 0.5, "--save_to", into) == 0
    assert "modules merged into" in capsys.readouterr().err
    given = ("--models", one, "--ratios", 0.5, "--unmerge")
    assert merge("--sd_model", into, *given, "--save_to", back, "--save_precision", "float") == 0
    inner = "" if model.is_file() else "unet/diffusion_pytorch_model.safetensors"
    before, merged, after = (load_file(path / inner) for path in (model, into, back))
    assert before.keys() == merged.keys() == after.keys()
    assert sum(not torch.equal(before[key], merged[key]) for key in before) > 50
    for key, tensor in before.items():
        assert torch.allclose(tensor.float(), after[key].float(), atol=1e-5), key
    if not inner:
        return
    wanted = applied(one, folder, 0.5)
    for key, tensor in merged.items():
        assert torch.allclose(tensor, wanted[f"unet.{key}"], atol=1e-6), key


def test_what_headers_tell_of_a_base_model_is_told_first(
    tiny_models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before libraries are loaded, which takes seconds; families as soon as the LoRA is read."""
    folder = tiny_models("sd1")
    one, other = (write_kohya(tmp_path / f"{name}.safetensors", tiny_models(name)) for name in ("sd1", "sdxl"))
    there = tmp_path / "there"
    there.mkdir()
    (there / "file").touch()
    for model, save_to, wrong in (
        (folder, there, "is there already"),
        (folder, tmp_path / "x.safetensors", "is the name of a file"),
        (folder, folder / "inner", "lies within"),
        (one, tmp_path / "x.safetensors", "is a LoRA (or another adapter), not a base model"),
    ):
        assert merge("--sd_model", model, "--models", one, "--save_to", save_to) == 2
        told = capsys.readouterr().err
        assert wrong in told and "loading libraries" not in told
    model = tmp_path / "model.safetensors"
    model.write_bytes(tiny_models("sd1_file").read_bytes())
    assert merge("--sd_model", model, "--models", other, "--save_to", tmp_path / "x.safetensors") == 2
    assert f"--sd_model {model}: is an SD1 model, {other} is made for SDXL" in capsys.readouterr().err
    assert merge("--sd_model", model, "--models", one, "--save_to", model) == 0
    assert f"{model} is one of the files that are read: it is replaced" in capsys.readouterr().err


def test_embeddings_stay_beside_the_model(
    tiny_models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_models("sd1_file")
    one = write_kohya(tmp_path / "a.safetensors", tiny_models("sd1"), text=False, seed=1)
    vector = torch.ones(1, 32)
    save_file({**load_file(one), "bundle_emb.cat.clip_l": vector}, one, metadata_of(one))
    assert merge("--sd_model", model, "--models", one, "--save_to", tmp_path / "into.safetensors") == 0
    assert "its embeddings stay out of the model" in capsys.readouterr().err
    assert load_file(tmp_path / "into.safetensors").keys() == load_file(model).keys()
    assert merge("--models", one, one, "--save_to", tmp_path / "twice.safetensors") == 0
    assert torch.equal(load_file(tmp_path / "twice.safetensors")["bundle_emb.cat.clip_l"], vector)
    assert merge("--sd_model", model, "--models", one, "--save_to", tmp_path / "into.ckpt") == 2
    assert "ends in .ckpt; use .safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        (["--ratios", "1"], ["--ratios: 1 for 2 files"]),
        (["--ratios", "1", "nan", "--lbws", "[1]"], ["nan is no finite number", "--lbws: 1 for 2", "has 1 numbers"]),
        (["--new_rank", "0"], ["--new_rank: 0 is no rank"]),
        (["--concat", "--svd"], ["--concat: contradicts"]),
        (["--save_to", "x.bin"], ["ends in .bin"]),
        (
            ["--sd_model", "nowhere", "--svd", "--layout", "peft"],
            ["--layout: has no", "--svd", "no such file or folder"],
        ),
        (["--v2"], ["--v2: "]),
        (["--device", "nothing"], ["--device: nothing can't be used"]),
        (["--lbws", "1" + ",1" * 11, "1" + ",1" * 11], ["has 12 numbers, but the file is made for SD1"]),
    ],
)
def test_flags_that_cannot_be_followed(
    words: list[str], wrong: list[str], tiny_models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = write_kohya(tmp_path / "a.safetensors", tiny_models("sd1"))
    out = tmp_path / "out.safetensors"
    assert merge("--models", one, one, "--save_to", out, *words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == len(wrong)
    for text in wrong:
        assert any(text in line for line in lines), lines
    assert not out.exists()


def test_files_that_cannot_be_merged(tiny_models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tiny_models("sd1"), tmp_path / "out.safetensors"
    good = write_kohya(tmp_path / "good.safetensors", folder)

    def refused(*paths: Path) -> list[str]:
        assert merge("--models", good, *paths, "--save_to", out) == 2
        assert not out.exists()
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]

    for how in ("truncated", "header", "nan", "missing_up"):
        bad = damage(write_kohya(tmp_path / f"{how}.safetensors", folder), how)
        (line,) = refused(bad)
        assert bad.name in line
    missing = refused(tmp_path / "no.safetensors", tmp_path / "nor.safetensors")
    assert [name in line for name, line in zip(("no.", "nor."), missing, strict=True)] == [True, True]
    (line,) = refused(write_dora(tmp_path / "dora.safetensors", folder))
    assert "is a DoRA" in line
    assert "--sd_model" in line
    (line,) = refused(write_kohya(tmp_path / "xl.safetensors", tiny_models("sdxl")))
    assert "is made for SDXL" in line
    (line,) = refused(tiny_models("sd1_file"))
    assert "base model" in line


def test_a_file_may_replace_one_of_its_own(tiny_models: Models, tmp_path: Path) -> None:
    folder = tiny_models("sd1")
    one = write_kohya(tmp_path / "a.safetensors", folder, seed=1)
    copy = write_kohya(tmp_path / "copy.safetensors", folder, seed=1)
    assert merge("--models", one, "--ratios", 0.5, "--save_to", one) == 0
    assert_sum(changes(one, folder), [(changes(copy, folder), 0.5)])
