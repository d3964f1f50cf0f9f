"""extract_lora.py on tiny models into which a LoRA was merged by `networks.base_weights`: it has to come out again."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.lora_files import applied, base_weights, damage, pipeline, targets, write_kohya
from tests.original_layout import folder_as_single_file
from tests.programs import ROOT, environment, tool

extract = tool("extract_lora")
Tiny = Callable[[str], Path]
RANK = 3


@pytest.fixture(scope="module")
def tuned(tiny_models: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """(folder of a tiny model with a LoRA-C3Lier merged into it, the LoRA), by family, made once."""
    from networks.base_weights import merge_base_weights

    made: dict[str, tuple[Path, Path]] = {}

    def find(family: str) -> tuple[Path, Path]:
        if family not in made:
            base, place = tiny_models(family), tmp_path_factory.mktemp(family)
            lora = write_kohya(place / "merged.safetensors", base, rank=RANK, alpha=1.5, conv_rank=RANK)
            pipe = pipeline(base)
            encoders = [pipe.text_encoder, *([pipe.text_encoder_2] if hasattr(pipe, "text_encoder_2") else [])]
            merge_base_weights(pipe.unet, encoders if len(encoders) > 1 else encoders[0], [lora])
            pipe.save_pretrained(place / "model")
            made[family] = place / "model", lora
        return made[family]

    return find


def products(path: Path) -> dict[str, torch.Tensor]:
    """alpha / rank * up @ down of each module of a kohya file, in float64."""
    tensors = {key: tensor.double() for key, tensor in load_file(path).items()}
    found = {}
    for key, down in tensors.items():
        if key.endswith(".lora_down.weight"):
            name = key.removesuffix(".lora_down.weight")
            up = tensors[f"{name}.lora_up.weight"].flatten(1)
            scale = float(tensors[f"{name}.alpha"]) / len(down)
            found[name] = scale * up @ down.flatten(1)
    return found


def run(org: object, new: object, out: Path, *more: object) -> int:
    return extract([*map(str, ("--model_org", org, "--model_tuned", new, "--save_to", out, *more))])


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_what_was_merged_comes_out(
    family: str, tiny_models: Tiny, tuned: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    folder, lora = tuned(family)
    file, out = tmp_path / "tuned.safetensors", tmp_path / "out.safetensors"
    folder_as_single_file(folder, file)
    assert run(tiny_models(family), file, out, "--dim", RANK, "--conv_dim", RANK, "--clamp_quantile", 1) == 0
    merged, found = products(lora), products(out)
    assert found.keys() == merged.keys()
    for name, product in merged.items():
        assert float((found[name] - product).norm()) <= 1e-4 * float(product.norm()), name


def test_diffusers_makes_the_tuned_model_of_it(
    tiny_models: Tiny, tuned: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    folder, lora = tuned("sdxl")
    out, base = tmp_path / "out.safetensors", tiny_models("sdxl_file")
    assert run(base, folder, out, "--dim", RANK, "--conv_dim", RANK, "--clamp_quantile", 1) == 0
    assert products(out).keys() == products(lora).keys()
    wanted = base_weights(folder)
    for name, weight in applied(out, tiny_models("sdxl")).items():
        assert torch.allclose(weight, wanted[name], atol=2e-5), name


def test_without_a_conv_rank_it_is_of_lierlas_modules(
    tiny_sd1: Path, tuned: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    folder, _ = tuned("sd1")
    out = tmp_path / "out.safetensors"
    assert run(tiny_sd1, folder, out, "--save_precision", "fp16") == 0
    tensors = load_file(out)
    assert {key.partition(".")[0] for key in tensors} == {name for name, *_ in targets(tiny_sd1)}
    downs = {key: tensor for key, tensor in tensors.items() if key.endswith("lora_down.weight")}
    assert {len(tensor) for tensor in downs.values()} == {4}
    assert {tensor.dtype for tensor in downs.values()} == {torch.float16}


def test_metadata_says_what_loaders_need(
    tiny_models: Tiny, tuned: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    from safetensors import safe_open

    folder, _ = tuned("sd2")
    out = tmp_path / "name.safetensors"
    assert run(tiny_models("sd2"), folder, out, "--v2", "--dim", 2, "--conv_dim", 1) == 0
    with safe_open(out, "pt") as file:
        told = file.metadata()
    assert told["ss_v2"] == "True"
    assert told["ss_base_model_version"] == "sd_v2_v"
    assert told["ss_network_module"] == "networks.lora"
    assert (told["ss_network_dim"], told["ss_network_alpha"]) == ("2", "2.0")
    assert json.loads(told["ss_network_args"]) == {"conv_dim": "1", "conv_alpha": "1.0"}
    assert told["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
    assert told["modelspec.title"] == "name"
    assert len(told["sshs_model_hash"]) == 64
    assert run(tiny_models("sd2"), folder, out, "--no_metadata") == 0
    with safe_open(out, "pt") as file:
        assert not any(key.startswith("modelspec.") for key in file.metadata())


def test_what_the_tuned_model_predicts(
    tiny_models: Tiny, tuned: Callable[[str], tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors import safe_open

    folder, base, out = tuned("sd1")[0], tiny_models("sd1"), tmp_path / "out.safetensors"
    file = tmp_path / "tuned.safetensors"
    folder_as_single_file(folder, file)
    for org, flags, version in (
        (base, (), "sd_v1"),
        (base, ("--v_parameterization",), "sd_v1_v"),
    ):
        assert run(org, file, out, *flags) == 0
        with safe_open(out, "pt") as read:
            assert read.metadata()["ss_base_model_version"] == version
    capsys.readouterr()
    assert run(base, folder, out, "--v_parameterization") == 2
    assert "--v_parameterization: model predicts noise (its scheduler_config.json)" in capsys.readouterr().err


def test_the_table_tells_the_true_error_and_what_clamping_costs(
    tiny_sd1: Path, tuned: Callable[[str], tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, lora = tuned("sd1")
    out = tmp_path / "out.safetensors"
    assert run(tiny_sd1, folder, out, "--dim", 2, "--conv_dim", 1, "--verbose") == 0
    rows = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines() if "lora_unet" in line]
    merged, found = products(lora), products(out)
    shown = {name: (float(error), float(unclamped)) for name, _, _, error, unclamped in rows}
    assert shown.keys() == {name for name in merged if name.startswith("lora_unet")}
    for name, (error, unclamped) in shown.items():
        whole, rank = float(merged[name].norm()), 1 if "conv" in name and "shortcut" not in name else 2
        best = float(torch.linalg.svdvals(merged[name])[rank:].norm())
        assert error == pytest.approx(100 * float((found[name] - merged[name]).norm()) / whole, abs=0.02)
        assert unclamped == pytest.approx(100 * best / whole, abs=0.02)


def test_ranks_by_a_criterion(tiny_sd1: Path, tuned: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    folder, lora = tuned("sd1")
    merged = products(lora)
    for method, parameter in (("sv_fro", 0.8), ("sv_ratio", 1.5), ("sv_cumulative", 0.6)):
        out = tmp_path / f"{method}.safetensors"
        assert run(tiny_sd1, folder, out, "--dim", 8, "--dynamic_method", method, "--dynamic_param", parameter) == 0
        assert len({float(tensor) for key, tensor in load_file(out).items() if key.endswith(".alpha")}) == 1
        for name, tensor in load_file(out).items():
            if not name.endswith("lora_down.weight"):
                continue
            s = torch.linalg.svdvals(merged[name.removesuffix(".lora_down.weight")])[:RANK]
            needed = {
                "sv_fro": int((s.square().cumsum(0).div(s.square().sum()).sqrt() < parameter).sum()) + 1,
                "sv_ratio": int((s > s[0] / parameter).sum()),
                "sv_cumulative": int((s.cumsum(0) / s.sum() < parameter).sum()) + 1,
            }[method]
            assert len(tensor) == needed, (method, name)


def test_ranks_that_a_module_is_too_small_for_change_no_alpha(
    tiny_sd1: Path, tuned: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """diffusers gives attention layers the commonest alpha of a file."""
    new, _ = tuned("sd1")
    assert run(tiny_sd1, new, tmp_path / "out.safetensors", "--dim", 200, "--clamp_quantile", 1) == 0
    found = load_file(tmp_path / "out.safetensors")
    assert len({len(tensor) for key, tensor in found.items() if key.endswith("lora_down.weight")}) > 1
    assert len({float(tensor) for key, tensor in found.items() if key.endswith(".alpha")}) == 1


def test_text_encoders_that_hardly_differ_are_left_out(
    tiny_sd1: Path, tuned: Callable[[str], tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tuned("sd1")[0], tmp_path / "out.safetensors"
    assert run(tiny_sd1, folder, out, "--min_diff", 5) == 0
    assert "U-Net only" in capsys.readouterr().err
    assert not any(key.startswith("lora_te") for key in load_file(out))


def test_a_tuned_file_of_other_precision_and_without_text_encoder(
    tiny_sd1: Path, tuned: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    folder, lora = tuned("sd1")
    file, out = tmp_path / "tuned.safetensors", tmp_path / "out.safetensors"
    folder_as_single_file(folder, file, dtype="F16", parts=("unet", "vae"))
    assert run(tiny_sd1, file, out, "--dim", RANK, "--clamp_quantile", 1) == 0
    merged, found = products(lora), products(out)
    assert found.keys() == {name for name, part, *_ in targets(tiny_sd1) if part == "unet"}
    for name, product in found.items():
        assert float((product - merged[name]).norm()) <= 0.02 * float(merged[name].norm()), name


def test_a_pickle_reads_like_a_safetensors_file(
    tiny_models: Tiny, tuned: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    folder, base = tuned("sd1")[0], tiny_models("sd1_file")
    torch.save({"state_dict": load_file(base)}, tmp_path / "base.ckpt")
    outs = [tmp_path / name / "same.safetensors" for name in ("one", "other")]
    assert run(base, folder, outs[0], "--no_metadata") == 0
    assert run(tmp_path / "base.ckpt", folder, outs[1], "--no_metadata") == 0
    assert outs[0].read_bytes() == outs[1].read_bytes()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--dim", 0), "--dim: 0 is below 1"),
        (("--clamp_quantile", 0.3), "--clamp_quantile: 0.3 is not above 0.5"),
        (("--dynamic_method", "sv_fro"), "sv_fro needs --dynamic_param"),
        (("--dynamic_method", "sv_fro", "--dynamic_param", 3), "--dynamic_param: 3"),
        (("--dynamic_param", 3), "add --dynamic_method"),
        (("--min_diff", -1), "--min_diff: -1"),
        (("--sdxl",), "--sdxl: --model_org is an SD1 model"),
    ],
)
def test_flags_that_make_no_sense(
    flags: tuple[object, ...], told: str, tiny_models: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.safetensors"
    assert run(tiny_models("sd1"), tiny_models("sd1_file"), out, *flags) == 2
    assert told in capsys.readouterr().err
    assert not out.exists()


def test_files_that_can_not_be_used(tiny_models: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, out = tiny_models("sd1"), tmp_path / "out.safetensors"
    lora = write_kohya(tmp_path / "lora.safetensors", base)
    damaged = damage(Path(shutil.copy(tiny_models("sd1_file"), tmp_path / "damaged.safetensors")), "truncated")
    for model, told in (
        (tiny_models("sdxl"), "--model_tuned: is an SDXL model, --model_org an SD1 one"),
        (lora, "is a LoRA"),
        (damaged, "is truncated"),
        (tmp_path / "none.safetensors", "does not exist"),
        (base, "is the same as --model_org"),
        (tiny_models("sd1_file"), "has the same weights as --model_org"),
    ):
        assert run(base, model, out) == 2
        said = capsys.readouterr().err
        assert told in said
        assert "Traceback" not in said
        assert not out.exists()


def test_a_weight_that_is_no_number_is_named(
    tiny_models: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, out = tiny_models("sd1_file"), tmp_path / "out.safetensors"
    tensors = load_file(base)
    tensors["model.diffusion_model.middle_block.1.proj_in.weight"].view(-1)[7] = torch.nan
    save_file(tensors, tmp_path / "nan.safetensors")
    assert run(base, tmp_path / "nan.safetensors", out) == 2
    assert "lora_unet_mid_block_attentions_0_proj_in: the difference" in capsys.readouterr().err
    assert not out.exists()


def test_what_is_wrong_with_flags_is_said_without_torch(tmp_path: Path) -> None:
    script = (
        "import sys; sys.argv = sys.argv[1:]; import runpy\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end:\n    print(end.code, 'torch' in sys.modules)\n"
    )
    flags = ("--model_org", "a", "--model_tuned", "a", "--save_to", tmp_path / "x.bin", "--dim", "0")
    command = [sys.executable, "-c", script, str(ROOT / "tools/extract_lora.py"), *map(str, flags)]
    found = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert found.stdout.split() == ["2", "False"]
    assert found.stderr.count("error: ") == 3
