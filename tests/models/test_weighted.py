"""Captions with weights in brackets: what is read, and what it does to text states."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from library.models.inspect import inspect
from library.models.load import load
from library.models.prompts import weighted_rows
from library.models.weighted import fragments
from library.tokenizer import END_ID, START_ID, clip_tokenizer

CASES = [
    ("a cat", [("a cat", 1.0)]),
    ("", []),
    ("(x)", [("x", 1.1)]),
    ("[x]", [("x", 1 / 1.1)]),
    ("(x:1.5)", [("x", 1.5)]),
    ("(x:.5)", [("x", 0.5)]),
    ("(x:-1)", [("x", -1.0)]),
    ("a (b) c", [("a ", 1.0), ("b", 1.1), (" c", 1.0)]),
    ("((x))", [("x", 1.1 * 1.1)]),
    ("(a (b:1.5) c)", [("a ", 1.1), ("b", 1.5 * 1.1), (" c", 1.1)]),
    ("[(x:2):3]", [("x", 2 / 1.1), (":3", 1 / 1.1)]),
    (r"a \(b\) c", [("a (b) c", 1.0)]),
    (r"\[a\] \\ (b)", [(r"[a] \ ", 1.0), ("b", 1.1)]),
    (r"a\b", [("ab", 1.0)]),
    ("(a b", [("a b", 1.1)]),
    ("[a", [("a", 1 / 1.1)]),
    ("a) b]", [("a) b]", 1.0)]),
    ("a: b (c:d)", [("a: b ", 1.0), ("c:d", 1.1)]),
    ("x:1.5)", [("x:1.5)", 1.0)]),
    ("(x:1.2.3)", [("x:1.2.3", 1.1)]),
    ("(a:1)(b:1)", [("ab", 1.0)]),
    ("a\n(b)", [("a\n", 1.0), ("b", 1.1)]),
]


@pytest.mark.parametrize(("caption", "expected"), CASES)
def test_fragments(caption: str, expected: list[tuple[str, float]]) -> None:
    found = fragments(caption)
    assert [text for text, _ in found] == [text for text, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected])


def ids(text: str) -> list[int]:
    return list(clip_tokenizer().encode(text, add_special_tokens=False).ids)


def test_fragments_are_tokenized_apart() -> None:
    rows, weights = weighted_rows(["red(dish:1.5) cat"])
    expected = [START_ID, *ids("red"), *ids("dish"), *ids("cat"), END_ID]
    assert ids("reddish") != [*ids("red"), *ids("dish")]
    assert rows[0, 0, : len(expected)].tolist() == expected
    assert weights[0, 0, : len(expected)].tolist() == [1.0, 1.0, 1.5, 1.0, 1.0]
    assert weights[0, 0, len(expected) :].eq(1).all()


def test_weights_follow_the_rows() -> None:
    rows, weights = weighted_rows(["word " * 70 + "(word word word word word word word word:2)"], 150, 0)
    assert rows.shape == weights.shape == (1, 2, 77)
    assert weights[0, 0].tolist() == [1.0] * 71 + [2.0] * 5 + [1.0]
    assert weights[0, 1].tolist() == [1.0] + [2.0] * 3 + [1.0] * 73
    cut, _ = weighted_rows(["(word:2) " * 80], 75, 0)
    assert (cut[0, 0, 1:76] == ids("word")[0]).all() and cut[0, 0, 76] == END_ID


@pytest.mark.parametrize("words", [75, 150])
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_states_are_multiplied_and_the_pooled_output_is_not(
    tiny_models: Callable[[str], Path], family: str, words: int
) -> None:
    info = inspect(str(tiny_models(family)))
    plain = load(info, with_vae=False, max_token_length=words).encode_prompts(["a big cat", "a dog"])
    weighing = load(info, with_vae=False, max_token_length=words, weighted=True)
    heavy = weighing.encode_prompts(["a (big:1.5) cat", "a dog"])
    factor = torch.ones(2, words + 2, 1)
    factor[0, 2] = 1.5
    assert torch.allclose(heavy.states, plain.states * factor, atol=1e-6)
    if plain.pooled is not None and heavy.pooled is not None:
        assert torch.allclose(heavy.pooled, plain.pooled, atol=1e-6)
    unread = load(info, with_vae=False, max_token_length=words).encode_prompts(["a (big:1.5) cat"])
    assert not torch.allclose(unread.states, heavy.states[:1], atol=1e-3)
