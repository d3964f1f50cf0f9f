"""Prompt files in the three formats, and what is said of bad ones."""

from pathlib import Path

import pytest

from library.errors import UserError
from library.training.prompts import Prompt, read_prompts


def file(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_text_lines_with_options(tmp_path: Path) -> None:
    text = "# a comment\n\na cat, big --n dog, ugly --w 130 --h 64 --d 7 --s 5 --l 4.5 --ss euler_a\nn 1girl, s 5\n"
    first, second = read_prompts(file(tmp_path, "p.txt", text))
    assert first == Prompt("a cat, big", "dog, ugly", 130, 64, 7, 5, 4.5, "euler_a")
    assert second == Prompt("n 1girl, s 5")


def test_toml_subsets_override_defaults(tmp_path: Path) -> None:
    subsets = '[[prompt.subset]]\nprompt = "a"\n[[prompt.subset]]\nprompt = "b"\nscale = 9\n'
    text = f"[prompt]\nscale = 3\nwidth = 128\n{subsets}"
    assert read_prompts(file(tmp_path, "p.toml", text)) == (
        Prompt("a", width=128, scale=3.0),
        Prompt("b", width=128, scale=9.0),
    )


def test_json_lists(tmp_path: Path) -> None:
    text = '[{"prompt": "a", "seed": 3}, "b --s 4"]'
    assert read_prompts(file(tmp_path, "p.json", text)) == (Prompt("a", seed=3), Prompt("b", sample_steps=4))


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("p.txt", "\n# nothing\n", "holds no prompt"),
        ("p.txt", "a cat --q 3", "p.txt:1: --q is no prompt option"),
        ("p.txt", "a\nb --w wide", "p.txt:2: width is 'wide'"),
        ("p.txt", "a --ss eulr", "'eulr' is no sampler; did you mean euler?"),
        ("p.json", '[{"promt": "a"}]', "did you mean prompt"),
        ("p.json", "[", "is no valid JSON"),
        ("p.toml", "prompt = 3", "must be a table"),
        ("p.md", "a", "use a .txt, .toml or .json file"),
    ],
)
def test_bad_files_are_explained(tmp_path: Path, name: str, text: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        read_prompts(file(tmp_path, name, text))
    assert says in str(caught.value)
