"""Prompt files in the three formats, prompts of a command line, and what is said of bad ones."""

from pathlib import Path

import pytest

from library.errors import UserError
from library.tokenizer.vocabulary import NewToken, Vocabulary
from library.training.prompts import Prompt, prompt_notices, read_prompts, typed_prompts


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


def test_typed_lines_are_read_as_those_of_a_file(tmp_path: Path) -> None:
    lines = [
        "a cat, big --n dog, ugly --w 130 --h 64 --d 7 --s 5 --l 4.5 --ss euler_a",
        "# one",
        " a <cat-toy>-like 1 ",
    ]
    typed = typed_prompts(lines, "--preview_prompts")
    assert typed[0] == read_prompts(file(tmp_path, "p.txt", lines[0]))[0]
    assert typed[1:] == (Prompt("# one"), Prompt("a <cat-toy>-like 1"))
    assert typed_prompts([], "--preview_prompts") == ()


def test_bad_typed_lines_are_named_by_flag_and_number() -> None:
    with pytest.raises(UserError) as caught:
        typed_prompts(["a", "b --q 3", " ", "c --w wide --ss eulr"], "--validation_prompt")
    assert [str(problem).partition(";")[0] for problem in caught.value.problems] == [
        "--validation_prompt, prompt 2: --q is no prompt option",
        "--validation_prompt, prompt 3: is empty",
        "--validation_prompt, prompt 4: width is 'wide'",
        "--validation_prompt, prompt 4: 'eulr' is no sampler",
    ]


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        ((), False),
        (("a cat", "mycats on a sofa"), True),
        (("a cat", "a photo of MyCat, at night"), False),
        (("a (mydog:1.2)",), False),
    ],
)
def test_previews_that_show_nothing_of_the_vectors_are_told(texts: tuple[str, ...], told: bool) -> None:
    vocabulary = Vocabulary((NewToken("mycat", 3), NewToken("mydog")))
    prompts = [Prompt(text) for text in texts]
    lines = ["no prompt of the previews holds mycat or mydog: they won't show what the vectors learn"]
    assert [*prompt_notices(prompts, vocabulary)] == (lines if told else [])
    assert [*prompt_notices(prompts, Vocabulary())] == []


def test_a_negative_prompt_shows_a_token_too() -> None:
    assert not [*prompt_notices([Prompt("a cat", negative_prompt="mycat")], Vocabulary((NewToken("mycat"),)))]
