"""Probabilities become tags: thresholds, order, replacement, and what is left out."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from library.data.captioning.tagger import thresholds
from library.data.captioning.tags import (
    CATEGORIES,
    Category,
    Chooser,
    Label,
    Rules,
    appended,
    listed,
    replacements,
    unknown,
)
from library.errors import UserError

LABELS = (
    Label("general", "rating"),
    Label("explicit", "rating"),
    Label("1girl", "general"),
    Label("long_hair", "general"),
    Label("^_^", "general"),
    Label("saber_(armor)_(fate)", "character"),
    Label("artoria_(fate)", "character"),
    Label("best_quality", "quality"),
)
ALL = np.array([0.2, 0.7, 0.5, 0.9, 0.6, 0.8, 0.95, 0.1])


def rules(common: float = 0.35, single: Mapping[Category, float] | None = None, **more: Any) -> Rules:
    return Rules(thresholds=thresholds(common, single or {}), **more)


def tags(probabilities: object = ALL, **more: Any) -> list[str]:
    return Chooser(LABELS, rules(**more))(np.asarray(probabilities, np.float32))


def test_the_threshold_itself_counts_and_ratings_do_not() -> None:
    assert tags([1, 1, 0.35, 0.34, 0, 0, 0.36, 1]) == ["1girl", "artoria_(fate)"]


def test_thresholds_of_categories() -> None:
    assert tags(single={"character": 0.9}) == ["1girl", "long_hair", "^_^", "artoria_(fate)"]
    assert tags(single={"general": 0.55}, common=0.85) == ["long_hair", "^_^", "artoria_(fate)"]
    assert set(thresholds(0.5, {"meta": 0.0})) == set(CATEGORIES)
    assert thresholds(0.5, {"meta": 0.0})["meta"] == 0


def test_orders() -> None:
    table = ["1girl", "long_hair", "^_^", "saber_(armor)_(fate)", "artoria_(fate)"]
    assert tags() == table
    assert tags(characters_first=True) == [*table[3:], *table[:3]]
    likeliest = ["artoria_(fate)", "long_hair", "saber_(armor)_(fate)", "^_^", "1girl"]
    assert tags(by_probability=True) == likeliest
    assert tags(by_probability=True, characters_first=True)[:3] == [
        "artoria_(fate)",
        "saber_(armor)_(fate)",
        "long_hair",
    ]
    assert tags(first=("^ ^", "nothing", "long hair")) == ["^_^", "long_hair", "1girl", *table[3:]]


def test_ratings_and_qualities() -> None:
    assert tags(first_of=("rating",), last_of=("quality",), characters_first=True) == [
        *("explicit", "saber_(armor)_(fate)", "artoria_(fate)", "1girl", "long_hair", "^_^", "best_quality"),
    ]
    assert "explicit" not in tags(first_of=("rating",), undesired=("explicit",))


def test_words() -> None:
    assert tags(remove_underscore=True) == ["1girl", "long hair", "^_^", "saber (armor) (fate)", "artoria (fate)"]
    expanded = tags(expand_characters=True, remove_underscore=True)
    assert expanded[3:] == ["saber (armor)", "fate", "artoria"]


@pytest.mark.parametrize("written", ["long_hair", "long hair"])
@pytest.mark.parametrize("spaces", [True, False])
def test_tags_are_named_either_way(written: str, spaces: bool) -> None:
    assert tags(undesired=(written,), remove_underscore=spaces)[:2] == ["1girl", "^_^"]
    assert tags(replacements=((written, "hair"),), remove_underscore=spaces)[:2] == ["1girl", "hair"]


def test_replacement_touches_its_tag_only_and_gives_it_once() -> None:
    assert tags(replacements=(("1girl", "a girl"), ("^_^", "a girl"))) == [
        *("a girl", "long_hair", "saber_(armor)_(fate)", "artoria_(fate)"),
    ]
    assert tags(replacements=(("1girl", "a girl"),), undesired=("a girl",))[0] == "long_hair"


def test_replacements_as_they_are_written() -> None:
    assert replacements(r"a,b; long hair , x\,y\;\\z;", "--t") == (("a", "b"), ("long hair", r"x,y;\z"))
    assert replacements(None, "--t") == ()
    with pytest.raises(UserError) as caught:
        replacements("a;b,c,d;e,", "--t")
    assert [str(problem).split(" isn't")[0] for problem in caught.value.problems] == [
        *('--t: "a"', '--t: "b,c,d"', '--t: "e,"'),
    ]


def test_lists_are_split_at_the_separator() -> None:
    assert listed(" a b,c ,, d", ", ") == ("a b", "c", "d")
    assert listed("a. b,c", ". ") == ("a", "b,c")
    assert listed("a,b", " ") == ("a", "b")


def test_adding_to_a_caption() -> None:
    assert appended("long hair,  1girl", ["long_hair", "smile"], ", ") == "long hair, 1girl, smile"
    assert appended("", ["a", "b"], ", ") == "a, b"
    assert appended("one\ntwo, a", ["a"], ", ") == "one, a\ntwo, a"


def test_names_that_the_tagger_does_not_have() -> None:
    asked = ("long hair", "smile", "fate", "girl")
    assert unknown(asked, LABELS, rules()) == ["smile", "fate", "girl"]
    assert unknown(asked, LABELS, rules(expand_characters=True, replacements=(("1girl", "girl"),))) == ["smile"]


def test_counts() -> None:
    chooser = Chooser(LABELS, rules())
    chooser(np.array([0, 0, 1, 1, 0, 0, 0, 0.0]))
    chooser(np.array([0, 0, 1, 0, 0, 0, 0, 0.0]))
    assert chooser.counts == {"1girl": 2, "long_hair": 1}
