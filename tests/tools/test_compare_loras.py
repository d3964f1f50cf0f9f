"""tools/compare_loras.py: figures of the whole matrices, for files that differ in everything but what they change."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.weights.files import read_metadata
from library.weights.loras.comparing import compare, total
from library.weights.loras.lora import read
from tests import lora_files
from tests.programs import tool


def compared(*words: object) -> int:
    """The tool's `main`."""
    return tool("compare_loras")([str(word) for word in words])


@pytest.fixture(scope="module")
def pair(tiny_models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two files for SDXL of other ranks, alphas, spellings and numbers."""
    folder, place = tiny_models("sdxl"), tmp_path_factory.mktemp("pair")
    first = lora_files.write_kohya(place / "first.safetensors", folder, rank=6, alpha=3.0, seed=1)
    second = lora_files.write_kohya(place / "second.safetensors", folder, rank=3, alpha=1.0, seed=2, blocks="diffusers")
    return first, second


def altered(path: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy with other tensors."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, target, read_metadata(path))
    return target


def test_figures_are_those_of_the_matrices(pair: tuple[Path, Path]) -> None:
    """Norms, cosine and distance against the products themselves, for one module and for all."""
    first, second = (read(path) for path in pair)
    found = compare(first, second)
    assert len(found.pairs) == len(first.modules) > 300
    squares, product, apart = [0.0, 0.0], 0.0, 0.0
    for one in found.pairs:
        wholes = []
        for lora in (first, second):
            leaves, alpha = lora.modules[one.name].leaves, lora.modules[one.name].alpha
            up, down = (leaves[f"lora_{way}.weight"].double().flatten(1) for way in ("up", "down"))
            wholes.append(up @ down * (alpha or 0.0) / len(down))
        assert one.norms == pytest.approx([float(whole.norm()) for whole in wholes], rel=1e-9)
        assert one.product == pytest.approx(float((wholes[0] * wholes[1]).sum()), abs=1e-10)
        assert one.apart == pytest.approx(float((wholes[0] - wholes[1]).norm()), rel=1e-9)
        squares = [square + float(whole.norm()) ** 2 for square, whole in zip(squares, wholes, strict=True)]
        product, apart = product + one.product, apart + one.apart**2
    whole = total(found.pairs)
    assert whole.norms == pytest.approx([square**0.5 for square in squares])
    assert whole.cosine == pytest.approx(product / (squares[0] * squares[1]) ** 0.5)
    assert whole.difference == pytest.approx((apart / max(squares)) ** 0.5)


def test_a_file_and_itself_in_other_words_are_the_same(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Factors mixed by an orthogonal matrix, alpha moved into them: exit code 0 at a tight tolerance."""
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q

    def mixed(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.endswith("lora_down.weight")]:
            name, down = key.removesuffix(".lora_down.weight"), tensors[key].double()
            up = tensors[f"{name}.lora_up.weight"].double()
            tensors[key] = (turn.T @ down.flatten(1)).view(down.shape)
            tensors[f"{name}.lora_up.weight"] = (up.flatten(1) @ turn * 0.5).view(up.shape).contiguous()
            tensors[f"{name}.alpha"] = torch.tensor(6.0)

    other = altered(pair[0], tmp_path / "mixed.safetensors", mixed)
    assert compared(pair[0], other, "--tolerance", 1e-12) == 0
    assert compared(pair[0], pair[0], "--tolerance", 0) == 0


def test_a_difference_above_the_tolerance_ends_with_1(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One module's change is 1 % larger; another file lacks it."""
    name = "lora_unet_input_blocks_4_1_proj_in"
    more = altered(pair[0], tmp_path / "more.safetensors", lambda found: found[f"{name}.lora_up.weight"].mul_(1.01))
    assert compared(pair[0], more, "--tolerance", 0.02) == 0
    assert compared(pair[0], more, "--tolerance", 0.005) == 1
    assert f"1 differ by more than --tolerance 0.005, e.g. {name}" in capsys.readouterr().err

    def without(found: dict[str, torch.Tensor]) -> None:
        for key in [key for key in found if key.startswith(name)]:
            del found[key]

    less = altered(pair[0], tmp_path / "less.safetensors", without)
    assert compared(pair[0], less, "--tolerance", 0.5) == 1
    assert f"1 modules in A alone: {name}" in capsys.readouterr().out


def test_tables_tell_blocks_modules_and_metadata(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert compared(*pair, "--verbose") == 0
    out = capsys.readouterr().out
    for title in (
        "text encoder 2",
        "input 4",
        "middle",
        "output 5",
        "cosine",
        "Metadata that differ",
        "ss_network_dim",
    ):
        assert title in out
    assert "lora_te2_text_model_encoder_layers_0_mlp_fc1" in out


def test_magnitudes_of_a_dora_count(tiny_sd1: Path, tmp_path: Path) -> None:
    first = lora_files.write_dora(tmp_path / "first.safetensors", tiny_sd1)
    key = next(key for key in load_file(first) if key.endswith("dora_scale"))
    second = altered(first, tmp_path / "second.safetensors", lambda found: found[key].mul_(1.1))
    assert compared(first, first, "--tolerance", 0) == 0
    assert compared(first, second, "--tolerance", 0.05) == 1


def test_whole_matrices_are_compared_with_factors(tiny_sd1: Path, tmp_path: Path) -> None:
    """A LoRA's product as a full matrix, as LyCORIS has it, is the same change."""
    first = lora_files.write_kohya(tmp_path / "first.safetensors", tiny_sd1, rank=2, alpha=2.0, text=False)
    whole = {}
    tensors = load_file(first)
    for key in [key for key in tensors if key.endswith("lora_down.weight")]:
        name, down = key.removesuffix(".lora_down.weight"), tensors[key]
        product = tensors[f"{name}.lora_up.weight"].flatten(1) @ down.flatten(1)
        whole[f"{name}.diff"] = product.view(-1, *down.shape[1:]).contiguous()
    second = tmp_path / "second.safetensors"
    save_file(whole, second)
    assert compared(first, second, "--tolerance", 1e-5) == 0


def test_bad_input_is_told(
    pair: tuple[Path, Path], tiny_sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compared(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--tolerance", -1) == 2
    said = capsys.readouterr().err
    assert all(text in said for text in ("a.safetensors", "b.safetensors", "--tolerance -1: is no difference"))
    other = lora_files.write_kohya(tmp_path / "sd1.safetensors", tiny_sd1, rank=2)
    assert compared(pair[0], other) == 2
    assert "nothing to compare" in capsys.readouterr().err
    broken = lora_files.damage(altered(pair[0], tmp_path / "nan.safetensors", lambda _: None), "nan")
    assert compared(pair[0], broken) == 2
    assert f"{broken}: lora_" in capsys.readouterr().err
