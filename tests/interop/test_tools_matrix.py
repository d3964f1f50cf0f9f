"""Every tool for LoRA files and base models on every kind of file: files that can be used end with 0, damaged ones and
strangers with 2, one line that names the file, and nothing written."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from networks import dylora, lora
from tests import lora_files
from tests.networks.tiny_families import Finder, fill, load_text_encoder, load_unet
from tests.programs import tool

Capture = pytest.CaptureFixture[str]
Words = Callable[[Path, Path, Path], list[object]]
LAYOUTS = ("kohya", "kohya-diffusers", "peft", "diffusers")
WRITERS = ("ours", "kohya", "peft", "no_alphas", "bf16", "dora", "loha")


def converting(layout: str) -> Words:
    """The words for a layout."""
    return lambda file, base, out: ["convert_lora", file, out, "--to", layout]


TOOLS: dict[str, Words] = {
    "resize": lambda file, base, out: ["resize_lora", "--model", file, "--save_to", out, "--new_rank", 2],
    **{f"to {layout}": converting(layout) for layout in LAYOUTS},
    "merge": lambda file, base, out: ["merge_lora", "--models", file, file, "--ratios", 0.8, 0.5, "--save_to", out],
    "svd": lambda file, base, out: ["merge_lora", "--models", file, "--new_rank", 2, "--save_to", out],
    "into": lambda file, base, out: ["merge_lora", "--sd_model", base, "--models", file, "--save_to", out],
    "check": lambda file, base, out: ["check_lora", file],
    "compare": lambda file, base, out: ["compare_loras", file, file, "--tolerance", 1e-6],
    "show": lambda file, base, out: ["show_metadata", file],
    "strip": lambda file, base, out: ["show_metadata", file, "--strip", "--save_to", out],
}
"""What takes a LoRA file: by a name, the words for a file, a base model and an output."""
WHOLE_FILES = {"show", "strip"}
"""These take any file whose header can be read."""


def cut_words(file: Path, base: Path, out: Path) -> list[object]:
    """Cuts a DyLoRA."""
    return ["extract_lora_from_dylora", "--model", file, "--save_to", out, "--unit", 2]


MODEL_TOOLS: dict[str, Words] = {
    "merge_models": lambda file, base, out: ["merge_models", "--models", file, base, "--output", out],
    "convert_checkpoint": lambda file, base, out: ["convert_checkpoint", file, out.with_suffix("")],
    "extract_lora": lambda file, base, out: (
        ["extract_lora", "--model_org", base, "--model_tuned", file, "--save_to", out]
    ),
    "merge into": lambda file, base, out: ["merge_lora", "--models", file, "--sd_model", file, "--save_to", out],
}
"""What takes base models, given `file` for one."""
DAMAGES: tuple[lora_files.Damage, ...] = ("truncated", "header", "missing_up", "nan")
REFUSED = {
    "dora": {"to diffusers": "is a DoRA", "merge": "is a DoRA", "svd": "is a DoRA"},
    "loha": {"to peft": "--as_lora", "to diffusers": "--as_lora"},
}
"""What a layout or a sum of factors can't hold, and what the line says."""


def write_ours(path: Path, folder: Path) -> Path:
    """A file as a training leaves it."""
    unet, text_encoder = load_unet(folder), load_text_encoder(folder)
    network = lora.create_network(1.0, 4, 2.0, None, text_encoder, unet)
    network.apply_to(text_encoder, unet)
    fill(network)
    network.save_weights(path, None, lora_files.kohya_metadata(folder))
    return path


def write(writer: str, path: Path, folder: Path) -> Path:
    """One of `WRITERS`, or `dylora`."""
    match writer:
        case "ours":
            return write_ours(path, folder)
        case "peft":
            return lora_files.write_peft(path, folder, alpha=3.0)
        case "no_alphas":
            return lora_files.write_kohya(path, folder, alphas=False, metadata={})
        case "bf16":
            return lora_files.write_kohya(path, folder, dtype=torch.bfloat16)
        case "dora":
            return lora_files.write_dora(path, folder)
        case "loha":
            return lora_files.write_lycoris(path, folder, "loha", only="mid|te.*layers_0", text=True, rank=2)
        case "dylora":
            trained = {"ss_network_module": dylora.__name__, "ss_network_args": json.dumps({"unit": "2"})}
            metadata = lora_files.kohya_metadata(folder) | trained
            return lora_files.write_kohya(path, folder, metadata=metadata)
        case _:
            return lora_files.write_kohya(path, folder, conv_rank=2)


@pytest.fixture(scope="module")
def files(tiny_models: Finder, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """A file by family and writer, made once."""
    made: dict[tuple[str, str], Path] = {}

    def find(family: str, writer: str) -> Path:
        if (family, writer) not in made:
            path = tmp_path_factory.mktemp(family) / f"{writer}.safetensors"
            made[family, writer] = write(writer, path, tiny_models(family))
        return made[family, writer]

    return find


def run(words: Iterable[object]) -> int:
    name, *rest = map(str, words)
    return tool(name)(rest)


def errors(capsys: Capture) -> list[str]:
    """What was said to be wrong; once, where one file was given twice."""
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return list(dict.fromkeys(line for line in said.splitlines() if line.startswith("error: ")))


def empty(folder: Path) -> Path:
    """The folder, made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(
    "family", ["sd1", pytest.param("sd2", marks=pytest.mark.slow), pytest.param("sdxl", marks=pytest.mark.slow)]
)
def test_every_tool_takes_files_of_every_program(
    family: str, writer: str, files: Callable[[str, str], Path], tiny_models: Finder, tmp_path: Path, capsys: Capture
) -> None:
    file, base, refused = files(family, writer), tiny_models(f"{family}_file"), REFUSED.get(writer, {})
    before = file.read_bytes()
    for name, words in TOOLS.items():
        out = empty(tmp_path / "out") / "out.safetensors"
        code = run(words(file, base, out))
        lines = errors(capsys)
        assert (code, len(lines)) == ((2, 1) if name in refused else (0, 0)), (name, lines)
        assert all(refused[name] in line and file.name in line for line in lines), (name, lines)
        assert out.is_file() is (code == 0 and name not in ("check", "compare", "show")), name
        assert {path.name for path in out.parent.iterdir()} <= {out.name}, name
    assert file.read_bytes() == before


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_other_families_files_go_through_each_kind_of_tool(
    family: str, files: Callable[[str, str], Path], tiny_models: Finder, tmp_path: Path, capsys: Capture
) -> None:
    for writer, name in (("ours", "into"), ("peft", "merge"), ("bf16", "to peft"), ("no_alphas", "check")):
        words = TOOLS[name](files(family, writer), tiny_models(f"{family}_file"), tmp_path / "out.safetensors")
        assert (run(words), errors(capsys)) == (0, []), (writer, name)


@pytest.mark.parametrize(("how", "said"), [("truncated", "truncated"), ("header", "safetensors"), ("nan", "finite")])
@pytest.mark.parametrize("writer", ["ours", "peft", "bf16"])
def test_damaged_files_are_one_line_and_leave_nothing(
    how: lora_files.Damage,
    said: str,
    writer: str,
    files: Callable[[str, str], Path],
    tiny_sd1_file: Path,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    file = lora_files.damage(Path(shutil.copy(files("sd1", writer), tmp_path / "damaged.safetensors")), how)
    for name, words in TOOLS.items():
        out = empty(tmp_path / "out") / "out.safetensors"
        code = run(words(file, tiny_sd1_file, out))
        lines = errors(capsys)
        if how == "nan" and name in (*WHOLE_FILES, "check"):
            assert (code, lines) == (1 if name == "check" else 0, []), name
            continue
        assert (code, len(lines)) == (2, 1), (name, lines)
        assert said in lines[0], (name, lines)
        assert file.name in lines[0] or name == "into", (name, lines)
        assert not list(out.parent.iterdir()), name


@pytest.mark.parametrize(("writer", "leaf"), [("ours", "lora_up"), ("peft", "lora_B"), ("loha", "hada_w2_b")])
def test_a_missing_factor_is_named(
    writer: str,
    leaf: str,
    files: Callable[[str, str], Path],
    tiny_sd1_file: Path,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    whole, file = files("sd1", writer), tmp_path / "incomplete.safetensors"
    tensors = load_file(whole)
    del tensors[next(key for key in tensors if leaf in key)]
    save_file(tensors, file, lora_files.metadata_of(whole))
    for name in TOOLS.keys() - WHOLE_FILES:
        out = empty(tmp_path / "out") / "out.safetensors"
        assert run(TOOLS[name](file, tiny_sd1_file, out)) == 2, name
        (line,) = errors(capsys)
        assert f"lacks {'lora_up' if leaf == 'lora_B' else leaf}" in line and file.name in line, (name, line)
        assert not list(out.parent.iterdir()), name


def strangers(place: Path, tiny_sd1: Path, tiny_sd1_file: Path) -> list[tuple[Path, str]]:
    """What is given for a LoRA by mistake, and a word that has to be said of it."""
    embedding, other, nothing = (place / f"{name}.safetensors" for name in ("embedding", "other", "nothing"))
    save_file({"emb_params": torch.ones(2, 32)}, embedding)
    save_file({"model.layers.0.weight": torch.ones(2, 32)}, other)
    page, cut = place / "page.safetensors", place / "cut.pt"
    page.write_text("<!DOCTYPE html>" + "<p>404</p>" * 20)
    torch.save(load_file(lora_files.write_kohya(place / "whole.safetensors", tiny_sd1)), cut)
    cut.write_bytes(cut.read_bytes()[:-1000])
    return [
        *((embedding, "is an embedding"), (other, "model.layers.0.weight"), (tiny_sd1_file, "is a base model")),
        *((nothing, "no such"), (page, "not a safetensors file"), (cut, "damaged"), (tiny_sd1, "")),
    ]


def test_what_is_no_lora_is_said_to_be_none(
    tiny_sd1: Path, tiny_sd1_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    for file, said in strangers(tmp_path, tiny_sd1, tiny_sd1_file):
        for name in TOOLS.keys() - WHOLE_FILES:
            out = empty(tmp_path / "out") / "out.safetensors"
            assert run(TOOLS[name](file, tiny_sd1_file, out)) == 2, (file.name, name)
            found = errors(capsys)
            assert len(found) == 1, (name, found)
            assert file.name in found[0] and said.lower() in found[0].lower(), (name, found)
            assert not list(out.parent.iterdir()), name


@pytest.mark.parametrize("writer", ["ours", "peft", "loha"])
def test_a_lora_is_no_base_model(
    writer: str, files: Callable[[str, str], Path], tiny_sd1_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    file = files("sd1", writer)
    for name, words in MODEL_TOOLS.items():
        out = empty(tmp_path / "out") / "out.safetensors"
        assert run(words(file, tiny_sd1_file, out)) == 2, name
        (line,) = errors(capsys)
        assert file.name in line and "is a LoRA" in line, (name, line)
        assert not list(out.parent.iterdir()), name
    assert run(["convert_embedding", "--to", "webui", file, tmp_path / "word.pt"]) == 2
    (line,) = errors(capsys)
    assert file.name in line and "is a LoRA" in line


def test_a_lora_of_another_family_is_refused(
    files: Callable[[str, str], Path], tiny_models: Finder, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out.safetensors"
    for own, other in (("sd1", "sdxl"), ("sdxl", "sd2"), ("sd2", "sd1")):
        file, second = files(own, "ours"), files(other, "ours")
        for words in (
            TOOLS["into"](file, tiny_models(f"{other}_file"), out),
            ["merge_lora", "--models", file, second, "--save_to", out],
            ["compare_loras", file, second],
        ):
            assert run(words) == 2, (own, other, words[0])
            (line,) = errors(capsys)
            assert file.name in line or second.name in line, line
            assert not out.exists()


def test_only_a_dylora_is_cut(
    files: Callable[[str, str], Path], tiny_sd1: Path, tiny_sd1_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    given = [files("sd1", writer) for writer in ("ours", "kohya", "peft", "bf16", "dora", "loha")]
    for how in DAMAGES:
        copy = shutil.copy(files("sd1", "dylora"), tmp_path / f"{how}.safetensors")
        given.append(lora_files.damage(Path(copy), how))
    given += [file for file, _ in strangers(tmp_path, tiny_sd1, tiny_sd1_file)]
    for file in given:
        out = empty(tmp_path / "out") / "cut.safetensors"
        assert run(cut_words(file, tiny_sd1_file, out)) == 2, file.name
        (line,) = errors(capsys)
        assert file.name in line, line
        assert not list(out.parent.iterdir()), file.name
    assert run(cut_words(files("sd1", "dylora"), tiny_sd1_file, empty(tmp_path / "out") / "cut.safetensors")) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["cut-0002.safetensors"]
