"""Captions as a sample is trained with them."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from library.data.captions import Progress, process, tag_frequency
from library.data.records import ImageRecord
from library.options.specs import CaptionSpec, DatasetSpec, SubsetSpec


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


def test_an_empty_separator_splits_nothing() -> None:
    assert set(many("b a, c", 50, separator="", shuffle=True)) == {"b a, c"}
    assert set(many("b a, c", 50, separator="", tag_dropout_rate=0.5)) == {"b a, c", ""}
    assert made("a ||| b, c ||| d", separator="", keep_tokens_separator="|||", shuffle=True) == "a b, c d"


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("", ""),
        (" ", ""),
        (",", ", "),
        (",,a", ", , a"),
        ("\n", ""),
        ("猫,\u3000座る", "猫, 座る"),
        ("{a}, }{", "{a}, }{"),
    ],
)
def test_odd_captions_are_split_and_joined(text: str, result: str) -> None:
    assert made(text, warmup_step=1.0) == result
    assert Counter(made(text, shuffle=True).split(", ")) == Counter(result.split(", "))


def at(step: int, total: int, text: str = "a, b, c, d, e", **settings: Any) -> str:
    return process(text, CaptionSpec(**settings), seed=0, epoch=1, key="k", repeat=0, progress=Progress(step, total))


def test_warmup_adds_tags_by_the_step() -> None:
    counts = [len(at(step, 100, warmup_step=8.0, warmup_min=2).split(", ")) for step in range(10)]
    assert counts == [2, 2, 2, 3, 3, 3, 4, 4, 5, 5]
    assert at(0, 100, warmup_step=8.0, warmup_min=1, keep_tokens=2) == "a, b, c"
    assert at(0, 100, "x ||| a, b ||| y", warmup_step=8.0, warmup_min=1, keep_tokens_separator="|||") == "x, a, y"
    assert at(0, 100, warmup_step=8.0, warmup_min=9) == "a, b, c, d, e"
    assert at(0, 100, warmup_step=8.0, warmup_min=0) == ""


def test_a_warmup_below_1_is_a_fraction_of_all_steps() -> None:
    counts = [len(at(step, 10, warmup_step=0.45, warmup_min=1).split(", ")) for step in range(6)]
    assert counts == [1, 2, 3, 4, 5, 5]
    assert at(0, 10, warmup_step=0.09) == "a, b, c, d, e", "over before the first step"
    assert made("a,b", warmup_step=0.5) == "a, b", "no progress: all tags"


def test_where_a_micro_batch_is() -> None:
    moments = [
        Progress.at(epoch, index, batches=5, accumulation=2, total=7) for epoch in (1, 2, 3) for index in range(5)
    ]
    assert [moment.step for moment in moments if moment] == [0, 0, 1, 1, 2, 3, 3, 4, 4, 5, 6, 6, 7, 7, 8]
    assert Progress.at(1, 0, batches=5, accumulation=2, total=0) is None


TWO = ("a photo of {}", "{} at night")


def test_templates_hold_the_subject_or_the_caption() -> None:
    assert set(many("cat, moon", templates=TWO, subject="sks")) == {"a photo of sks", "sks at night"}
    assert set(many("cat, moon", templates=TWO)) == {"a photo of cat, moon", "cat, moon at night"}
    assert made("{}, {{", templates=("<{}>",)) == "<{}, {{>"
    assert made("a;b", templates=("<{}>",), secondary_separator=";", prefix="p") == "<p a,b>"


def test_the_original_caption_follows_its_template() -> None:
    assert made("cat, moon", templates=TWO[:1], subject="sks", keep_original=True) == "a photo of sks, cat, moon"
    joined = made("cat;moon", templates=TWO[:1], subject="sks", keep_original=True, separator=" | ")
    assert joined == "a photo of sks | cat;moon"
    assert made("", templates=TWO[:1], subject="sks", keep_original=True) == "a photo of sks"
    assert made("cat", templates=TWO[:1], keep_original=True) == "a photo of cat", "no caption twice"


def test_what_is_dropped_or_missing_fills_no_template() -> None:
    assert set(many("cat", templates=TWO, subject="sks", dropout_rate=0.5)) == {"", "a photo of sks", "sks at night"}
    assert made("cat", templates=TWO, subject="sks", dropout_every_n_epochs=1) == ""
    assert made("", templates=TWO) == ""
    assert made("", templates=TWO[:1], subject="sks") == "a photo of sks"


def test_tags_of_a_folder_are_counted_under_its_name(tmp_path: Path) -> None:
    subset, listed = SubsetSpec(tmp_path / "5_cat"), SubsetSpec(tmp_path, metadata_file=tmp_path / "meta.json")
    specs = [DatasetSpec(1, (64, 64), (subset, listed)), DatasetSpec(1, (32, 32), (subset,))]
    records = [
        ImageRecord(tmp_path, f"{i}.png", (64, 64), 1, text, True, dataset, number, 3, False)
        for i, (text, dataset, number) in enumerate([("Cat, moon,", 0, 0), ("cat", 0, 0), ("dog", 0, 1), ("fox", 1, 0)])
    ]
    assert tag_frequency(records, specs) == {"5_cat": {"cat": 2, "moon": 1}, "meta.json": {"dog": 1}}


def test_draws_differ_between_showings() -> None:
    text = ", ".join("abcdefghij")
    coordinates: list[dict[str, Any]] = [{"epoch": 2}, {"key": "b.png"}, {"repeat": 1}, {"seed": 1}, {}]
    assert len({made(text, shuffle=True, **coordinate) for coordinate in coordinates}) == 5
