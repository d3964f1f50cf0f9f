"""Whether an embedding's vectors fit a base model, told from headers and in words."""

import shlex
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library.errors import UserError
from library.models.embedding_files import EmbeddingHeader, check_fits, half_of, read_embedding_header
from library.models.info import ModelInfo
from library.models.inspect import inspect

Finder = Callable[[str], Path]
WIDTHS = {"sd1": (32,), "sd2": (64,), "sdxl": (32, 64)}


def model(tiny_models: Finder, family: str) -> ModelInfo:
    return inspect(str(tiny_models(family)))


def save(path: Path, widths: tuple[int, ...], metadata: dict[str, str] | None = None) -> EmbeddingHeader:
    names = ("emb_params",) if len(widths) == 1 else ("clip_l", "clip_g")
    save_file({name: torch.ones(2, width) for name, width in zip(names, widths, strict=True)}, path, metadata)
    return read_embedding_header(path, "here")


def test_a_pickle_cannot_change_what_tables_of_parameters_become(tmp_path: Path) -> None:
    """A pickle that gives the class itself a state, or one that is no state, is damaged; a good one is read after."""
    name = b"\x80\x02ctorch.nn.modules.container\nParameterDict\n"
    state = b"}X\x0b\x00\x00\x00_parameters}s"
    for number, content in enumerate((name + state + b"b.", name + b")\x81}b.", name + b")\x81Nb.")):
        path = tmp_path / f"{number}.pt"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", content)
        with pytest.raises(UserError, match="damaged"):
            read_embedding_header(path, "here")
    table = torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.ones(2, 32))})
    torch.save({"string_to_param": table}, tmp_path / "good.pt")
    assert read_embedding_header(tmp_path / "good.pt", "here").shapes == ((2, 32),)


@pytest.mark.parametrize("ours", WIDTHS)
@pytest.mark.parametrize("family", WIDTHS)
def test_only_the_own_family_fits(family: str, ours: str, tiny_models: Finder, tmp_path: Path) -> None:
    header = save(tmp_path / "a.safetensors", WIDTHS[ours])
    problems = list(check_fits(header, "--weights a", model(tiny_models, family)))
    assert bool(problems) == (family != ours)
    assert all(problem.where == "--weights a" for problem in problems)


@pytest.mark.parametrize(
    ("widths", "metadata", "says"),
    [
        ((1024,), {}, "trained for SD2 (1024), this model is SD1 (32)"),
        ((768,), {}, "trained for SD1 (768), this model is SD1 (32)"),
        ((768, 1280), {}, "trained for SDXL (768 and 1280), this model is SD1 (32)"),
        ((1280,), {}, "trained for SDXL's second text encoder alone (1280), this model is SD1 (32)"),
        ((64,), {"ss_base_model_version": "sd_v2_v"}, "trained for SD2 (64), this model is SD1 (32)"),
        ((512,), {}, "trained for vectors of 512 numbers, this model is SD1 (32)"),
        ((64,), {"ss_base_model_version": "sd_v1"}, "trained for SD1 (64), this model is SD1 (32)"),
    ],
)
def test_the_words(
    widths: tuple[int, ...], metadata: dict[str, str], says: str, tiny_models: Finder, tmp_path: Path
) -> None:
    header = save(tmp_path / "a.safetensors", widths, metadata)
    (problem,) = check_fits(header, "--weights a", model(tiny_models, "sd1"))
    assert problem.wrong == says
    assert "SD1" in problem.advice


@pytest.mark.parametrize("family", WIDTHS)
def test_one_half_of_an_embedding_fits_nothing(family: str, tiny_models: Finder, tmp_path: Path) -> None:
    """Whether its width is the model's or not; the advice is the command that makes the whole."""
    path, metadata = tmp_path / "my cat.clip_l.safetensors", {"ss_base_model_version": "sdxl_base_v1-0"}
    save_file({"cat": torch.ones(2, 32)}, path, metadata)
    (problem,) = check_fits(read_embedding_header(path, "here"), "--weights a", model(tiny_models, family))
    assert problem.wrong == "is the clip_l half of an SDXL embedding"
    command = shlex.split(problem.advice.partition(": ")[2])
    other, both = (str(tmp_path / f"my cat.{name}.safetensors") for name in ("clip_g", "both"))
    assert command == ["python", "tools/convert_embedding.py", "--to", "kohya", str(path), other, both]
    save_file({"cat": torch.ones(2, 32)}, path)
    fits = list(check_fits(read_embedding_header(path, "here"), "--weights a", model(tiny_models, family)))
    assert bool(fits) == (family != "sd1")


@pytest.mark.parametrize(
    ("name", "width", "says"),
    [
        ("x.clip_g.pt", 64, "the clip_g half of an SDXL embedding"),
        ("x.safetensors", 768, "the clip_l half of an SDXL embedding"),
        ("x.safetensors", 1280, "the clip_g half of an SDXL embedding"),
        ("x.safetensors", 64, "one half of an SDXL embedding"),
    ],
)
def test_which_half_it_is(name: str, width: int, says: str) -> None:
    half = half_of(Path(name), {"ss_base_model_version": "sdxl_base_v1-0"}, (width,))
    assert str(half) == says
    assert half is not None
    assert half.other == (Path("x.clip_l.pt") if name.endswith(".pt") else None)


def test_a_whole_embedding_is_no_half() -> None:
    assert half_of(Path("x.clip_l.pt"), {"ss_base_model_version": "sdxl_base_v1-0"}, (768, 1280)) is None
    assert half_of(Path("x.clip_l.pt"), {"ss_base_model_version": "sd_v1"}, (768,)) is None
