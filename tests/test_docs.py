"""What the docs show as commands is what the program takes."""

import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from library.options import parse, setup_parser
from library.options.dataset_file import read_dataset_file
from library.options.dataset_schema import KEYS
from library.options.registry import FLAGS
from library.options.scripts import SCRIPTS, TRAIN_NETWORK, TRAIN_TEXTUAL_INVERSION, Script
from tests.pictures import make_pictures
from tests.programs import ROOT, environment, tool
from tools.readme_command import readme_command

PAGE_OF_EMBEDDINGS = ROOT / "docs" / "textual-inversion.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def commands(path: Path, script: Script = TRAIN_NETWORK) -> list[list[str]]:
    """The arguments of every command line of a training script on a page."""
    found = []
    for block in blocks(path, "(?:bash|sh)"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|\|\|", line):
                words = shlex.split(part, comments=True) if script.file in part else []
                if script.file in words:
                    found.append(words[words.index(script.file) + 1 :])
    return found


CASES = [(page.name, one, words) for page in PAGES for one in SCRIPTS.values() for words in commands(page, one)]


@pytest.mark.parametrize(
    ("page", "script", "words"), CASES, ids=[f"{page}-{number}" for number, (page, *_) in enumerate(CASES)]
)
def test_flags_of_shown_commands_exist(page: str, script: Script, words: list[str]) -> None:
    setup_parser(script).parse_args(words)


def test_both_scripts_are_shown_on_the_page_about_embeddings() -> None:
    assert {one.name for page, one, _ in CASES if page == PAGE_OF_EMBEDDINGS.name} == {*SCRIPTS}


def tool_commands() -> list[tuple[str, list[str]]]:
    """Name and arguments of every command line of a tool."""
    lines = [
        line
        for page in PAGES
        for block in blocks(page, "(?:bash|sh)")
        for line in block.replace("\\\n", " ").splitlines()
    ]
    matches = (re.search(r"python tools/(\w+)\.py(.*)", line) for line in lines)
    return [(match[1], shlex.split(match[2], comments=True)) for match in matches if match]


@pytest.mark.parametrize(("tool", "words"), tool_commands())
def test_shown_commands_of_tools_are_taken(tool: str, words: list[str]) -> None:
    path = ROOT / "tools" / f"{tool}.py"
    done = subprocess.run(
        [sys.executable, str(path), "--help"], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    of_the_tool = set(re.findall(r"--[a-z_]+", done.stdout))
    flags = {word for word in words if word.startswith("--")} - of_the_tool
    assert flags <= {f"--{name}" for name in FLAGS}


def test_dataset_files_on_the_pages_are_read(tmp_path: Path) -> None:
    texts = [text for page in PAGES for text in blocks(page, "toml") if "[[datasets" in text]
    assert texts
    for text in texts:
        (tmp_path / "d.toml").write_text(text, encoding="utf-8")
        assert read_dataset_file(tmp_path / "d.toml", "--dataset_config").problems == []


def test_keys_named_in_the_page_about_datasets_exist() -> None:
    text = (ROOT / "docs" / "datasets.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(?:--)?([a-z]+(?:_[a-z]+)+)(?: = [^`]*)?`", text))
    aside = {"diff_output_preservation", "target_resolution", "start_dim", "end_dim", "divisible_by"}
    items = {"loss_weights", "alpha_masks", "original_sizes_hw", "crop_top_lefts", "target_sizes_hw"}
    items |= {"network_multipliers", "prune_others"}
    assert named - aside - items <= set(FLAGS) | set(KEYS)


def test_the_readme_shows_training_commands() -> None:
    assert len([page for page, *_ in CASES if page == "README.md"]) >= 3


def test_toml_on_the_readme_is_made_of_options() -> None:
    (text,) = blocks(ROOT / "README.md", "toml")
    assert set(tomllib.loads(text)) <= set(FLAGS)


def test_flags_named_in_the_table_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and "`--" in line]
    pieces = re.findall(r"`(--[^`]*)`", "\n".join(rows))
    flags = {word[2:] for piece in pieces for word in piece.split() if re.fullmatch(r"--[a-z_]{3,}", word)}
    assert flags and flags <= set(FLAGS)


def test_presets_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in the script that it is for, where it says nothing that has no effect."""
    monkeypatch.chdir(ROOT)
    for preset in sorted((ROOT / "library/presets").glob("*.toml")):
        embedding = preset.stem.startswith("embedding-")
        line = ["--config_file", str(preset)]
        if not preset.stem.startswith("quickstart"):
            line += ["--pretrained_model_name_or_path", "m", "--output_dir", "output", "--resolution", "512"]
            line += ["--train_data_dir", "library/quickstart/images"]
            line += [] if embedding else ["--network_module", "networks.lora"]
            line += ["--token_string", "blorptoken"] if embedding or preset.stem == "pivotal" else []
        alone = embedding or preset.stem == "quickstart-embedding"
        options = parse(line, script=TRAIN_TEXTUAL_INVERSION if alone else TRAIN_NETWORK)
        assert not [line for line in options.notices if "no effect" in line], preset.stem


@pytest.mark.parametrize("model", ["sd1", "sdxl"])
def test_code_on_the_page_about_embeddings_runs(
    model: str, tiny_models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With files that a run wrote; each block gives prompts with the word its vectors. The last block, a LoRA and its
    word, runs in tests/interop/test_embeddings_load.py."""
    import torch
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

    from train_textual_inversion import main

    make_pictures(tmp_path / "pictures", count=1, name="mycat", sizes=((64, 64),))
    output = tmp_path / "output"
    paths = ["--train_data_dir", str(tmp_path / "pictures"), "--output_dir", str(output), "--output_name", "mycat"]
    line = ["--pretrained_model_name_or_path", str(tiny_models(model)), *paths, "--resolution", "64"]
    line += ["--token_string", "mycat", "--num_vectors_per_token", "2", "--max_train_steps", "1", "--seed", "1"]
    assert main([*line, "--caption_extension", ".txt", "--save_embedding_as", "diffusers"]) == 0
    kind = StableDiffusionXLPipeline if model == "sdxl" else StableDiffusionPipeline
    one, *two, _ = blocks(PAGE_OF_EMBEDDINGS, "python")
    assert len(two) == 2
    monkeypatch.chdir(tmp_path)
    tensors = load_file(output / "mycat.safetensors")
    for block in two if model == "sdxl" else [one]:
        pipe: Any = kind.from_pretrained(tiny_models(model), local_files_only=True)
        exec(block, {"pipe": pipe})
        for number, name in {"": "clip_l", "_2": "clip_g"}.items() if model == "sdxl" else (("", "emb_params"),):
            ids = getattr(pipe, f"tokenizer{number}")("mycat", add_special_tokens=False).input_ids
            assert ids == [49408]
            table = getattr(pipe, f"text_encoder{number}").get_input_embeddings().weight
            assert torch.equal(table[49408:].detach(), tensors[name]) and len(tensors[name]) == 2


def test_both_commands_stand_on_the_readme() -> None:
    assert "library/presets/quickstart.toml" in readme_command("main job")
    assert readme_command("tests").endswith("python -m pytest")


@pytest.mark.parametrize("name", ["write_docs", "readme_command"])
def test_help_of_developers_tools_does_nothing_else(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        tool(name)(["--help"])
    assert end.value.code == 0
    told = capsys.readouterr()
    assert told.out.startswith("usage: ") and "wrote" not in told.out
    with pytest.raises(SystemExit) as end:
        tool(name)(["nothing of that name", "--chek"])
    assert end.value.code == 2
