"""What the docs show as commands is what the program takes."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from library.options import parse, setup_parser
from library.options.dataset_file import read_dataset_file
from library.options.dataset_schema import KEYS
from library.options.registry import FLAGS
from tests.programs import ROOT, environment
from tools.readme_command import readme_command

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def commands(path: Path) -> list[list[str]]:
    """The arguments of every train_network.py command line on a page."""
    found = []
    for block in blocks(path, "(?:bash|sh)"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|\|\|", line):
                if "train_network.py" in part:
                    words = shlex.split(part, comments=True)
                    found.append(words[words.index("train_network.py") + 1 :])
    return found


CASES = [(page.name, words) for page in PAGES for words in commands(page)]


@pytest.mark.parametrize(("page", "words"), CASES, ids=[f"{page}-{number}" for number, (page, _) in enumerate(CASES)])
def test_flags_of_shown_commands_exist(page: str, words: list[str]) -> None:
    setup_parser().parse_args(words)


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
    assert len([page for page, _ in CASES if page == "README.md"]) >= 3


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
    monkeypatch.chdir(ROOT)
    for preset in sorted((ROOT / "library/presets").glob("*.toml")):
        own = ["--config_file", str(preset)]
        more = ["--pretrained_model_name_or_path", "m", "--network_module", "networks.lora", "--output_dir", "output"]
        pictures = ["--train_data_dir", "library/quickstart/images", "--resolution", "512"]
        notices = parse(own if preset.stem == "quickstart" else [*own, *more, *pictures]).notices
        assert not [line for line in notices if "no effect" in line]


def test_both_commands_stand_on_the_readme() -> None:
    assert "library/presets/quickstart.toml" in readme_command("main job")
    assert readme_command("tests").endswith("python -m pytest")
