"""tools/resize_lora.py: what it writes is the truncated change of every module, whoever wrote the file."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.weights.files import read_metadata
from library.weights.hashes import lora_hashes
from tests import lora_files
from tests.programs import ROOT, environment, tool

RANK, ALPHA = 6, 3.0


def resize(*words: object) -> int:
    """The tool's `main`."""
    return tool("resize_lora")([str(word) for word in words])


@pytest.fixture
def made(tiny_sd1: Path, tmp_path: Path) -> Path:
    """A LoRA-C3Lier in sd-scripts' layout."""
    return lora_files.write_kohya(tmp_path / "in.safetensors", tiny_sd1, rank=RANK, alpha=ALPHA, conv_rank=4)


def products(path: Path) -> dict[str, Tensor]:
    """Each module's change as a matrix, scale included, float64, by the formula of sd-scripts' files."""
    tensors = load_file(path)
    found = {}
    for key in tensors:
        name, _, leaf = key.partition(".")
        if leaf == "lora_down.weight":
            up, down = (tensors[f"{name}.lora_{way}.weight"].double().flatten(1) for way in ("up", "down"))
            alpha = tensors.get(f"{name}.alpha", torch.tensor(float(len(down))))
            found[name] = up @ down * (float(alpha) / len(down))
    return found


def ranks(path: Path) -> dict[str, int]:
    """Each module's rank."""
    return {key.partition(".")[0]: len(tensor) for key, tensor in load_file(path).items() if ".lora_down" in key}


def cut(matrix: Tensor, rank: int) -> Tensor:
    """The best approximation of a rank, by the SVD of the whole matrix."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vh[:rank]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alphas", [True, False])
def test_every_module_is_the_truncated_product(
    tiny_sdxl: Path, tmp_path: Path, dtype: torch.dtype, *, alphas: bool
) -> None:
    """Compared with the SVD of the whole matrix; without alphas the scale is 1 before and after."""
    before = lora_files.write_kohya(tmp_path / "in.safetensors", tiny_sdxl, rank=RANK, dtype=dtype, alphas=alphas)
    after = tmp_path / "out.safetensors"
    assert resize("--model", before, "--save_to", after, "--new_rank", 2) == 0
    old, new = products(before), products(after)
    assert old.keys() == new.keys()
    assert set(ranks(after).values()) == {2}
    for name, matrix in old.items():
        expected = cut(matrix, 2)
        assert float((new[name] - expected).norm()) <= 1e-5 * float(expected.norm()), name
    tensors = load_file(after)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    written = [float(value) for key, value in tensors.items() if key.endswith("alpha")]
    assert written == pytest.approx([2 * (2.0 / RANK if alphas else 1.0)] * len(old))


def test_metadata_say_what_was_done(made: Path, tmp_path: Path) -> None:
    after = tmp_path / "out.safetensors"
    assert resize("--model", made, "--save_to", after, "--new_rank", 3, "--new_conv_rank", 2) == 0
    told, before = read_metadata(after), read_metadata(made)
    assert (told["ss_network_dim"], float(told["ss_network_alpha"])) == ("3", ALPHA * 3 / RANK)
    assert told["ss_training_comment"] == f"resized from rank {RANK} to 3, convolutions 2"
    args = json.loads(told["ss_network_args"])
    assert (args["conv_dim"], float(args["conv_alpha"])) == ("2", ALPHA * 2 / 4)
    hashes = lora_hashes(load_file(after), told)
    assert (told["sshs_model_hash"], told["sshs_legacy_hash"]) == (hashes.model, hashes.legacy)
    assert "modelspec.hash_sha256" not in told
    kept = before.keys() & told.keys() - {
        *("ss_network_dim", "ss_network_alpha", "ss_network_args", "ss_training_comment", "sshs_model_hash"),
        *("sshs_legacy_hash", "ss_output_name"),
    }
    assert {key: told[key] for key in kept} == {key: before[key] for key in kept}
    assert len(kept) > 5


def test_convolutions_have_their_own_rank_1x1_ones_too(made: Path, tmp_path: Path) -> None:
    after = tmp_path / "out.safetensors"
    assert resize("--model", made, "--save_to", after, "--new_rank", 3, "--new_conv_rank", 1) == 0
    shapes = {key: tensor.ndim for key, tensor in load_file(after).items() if ".lora_down" in key}
    found = ranks(after)
    assert {found[key.partition(".")[0]] for key, ndim in shapes.items() if ndim == 4} == {1}
    assert {found[key.partition(".")[0]] for key, ndim in shapes.items() if ndim == 2} == {3}


@pytest.mark.parametrize(("method", "parameter"), [("sv_ratio", 2), ("sv_fro", 0.8), ("sv_cumulative", 0.6)])
@pytest.mark.parametrize("legacy", [False, True])
def test_dynamic_methods_keep_what_they_need(
    made: Path, tmp_path: Path, method: str, parameter: float, *, legacy: bool
) -> None:
    """Rank by rank against the criterion on the singular values of the whole matrices; --new_rank is a limit."""
    after = tmp_path / "out.safetensors"
    words = ["--dynamic_method", method, "--dynamic_param", parameter, "--new_rank", 4, *(["--legacy_rank"] * legacy)]
    assert resize("--model", made, "--save_to", after, *words) == 0
    found = ranks(after)
    for name, matrix in products(made).items():
        s = torch.linalg.svdvals(matrix)
        s = s[s > 1e-9 * s[0]]
        shares = {
            "sv_ratio": lambda k, s=s: bool((s[k:] <= s[0] / parameter).all()),
            "sv_fro": lambda k, s=s: float(s[:k].norm()) >= parameter * float(s.norm()),
            "sv_cumulative": lambda k, s=s: float(s[:k].sum()) >= parameter * float(s.sum()),
        }
        exact = next(k for k in range(1, len(s) + 1) if shares[method](k))
        assert found[name] == min(exact + legacy, 4, len(s)), name
    told = read_metadata(after)
    alphas = {float(tensor) for key, tensor in load_file(after).items() if key.endswith(".alpha")}
    assert (told["ss_network_dim"], {float(told["ss_network_alpha"])}) == ("Dynamic", alphas)
    assert f"{method} {parameter}" in told["ss_training_comment"]


@pytest.mark.parametrize("method", [None, "sv_ratio", "sv_cumulative"])
def test_target_size_is_reached_from_below(
    made: Path, tmp_path: Path, method: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file is at most that size, and what it says it picked gives the same file again."""
    target, after, again = 0.7, tmp_path / "out.safetensors", tmp_path / "again.safetensors"
    words = [] if method is None else ["--dynamic_method", method]
    assert resize("--model", made, "--save_to", after, "--target_size_mb", target, *words) == 0
    size = after.stat().st_size
    assert 0.9 * target * 1e6 < size <= target * 1e6
    picked = capsys.readouterr().err.partition("picked ")[2].split("\n")[0].split()
    assert picked[1] == (method or "sv_fro")
    assert resize("--model", made, "--save_to", again, *picked, "--new_rank", 99) == 0
    assert ranks(after) == ranks(again)


@pytest.mark.parametrize("layout", ["kohya", "peft", "diffusers"])
def test_a_file_is_never_larger_than_its_target(made: Path, tmp_path: Path, layout: str) -> None:
    """peft's settings name the rank of every module that hasn't the commonest one."""
    before, after = tmp_path / "before.safetensors", tmp_path / f"{'long' * 9}.safetensors"
    assert tool("convert_lora")([str(made), str(before), "--to", layout]) == 0
    for target in (0.5, 0.75, 0.91):
        words = ["--target_size_mb", target, "--dynamic_method", "sv_ratio", "--save_precision", "fp16"]
        assert resize("--model", before, "--save_to", after, *words) == 0
        assert 0.6 * target * 1e6 < after.stat().st_size <= target * 1e6


def with_factors(made: Path, scale: float) -> dict[str, Tensor]:
    """The file's up-factors multiplied in place; the changes that it makes then."""
    tensors = {key: tensor * (scale if "lora_up" in key else 1) for key, tensor in load_file(made).items()}
    save_file(tensors, made, read_metadata(made))
    return products(made)


def test_float16_keeps_the_digits_of_small_changes(made: Path, tmp_path: Path) -> None:
    """Singular values of 1e-5 would be below what float16 holds fully, were all of them in one factor."""
    old, after = with_factors(made, 1e-5), tmp_path / "out.safetensors"
    assert resize("--model", made, "--save_to", after, "--new_rank", 3, "--save_precision", "fp16") == 0
    for name, matrix in products(after).items():
        expected = cut(old[name], 3)
        assert float((matrix - expected).norm()) <= 1e-3 * float(expected.norm()), name


def test_what_float16_cannot_hold_is_told_of_the_output(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_factors(made, 1e12)
    assert resize("--model", made, "--save_to", tmp_path / "out.safetensors", "--save_precision", "fp16") == 2
    said = capsys.readouterr().err
    assert "too large for float16" in said
    assert "use --save_precision float or bf16" in said


def test_a_size_that_no_rank_reaches_is_refused(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    after = tmp_path / "out.safetensors"
    assert resize("--model", made, "--save_to", after, "--target_size_mb", 0.01) == 2
    assert "with rank 1 everywhere the file has" in capsys.readouterr().err
    assert not after.exists()


def test_table_tells_ranks_and_what_was_kept(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert resize("--model", made, "--save_to", tmp_path / "out.safetensors", "--new_rank", 5, "--verbose") == 0
    out, err = capsys.readouterr()
    assert all(title in out for title in ("text encoder", "down 0", "mid", "up 3", "Frobenius norm kept"))
    assert "lora_te_text_model_encoder_layers_0_mlp_fc1" in out
    old, new = products(made), products(tmp_path / "out.safetensors")
    kept = (sum(float(new[one].norm()) ** 2 for one in old) / sum(float(old[one].norm()) ** 2 for one in old)) ** 0.5
    assert f"{kept:.2%}" in out
    assert "modules have no more than their old rank, which is below --new_rank" in err


@pytest.mark.parametrize("layout", ["peft", "kohya-diffusers"])
def test_other_layouts_stay_and_diffusers_loads_them(
    tiny_sdxl: Path, tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """At its own rank the resized file does to the weights what the first one does."""
    before, after = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    if layout == "peft":
        lora_files.write_peft(before, tiny_sdxl, rank=RANK, alpha=ALPHA, text=False)
    else:
        lora_files.write_kohya(before, tiny_sdxl, rank=RANK, alpha=ALPHA, blocks="diffusers", text=False)
    assert resize("--model", before, "--save_to", after, "--new_rank", 99) == 0
    capsys.readouterr()
    weights = [key.removesuffix(".alpha") for key in load_file(before)]
    assert {key.removesuffix(".alpha") for key in load_file(after)} == set(weights)
    first, second, base = (
        lora_files.applied(before, tiny_sdxl),
        lora_files.applied(after, tiny_sdxl),
        lora_files.base_weights(tiny_sdxl),
    )
    assert any(not torch.equal(first[key], base[key]) for key in base)
    for key, value in first.items():
        assert torch.allclose(value, second[key], atol=1e-5), key


def test_magnitudes_of_a_dora_stay(tiny_sd1: Path, tmp_path: Path) -> None:
    before, after = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    lora_files.write_dora(before, tiny_sd1, rank=RANK, alpha=ALPHA)
    assert resize("--model", before, "--save_to", after, "--new_rank", 2) == 0
    old, new = load_file(before), load_file(after)
    scales = [key for key in old if key.endswith("dora_scale")]
    assert scales
    assert all(torch.equal(old[key], new[key]) for key in scales)
    name = scales[0].partition(".")[0]
    assert torch.allclose(products(after)[name], cut(products(before)[name], 2), atol=1e-6)


def test_embeddings_beside_a_lora_stay(made: Path, tmp_path: Path) -> None:
    tensors = load_file(made) | {"bundle_emb.cat.string_to_param.*": torch.randn(2, 8)}
    save_file(tensors, made, read_metadata(made))
    after = tmp_path / "out.safetensors"
    assert resize("--model", made, "--save_to", after, "--new_rank", 2, "--save_precision", "fp16") == 0
    found = load_file(after)
    assert torch.equal(found["bundle_emb.cat.string_to_param.*"], tensors["bundle_emb.cat.string_to_param.*"])
    assert {tensor.dtype for key, tensor in found.items() if "lora_" in key and "alpha" not in key} == {torch.float16}


def test_it_may_replace_its_input_and_write_pickles(made: Path, tmp_path: Path) -> None:
    old = products(made)
    assert resize("--model", made, "--save_to", tmp_path / "out.pt", "--new_rank", 2) == 0
    assert resize("--model", tmp_path / "out.pt", "--save_to", made, "--new_rank", 1) == 0
    new = products(made)
    assert all(torch.allclose(new[name], cut(matrix, 1), atol=1e-5) for name, matrix in old.items())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--new_rank", "0"], "--new_rank 0: is no rank"),
        (["--dynamic_method", "sv_fro"], "needs a --dynamic_param"),
        (["--dynamic_param", "0.9"], "belongs to a method"),
        (["--legacy_rank"], "belongs to dynamic methods"),
        (["--dynamic_method", "sv_fro", "--dynamic_param", "1.5"], "1.5 is no share"),
        (["--dynamic_method", "sv_ratio", "--dynamic_param", "0"], "0 is below 1"),
        (["--target_size_mb", "-1"], "is no size"),
        (["--target_size_mb", "nan"], "nan: is no size"),
        (["--target_size_mb", "inf"], "inf: is no size"),
        (["--target_size_mb", "1", "--dynamic_param", "0.9"], "leave out one of the two"),
        (["--save_to", "out.bin"], "ends in .bin"),
        (["--save_to", "pyproject.toml/out.pt"], "pyproject.toml is no folder"),
        (["--model", "absent.safetensors", "--new_conv_rank", "-3"], "absent.safetensors"),
    ],
)
def test_bad_flags_are_told_before_torch_is_loaded(made: Path, tmp_path: Path, words: list[str], said: str) -> None:
    code = (
        "import runpy, sys; sys.argv[0] = 'resize_lora.py'\n"
        "try: runpy.run_path('tools/resize_lora.py', run_name='__main__')\n"
        "except SystemExit as end: assert 'torch' not in sys.modules, 'torch'; raise"
    )
    command = [sys.executable, "-c", code, "--model", str(made), "--save_to", str(tmp_path / "o.safetensors"), *words]
    ended = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert (ended.returncode, said in ended.stderr) == (2, True), ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("how", ["truncated", "header", "nan", "missing_up"])
def test_damaged_files_are_refused(
    made: Path, tmp_path: Path, how: lora_files.Damage, capsys: pytest.CaptureFixture[str]
) -> None:
    lora_files.damage(made, how)
    after = tmp_path / "out.safetensors"
    assert resize("--model", made, "--save_to", after) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert str(made) in said[0]
    assert not after.exists()


def test_base_models_and_embeddings_are_refused(
    tiny_models: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    embedding = tmp_path / "cat.safetensors"
    save_file({"emb_params": torch.randn(2, 32)}, embedding)
    for path in (tiny_models("sd1_file"), embedding):
        assert resize("--model", path, "--save_to", tmp_path / "out.safetensors") == 2
        assert str(path) in capsys.readouterr().err


def test_the_old_path_runs_the_tool(made: Path, tmp_path: Path) -> None:
    after = tmp_path / "out.safetensors"
    command = [sys.executable, "networks/resize_lora.py", "--model", str(made), "--save_to", str(after)]
    command += ["--new_rank", "2"]
    subprocess.run(command, cwd=ROOT, env=environment(), check=True, capture_output=True)
    assert set(ranks(after).values()) == {2}


def test_lycoris_modules_with_factors_become_plain(tiny_sd1: Path, tmp_path: Path) -> None:
    """A LoHa's change, computed by LyCORIS, is the product of the plain LoRA that is written at its full rank."""
    layers = lora_files.lycoris_layers(tiny_sd1, "loha", only="down_blocks_1")
    before, after = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    lora_files.write_lycoris(before, tiny_sd1, "loha", only="down_blocks_1")
    assert resize("--model", before, "--save_to", after, "--new_rank", 999) == 0
    found = products(after)
    assert found
    for name, layer in layers.items():
        expected = layer.get_weight(layer.shape).detach().double().flatten(1)
        assert torch.allclose(found[name], expected, atol=1e-5 * float(expected.norm())), name
