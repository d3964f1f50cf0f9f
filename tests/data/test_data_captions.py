"""Captions as a sample is trained with them."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.data.captions import process
from library.options.specs import CaptionSpec


def made(text: str, *, epoch: int = 1, key: str = "a.png", repeat: int = 0, seed: int = 0, **settings: Any) -> str:
    return process(text, CaptionSpec(**settings), seed=seed, epoch=epoch, key=key, repeat=repeat)


def many(text: str, count: int = 400, **settings: Any) -> list[str]:
    return [made(text, repeat=i, **settings) for i in range(count)]


def test_untouched_text() -> None:
    assert made("a  cat ,sits; there") == "a  cat ,sits; there"


def test_affixes() -> None:
    assert made("cat", prefix="sks", suffix="photo") == "sks cat photo"
    assert set(many("one\ntwo", prefix="sks", suffix="photo", wildcards=True)) == {"sks one photo", "sks two photo"}


def test_dropout_takes_everything() -> None:
    found = Counter(many("cat", prefix="sks", dropout_rate=0.25))
    assert set(found) == {"", "sks cat"}
    assert 60 < found[""] < 140


def test_dropout_of_whole_epochs() -> None:
    assert [made("cat", epoch=epoch, dropout_every_n_epochs=3) for epoch in range(1, 8)] == [
        "cat", "cat", "", "cat", "cat", "", "cat",
    ]  # fmt: skip


def test_first_line_without_wildcards() -> None:
    assert made("one\ntwo") == "one"
    assert made("a {b|c}") == "a {b|c}"


def test_wildcards() -> None:
    assert set(many("a {red|blue} {cat|dog}", wildcards=True)) == {
        "a red cat", "a red dog", "a blue cat", "a blue dog",
    }  # fmt: skip
    assert set(many("{{a|b}} {c|d}", wildcards=True)) == {"{a|b} c", "{a|b} d"}
    assert set(many("one\n{two|three}", wildcards=True)) == {"one", "two", "three"}


def test_shuffle_keeps_the_first_tags() -> None:
    found = many("a, b, c, d", shuffle=True, keep_tokens=2)
    assert set(found) == {"a, b, c, d", "a, b, d, c"}
    assert len(set(many("a, b, c, d", shuffle=True))) == 24


def test_separator_of_the_user_joins() -> None:
    assert set(many("a;b , c", separator=";", shuffle=True)) == {"a; b , c", "b , c; a"}
    assert set(many("a | b", separator=" | ", shuffle=True)) == {"a | b", "b | a"}
    assert set(many("a,b", shuffle=True)) == {"a, b", "b, a"}


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_keep_separator_never_leaks(shuffle: bool, rate: float) -> None:
    for text in many(
        "1girl, red ||| a, b, c ||| best, 4k ||| end",
        100,
        keep_tokens_separator="|||",
        shuffle=shuffle,
        tag_dropout_rate=rate,
    ):
        assert "|" not in text
        assert text.startswith("1girl, red")
        assert text.endswith("best, 4k, end")
        assert ", , " not in text


def test_tags_drop_at_their_rate_but_not_the_kept() -> None:
    found = many("a, b, c, d, e", tag_dropout_rate=0.3, keep_tokens=1)
    assert all(text.startswith("a") for text in found)
    left = sum(len(text.split(", ")) - 1 for text in found) / (4 * len(found))
    assert left == pytest.approx(0.7, abs=0.05)


def test_secondary_separator_becomes_the_first() -> None:
    found = set(many("a;;;b, c", secondary_separator=";;;", shuffle=True))
    assert found == {"a,b, c", "c, a,b"}


tags = st.lists(st.text("abcdef ", min_size=1, max_size=6).filter(str.strip), min_size=1, max_size=8)


@settings(deadline=None)
@given(tags, st.integers(0, 9), st.integers(0, 2**31), st.integers(1, 50))
def test_shuffling_loses_and_adds_nothing(words: list[str], keep: int, seed: int, epoch: int) -> None:
    text = ",".join(words)
    found = made(text, shuffle=True, keep_tokens=keep, seed=seed, epoch=epoch)
    stripped = [word.strip() for word in words]
    assert Counter(found.split(", ")) == Counter(stripped)
    assert found.split(", ")[:keep] == stripped[:keep]
    assert made(text, shuffle=True, keep_tokens=keep, seed=seed, epoch=epoch) == found


def test_draws_differ_between_showings() -> None:
    text = ", ".join("abcdefghij")
    coordinates: list[dict[str, Any]] = [{"epoch": 2}, {"key": "b.png"}, {"repeat": 1}, {"seed": 1}, {}]
    assert len({made(text, shuffle=True, **coordinate) for coordinate in coordinates}) == 5
