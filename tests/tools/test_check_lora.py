"""tools/check_lora.py on files of every kind: what it finds, prints, and ends with."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.weights.loras.lora import Module
from library.weights.loras.statistics import facts_of
from tests.lora_files import damage, metadata_of, write_dora, write_kohya, write_lycoris, write_peft
from tests.programs import tool

Main = Callable[..., int]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def main() -> Main:
    return tool("check_lora")


@pytest.fixture(scope="module")
def files(tiny_models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Files by kind, small ones, made when they are first asked for."""
    place = tmp_path_factory.mktemp("checked")
    sd1, sd2, sdxl = (tiny_models(name) for name in ("sd1", "sd2", "sdxl"))
    makers: dict[str, Callable[[Path], Path]] = {
        "kohya": lambda path: write_kohya(path, sdxl, conv_rank=2),
        "bf16": lambda path: write_kohya(path, sd1, dtype=torch.bfloat16),
        "peft": lambda path: write_peft(path, sd1),
        "bare": lambda path: write_kohya(path, sd2, alphas=False, metadata={}),
        "dora": lambda path: write_dora(path, sd1, text=False),
        "loha": lambda path: write_lycoris(path, sd1, "loha", only="mid_block"),
        "full": lambda path: write_lycoris(path, sd1, "full", only="mid_block"),
    }

    def find(kind: str) -> Path:
        path = place / f"{kind}.safetensors"
        return path if path.is_file() else makers[kind](path)

    return find


def checked(main: Main, capsys: Capture, path: Path, code: int = 0) -> dict[str, Any]:
    assert main([str(path), "--json"]) == code
    (found,) = json.loads(capsys.readouterr().out)
    assert found["path"] == str(path)
    return dict(found)


@pytest.mark.parametrize(
    ("kind", "family", "layout", "what"),
    [
        ("kohya", "sdxl", "kohya", "lora"),
        ("bf16", "sd1", "kohya", "lora"),
        ("peft", "sd1", "peft", "lora"),
        ("bare", "sd2", "kohya", "lora"),
        ("dora", "sd1", "kohya", "dora"),
        ("loha", "sd1", "kohya", "loha"),
        ("full", "sd1", "kohya", "full"),
    ],
)
def test_files_of_every_kind(
    main: Main, files: Callable[[str], Path], capsys: Capture, kind: str, family: str, layout: str, what: str
) -> None:
    path = files(kind)
    found = checked(main, capsys, path)
    assert (found["family"], found["layout"], found["broken"]) == (family, layout, False)
    assert {one["kind"] for one in found["modules"]} == {what}
    assert sum(one["modules"] for one in found["blocks"]) == len(found["modules"])
    assert found["dtypes"] == (["BF16"] if kind == "bf16" else ["F32"])
    assert bool(found["programs"]["diffusers"]["refused"]) == (what in ("loha", "full"))


def test_norms_and_ranks_are_those_of_the_whole_matrix(
    main: Main, files: Callable[[str], Path], capsys: Capture
) -> None:
    path = files("kohya")
    found = checked(main, capsys, path)
    tensors = {key: one.double() for key, one in load_file(path).items()}
    squares = 0.0
    for one in found["modules"]:
        up, down = (tensors[f"{one['name']}.lora_{way}.weight"].flatten(1) for way in ("up", "down"))
        whole = up @ down * (2.0 / down.shape[0])
        assert one["norm"] == pytest.approx(float(whole.norm()), rel=1e-9)
        assert one["used"] == int(torch.linalg.matrix_rank(whole.float())) == one["rank"]
        squares += float(whole.square().sum())
    assert sum(one["norm"] ** 2 for one in found["blocks"]) == pytest.approx(squares, rel=1e-9)


def test_what_is_odd_about_numbers() -> None:
    random = torch.Generator().manual_seed(0)
    down, up = torch.randn(4, 8, generator=random), torch.randn(6, 4, generator=random)
    up[:, 2] = up[:, 1]

    def facts(**leaves: torch.Tensor) -> Any:
        named = {"lora_down.weight": down, "lora_up.weight": up} | {
            f"lora_{way}.weight": one for way, one in leaves.items()
        }
        return facts_of(Module("lora_unet_mid_block_attentions_0_proj_in", named, 4.0))

    assert (facts().rank, facts().used, facts().is_zero, facts().not_finite, facts().too_large) == (4, 3, False, (), ())
    zero = facts(up=torch.zeros(6, 4))
    assert (zero.is_zero, zero.used, zero.norm) == (True, 0, 0.0)
    assert facts(up=up * 1e6).too_large == ("lora_up.weight",)
    assert facts(up=up.bfloat16() * 1e6).too_large == ("lora_up.weight",)
    assert facts(down=down.half() * 1e30).not_finite == ("lora_down.weight",)
    noisy = up + torch.randn(6, 4, generator=random) * 1e-4
    assert facts(up=noisy).used == 4
    assert facts(up=noisy.half(), down=down.half()).used == 3


def test_it_prints_tables_and_what_is_left_out(main: Main, files: Callable[[str], Path], capsys: Capture) -> None:
    assert main([str(files("peft")), "--verbose"]) == 0
    printed = capsys.readouterr().out
    assert "SD1, layout peft" in printed
    assert "A1111: 222 left out, it doesn't read dotted names" in printed
    assert "diffusers" in printed
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q" in printed
    assert "metadata: missing: ss_v2" in printed
    assert printed.rstrip().endswith("sound")


def test_keys_are_listed_as_by_sd_scripts(main: Main, files: Callable[[str], Path], capsys: Capture) -> None:
    path = files("kohya")
    tensors = load_file(path)
    assert main([str(path), "--show_all_keys"]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = lines.index(f"number of LoRA modules: {len(tensors)}")
    for line in lines[start + 1 :]:
        key, shape, mean, least = line.split(",") if "(," not in line else line.replace("(,", "(").split(",")
        assert shape == str(tuple(tensors[key].shape)).replace(", ", "-")
        assert float(mean) == pytest.approx(float(tensors[key].abs().mean()), rel=1e-5)
        assert float(least) == float(tensors[key].abs().min())
    assert len(lines) == start + 1 + len(tensors)
    assert main([str(path), "--keys"]) == 0
    factors = [key for key in tensors if ".alpha" not in key]
    assert f"number of LoRA modules: {len(factors)}" in capsys.readouterr().out
    assert main([str(path), "--keys", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert [one["key"] for one in found["keys"]] == factors


def test_numbers_that_are_not_finite_break_a_file(
    main: Main, files: Callable[[str], Path], tmp_path: Path, capsys: Capture
) -> None:
    path = tmp_path / "nan.safetensors"
    path.write_bytes(files("bf16").read_bytes())
    damage(path, "nan")
    found = checked(main, capsys, path, code=1)
    assert found["broken"]
    assert sum(bool(one["not_finite"]) for one in found["modules"]) == 1
    assert main([str(files("bf16")), str(path)]) == 1
    printed = capsys.readouterr().out
    assert "1 not finite: " in printed
    assert printed.rstrip().endswith("broken")
    tensors = load_file(files("bf16"))
    next(tensor for key, tensor in tensors.items() if key.endswith(".alpha")).fill_(float("nan"))
    save_file(tensors, path)
    found = checked(main, capsys, path, code=1)
    assert sum(one["not_finite"] == ["alpha"] for one in found["modules"]) == 1


def test_a_file_of_which_no_program_takes_anything_is_broken(main: Main, tmp_path: Path, capsys: Capture) -> None:
    name = "oft_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    path = tmp_path / "oft.safetensors"
    save_file({f"{name}.oft_blocks": torch.zeros(4, 2, 2), f"{name}.alpha": torch.tensor(1e-3)}, path)
    found = checked(main, capsys, path, code=1)
    assert not any(one["taken"] for one in found["programs"].values())


@pytest.mark.parametrize(
    ("how", "message"),
    [("truncated", "is truncated"), ("header", "safetensors"), ("missing_up", "lacks lora_up")],
)
def test_damaged_files_are_one_line_and_others_are_shown(
    main: Main, files: Callable[[str], Path], tmp_path: Path, capsys: Capture, how: Any, message: str
) -> None:
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(files("bf16").read_bytes())
    damage(path, how)
    assert main([str(path), str(files("loha"))]) == 2
    printed = capsys.readouterr()
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert str(files("loha")) in printed.out


def test_what_is_no_lora_is_refused(main: Main, tiny_sd1_file: Path, tmp_path: Path, capsys: Capture) -> None:
    embedding = tmp_path / "embedding.safetensors"
    save_file({"emb_params": torch.ones(2, 768)}, embedding)
    flux = tmp_path / "flux.safetensors"
    save_file(
        {f"lora_unet_double_blocks_0_img_attn_proj.lora_{way}.weight": torch.ones(4, 4) for way in ("up", "down")}, flux
    )
    strange = tmp_path / "strange.safetensors"
    save_file({f"lora_unet_of_nobody.lora_{way}.weight": torch.ones(4, 4) for way in ("up", "down")}, strange)
    missing = tmp_path / "missing.safetensors"
    assert main([*map(str, (tiny_sd1_file, embedding, flux, strange, missing))]) == 2
    errors = capsys.readouterr().err
    for words in ("is a base model", "is an embedding", "Flux", "none of its modules is one of SD1", "no such"):
        assert words in errors


def test_pickles_and_bundles(main: Main, files: Callable[[str], Path], tmp_path: Path, capsys: Capture) -> None:
    tensors = load_file(files("bf16"))
    pickle = tmp_path / "lora.pt"
    torch.save(tensors, pickle)
    assert checked(main, capsys, pickle)["family"] == "sd1"
    bundle = tmp_path / "bundle.safetensors"
    save_file({**tensors, "bundle_emb.cat.string_to_param.*": torch.ones(2, 32)}, bundle, metadata_of(files("bf16")))
    found = checked(main, capsys, bundle)
    assert found["bundled"] == ["bundle_emb.cat.string_to_param.*"]
    assert found["programs"]["A1111"]["takes"] == "all"
    assert found["programs"]["diffusers"]["takes"] == "none"
