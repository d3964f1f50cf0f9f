"""tools/convert_lora.py: files of every program in the layout of another, and what it says where that can't be."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.weights.hashes import lora_hashes
from library.weights.loras.forms import delta
from library.weights.loras.lora import read
from tests import lora_files
from tests.programs import tool

pytestmark = pytest.mark.xdist_group("lycoris")
Finder = Callable[[str], Path]
FAMILIES = ("sd1", "sd2", "sdxl")


def convert(*words: object) -> int:
    """The tool's `main`."""
    return tool("convert_lora")([str(word) for word in words])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["kohya-diffusers", "peft"])
def test_there_and_back_is_the_same_file(family: str, layout: str, tiny_models: Finder, tmp_path: Path) -> None:
    first = lora_files.write_kohya(tmp_path / "a.safetensors", tiny_models(family), conv_rank=2, dtype=torch.bfloat16)
    assert convert(first, tmp_path / "b.safetensors", "--to", layout) == 0
    assert convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "--to", "kohya") == 0
    before, after = load_file(first), load_file(tmp_path / "c.safetensors")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(tensor.float() if key.endswith("alpha") else tensor, after[key]), key
    told, was = lora_files.metadata_of(tmp_path / "c.safetensors"), lora_files.metadata_of(first)
    hashes = lora_hashes(after, {key: value for key, value in told.items() if not key.startswith("sshs_")})
    assert told["sshs_model_hash"] == hashes.model
    assert told["sshs_legacy_hash"] == hashes.legacy
    assert "modelspec.hash_sha256" not in told
    changed = {"modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash"}
    assert {key: told.get(key) for key in was if key not in changed} == {
        key: value for key, value in was.items() if key not in changed
    }


def test_a_file_of_peft_gets_what_loaders_look_for(tiny_sdxl: Path, tmp_path: Path) -> None:
    path = lora_files.write_peft(tmp_path / "p.safetensors", tiny_sdxl, alpha=3.0, adapter_metadata=True)
    assert convert(path, tmp_path / "k.safetensors", "--to", "kohya", "--save_precision", "fp16") == 0
    tensors, told = load_file(tmp_path / "k.safetensors"), lora_files.metadata_of(tmp_path / "k.safetensors")
    assert set(tensors) == set(load_file(lora_files.write_kohya(tmp_path / "x.safetensors", tiny_sdxl)))
    assert {t.dtype for key, t in tensors.items() if not key.endswith("alpha")} == {torch.float16}
    assert {float(t) for key, t in tensors.items() if key.endswith("alpha")} == {3.0}
    assert told["ss_base_model_version"] == "sdxl_base_v1-0"
    assert told["ss_v2"] == "False"
    assert told["ss_network_module"] == "networks.lora"
    assert (told["ss_network_dim"], told["ss_network_alpha"]) == ("4", "3.0")
    assert "lora_adapter_metadata" not in told


def test_missing_alphas_are_written_for_kohya(tiny_sd1: Path, tmp_path: Path) -> None:
    path = lora_files.write_kohya(tmp_path / "a.safetensors", tiny_sd1, alphas=False, rank=3)
    assert convert(path, path, "--to", "kohya") == 0
    modules = read(path).modules
    assert {module.alpha for module in modules.values()} == {3.0}


def test_text_encoders_in_a_file_of_their_own(tiny_sdxl: Path, tmp_path: Path, capsys: Any) -> None:
    path = lora_files.write_kohya(tmp_path / "a.safetensors", tiny_sdxl)
    assert convert(path, tmp_path / "b.safetensors", "--to", "peft", "--split_text_encoder") == 0
    unet, text = (load_file(tmp_path / f"b{ending}.safetensors") for ending in ("", ".text_encoder"))
    assert {key.partition(".")[0] for key in unet} == {"unet"}
    assert {key.partition(".")[0] for key in text} == {"text_encoder", "text_encoder_2"}
    whole = read(path).modules
    halves = [read(tmp_path / f"b{ending}.safetensors").modules for ending in ("", ".text_encoder")]
    assert whole.keys() == halves[0].keys() | halves[1].keys()
    only = lora_files.write_kohya(tmp_path / "u.safetensors", tiny_sdxl, text=False)
    assert convert(only, tmp_path / "c.safetensors", "--to", "peft", "--split_text_encoder") == 2
    assert "holds only modules of the U-Net" in capsys.readouterr().err


@pytest.mark.parametrize("algo", ["loha", "lokr", "locon", "dora"])
def test_lycoris_as_a_plain_lora(algo: str, tiny_sd1: Path, tmp_path: Path, capsys: Any) -> None:
    """LyCORIS' kinds that are made of small matrices mean the same as plain LoRA, or DoRA, modules."""
    only = "down_blocks_0_(attentions_0_.*(attn2_to_k|proj_in)|resnets_0_conv1)"
    more: dict[str, Any] = {"use_tucker": True} if algo == "locon" else {}
    more |= {"weight_decompose": True, "wd_on_out": True} if algo == "dora" else {}
    path = tmp_path / "theirs.safetensors"
    lora_files.write_lycoris(path, tiny_sd1, "loha" if algo == "dora" else algo, only=only, rank=2, **more)
    if algo != "locon":
        assert convert(path, tmp_path / "plain.safetensors", "--to", "peft") == 2
        assert "tools/convert_lora.py --as_lora" in capsys.readouterr().err or algo == "dora"
    for layout in ("kohya", "peft"):
        assert convert(path, tmp_path / "plain.safetensors", "--to", layout, "--as_lora") == 0
        theirs, ours = read(path).modules, read(tmp_path / "plain.safetensors").modules
        assert theirs.keys() == ours.keys()
        for name, module in ours.items():
            assert module.leaves.keys() - {"dora_scale"} == {"lora_down.weight", "lora_up.weight"}
            if algo == "dora":
                size = theirs[name].leaves["dora_scale"]
                assert torch.equal(module.leaves["dora_scale"].flatten(), size.flatten())
                continue
            found, expected = delta(module), delta(theirs[name])
            assert found is not None
            assert expected is not None
            torch.testing.assert_close(found.flatten(), expected.flatten(), rtol=1e-4, atol=1e-7)
        told = lora_files.metadata_of(tmp_path / "plain.safetensors")
        assert told["ss_network_module"] == "networks.lora"
        assert told["ss_training_comment"].startswith("made a plain LoRA")


def test_kinds_without_factors_stay(tiny_sd1: Path, tmp_path: Path, capsys: Any) -> None:
    only = "down_blocks_0_attentions_0_.*attn2_to_k"
    path = lora_files.write_lycoris(tmp_path / "full.safetensors", tiny_sd1, "full", only=only)
    assert convert(path, tmp_path / "same.safetensors", "--to", "kohya", "--as_lora") == 0
    assert "1 modules have no exact factors and stay" in capsys.readouterr().err
    before, after = load_file(path), load_file(tmp_path / "same.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


def test_an_older_layout_takes_alphas_into_its_weights(tiny_sd1: Path, tmp_path: Path) -> None:
    path = lora_files.write_kohya(tmp_path / "a.safetensors", tiny_sd1, rank=4, alpha=3.0)
    assert convert(path, tmp_path / "d.safetensors", "--to", "diffusers") == 0
    modules = read(tmp_path / "d.safetensors").modules
    for name, module in read(path).modules.items():
        assert modules[name].alpha is None
        found, expected = delta(modules[name]), delta(module)
        assert found is not None
        assert expected is not None
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_pickles_lose_their_metadata_and_say_so(tiny_sd1: Path, tmp_path: Path, capsys: Any) -> None:
    path = lora_files.write_kohya(tmp_path / "a.safetensors", tiny_sd1)
    assert convert(path, tmp_path / "b.pt", "--to", "kohya") == 0
    assert "files have no metadata" in capsys.readouterr().err
    assert convert(tmp_path / "b.pt", tmp_path / "c.safetensors", "--to", "kohya") == 0
    assert load_file(path).keys() == load_file(tmp_path / "c.safetensors").keys()


@pytest.mark.parametrize("how", ["truncated", "header", "missing_up", "nan"])
def test_damaged_files_leave_nothing(how: lora_files.Damage, tiny_sd1: Path, tmp_path: Path, capsys: Any) -> None:
    path = lora_files.damage(lora_files.write_kohya(tmp_path / "a.safetensors", tiny_sd1), how)
    assert convert(path, tmp_path / "b.safetensors", "--to", "peft") == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert said.startswith(f"error: {path}: ")
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_wrong_is_said_at_once(tiny_sd1: Path, tiny_sd1_file: Path, tmp_path: Path, capsys: Any) -> None:
    assert convert(tmp_path / "none.safetensors", tmp_path / "x.bin", "--to", "peft") == 2
    said = capsys.readouterr().err
    assert "there is no such weight file" in said
    assert "ends in .bin" in said
    assert convert(tiny_sd1_file, tmp_path / "x.safetensors", "--to", "peft") == 2
    assert "is a base model, not a LoRA" in capsys.readouterr().err
    save_file({"emb_params": torch.ones(2, 32)}, tmp_path / "e.safetensors")
    assert convert(tmp_path / "e.safetensors", tmp_path / "x.safetensors", "--to", "peft") == 2
    said = capsys.readouterr().err
    assert "is an embedding" in said
    assert "--weights" not in said
    assert convert(tmp_path, tmp_path / "x.safetensors", "--to", "peft") == 2
    assert "is a folder; " in capsys.readouterr().err
    path = lora_files.write_kohya(tmp_path / "a.safetensors", tiny_sd1)
    assert convert(path, path / "x.safetensors", "--to", "peft") == 2
    assert "is no folder" in capsys.readouterr().err


def test_one_alpha_leaves_modules_that_have_it_as_they_are(tiny_sd1: Path, tmp_path: Path, capsys: Any) -> None:
    """Powers of 2 are exact in any dtype; other layouts than kohya's need no warning."""
    path = lora_files.write_kohya(tmp_path / "a.safetensors", tiny_sd1, alpha=2.0, dtype=torch.bfloat16)
    tensors = load_file(path)
    odd = [key for key in tensors if key.endswith("attn1_to_q.alpha")]
    save_file(tensors | {key: torch.tensor(0.5) for key in odd}, path, lora_files.metadata_of(path))
    assert convert(path, tmp_path / "b.safetensors", "--to", "peft") == 0
    assert "--one_alpha" not in capsys.readouterr().err
    assert convert(path, tmp_path / "b.safetensors", "--to", "kohya") == 0
    assert f"diffusers would give {len(odd)} modules another's" in capsys.readouterr().err
    assert convert(path, tmp_path / "b.safetensors", "--to", "kohya", "--one_alpha") == 0
    before, after = load_file(path), load_file(tmp_path / "b.safetensors")
    assert {float(tensor) for key, tensor in after.items() if key.endswith("alpha")} == {2.0}
    for key, tensor in after.items():
        name, _, leaf = key.partition(".")
        if leaf != "alpha":
            scale = 0.25 if leaf == "lora_up.weight" and f"{name}.alpha" in odd else 1.0
            assert torch.equal(tensor, before[key] * scale), key
