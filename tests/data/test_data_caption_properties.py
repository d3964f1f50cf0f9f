"""What holds for the caption of any text and any recipe, and how often what is drawn."""

import math
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from library.data.captions import Progress, joiner, process
from library.options.specs import CaptionSpec

MARK = "|||"
words = st.text("abcdefé中 {}", min_size=1, max_size=6).map(str.strip).filter(bool)
tag_lists = st.lists(words, min_size=1, max_size=8)
separators = st.sampled_from([",", ";", " | ", "。"])
seeds = st.integers(0, 2**63 - 1)
places = st.fixed_dictionaries(
    {
        "seed": seeds,
        "epoch": st.integers(1, 1000),
        "key": st.sampled_from(["a.png", "sub/b c.jpg", "ü.webp"]),
        "repeat": st.integers(0, 500),
    }
)
any_recipe = st.builds(
    CaptionSpec,
    prefix=st.sampled_from([None, "", "pre", "pre |||"]),
    suffix=st.sampled_from([None, "end"]),
    dropout_rate=st.sampled_from([0.0, 0.5, 1.0]),
    dropout_every_n_epochs=st.integers(0, 3),
    tag_dropout_rate=st.sampled_from([0.0, 0.5, 1.0]),
    separator=st.sampled_from([",", ";", "", " "]),
    keep_tokens=st.integers(0, 3),
    keep_tokens_separator=st.sampled_from(["", MARK]),
    secondary_separator=st.sampled_from([None, ";;;"]),
    wildcards=st.booleans(),
    shuffle=st.booleans(),
    warmup_min=st.integers(0, 4),
    warmup_step=st.sampled_from([0.0, 0.01, 0.5, 1.0, 7.0]),
    templates=st.sampled_from([(), ("a {}",), ("a {}", "{} b", "c {} d")]),
    subject=st.sampled_from(["", "sks"]),
    keep_original=st.booleans(),
)
texts = st.lists(
    st.sampled_from(["cat", "a b", ",", ", ", ";", ";;;", MARK, "\n", "{a|b}", "{{", "}}", "{}", "{", "}", "é", " "]),
    max_size=9,
).map("".join)
progresses = st.one_of(st.none(), st.builds(Progress, st.integers(0, 20), st.integers(1, 20)))


@settings(deadline=None, max_examples=400)
@given(texts, any_recipe, places, progresses)
def test_any_text_and_recipe_gives_the_same_line_twice(
    text: str, spec: CaptionSpec, place: dict, progress: Progress | None
) -> None:
    made = process(text, spec, progress=progress, **place)
    assert made == process(text, spec, progress=progress, **place)
    assert "\n" not in made
    assert not spec.keep_tokens_separator or MARK not in made


@settings(deadline=None)
@given(tag_lists, separators, st.integers(0, 9), places)
def test_kept_tags_stay_and_none_is_lost(tags: list[str], separator: str, keep: int, place: dict) -> None:
    spec = CaptionSpec(shuffle=True, keep_tokens=keep, separator=separator)
    found = process(separator.join(tags), spec, **place).split(joiner(separator))
    assert found[:keep] == tags[:keep]
    assert Counter(found) == Counter(tags)


@settings(deadline=None)
@given(tag_lists, tag_lists, tag_lists, places, st.booleans(), st.sampled_from([0.0, 0.5, 1.0]))
def test_tags_around_the_marks_stay(
    first: list[str], middle: list[str], last: list[str], place: dict, shuffle: bool, rate: float
) -> None:
    text = MARK.join(", ".join(tags) for tags in (first, middle, last))
    spec = CaptionSpec(shuffle=shuffle, tag_dropout_rate=rate, keep_tokens_separator=MARK)
    found = process(text, spec, **place).split(", ")
    assert found[: len(first)] == first
    assert found[len(found) - len(last) :] == last
    between = Counter(found[len(first) : len(found) - len(last)])
    assert between <= Counter(middle)
    if rate == 0:
        assert between == Counter(middle)


def share(texts: list[str], wanted: str) -> float:
    return sum(text == wanted for text in texts) / len(texts)


@pytest.mark.parametrize("rate", [0.02, 0.3, 0.9])
def test_captions_drop_as_often_as_they_should(rate: float) -> None:
    count = 4000
    spec = CaptionSpec(dropout_rate=rate)
    made = [process("cat", spec, seed=5, epoch=1 + i // 40, key="a.png", repeat=i % 40) for i in range(count)]
    assert abs(share(made, "") - rate) < 5 * math.sqrt(rate * (1 - rate) / count)


@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize("shuffle", [False, True])
def test_each_tag_drops_as_often_as_it_should(rate: float, shuffle: bool) -> None:
    count, tags = 3000, "abcde"
    spec = CaptionSpec(tag_dropout_rate=rate, shuffle=shuffle)
    left: Counter[str] = Counter()
    for i in range(count):
        left.update(process(", ".join(tags), spec, seed=6, epoch=1, key=f"{i}.png", repeat=0).split(", "))
    bound = 5 * math.sqrt(rate * (1 - rate) / count)
    assert all(abs(left[tag] / count - (1 - rate)) < bound for tag in tags), left


def test_templates_and_orders_are_drawn_evenly() -> None:
    count = 3000
    spec = CaptionSpec(templates=("{} 1", "{} 2", "{} 3"), shuffle=True)
    made = Counter(process("a, b", spec, seed=7, epoch=1, key="a.png", repeat=i) for i in range(count))
    assert len(made) == 6
    assert all(abs(found / count - 1 / 6) < 5 * math.sqrt(5 / 36 / count) for found in made.values()), made


@settings(deadline=None, max_examples=50)
@given(places)
def test_repeats_epochs_pictures_and_seeds_draw_anew(place: dict) -> None:
    """Of 20! orders, two are the same never."""
    text, spec = ",".join(map(str, range(20))), CaptionSpec(shuffle=True)
    others = [
        place,
        *({**place, name: place[name] + 1} for name in ("seed", "epoch", "repeat")),
        {**place, "key": place["key"] + "x"},
    ]
    assert len({process(text, spec, **other) for other in others}) == len(others)


warmups = st.one_of(st.integers(1, 60).map(float), st.sampled_from([0.1, 0.29, 0.5, 0.99]))


@settings(deadline=None)
@given(tag_lists, st.integers(0, 10), warmups, st.integers(1, 60), st.integers(0, 3), places, st.booleans())
def test_a_warmup_only_adds_tags(
    tags: list[str], least: int, warmup: float, total: int, keep: int, place: dict, shuffle: bool
) -> None:
    numbered = [f"{tag}{i}" for i, tag in enumerate(tags)]
    assume(not any("," in tag for tag in numbered))
    spec = CaptionSpec(shuffle=shuffle, keep_tokens=keep, warmup_min=least, warmup_step=warmup)
    text = ", ".join(numbered)
    full = process(text, replace(spec, warmup_step=0.0), **place)
    flexible = max(0, len(tags) - keep)
    counts = []
    for step in range(total):
        made = process(text, spec, progress=Progress(step, total), **place)
        found = [tag for tag in made.split(", ") if tag]
        assert found[:keep] == numbered[:keep]
        assert set(found[keep:]) == set(numbered[keep : len(found)]), "the first tags of the text are shown first"
        rest = iter(full.split(", "))
        assert all(tag in rest for tag in found), "in the order that they have without a warmup"
        counts.append(len(found) - min(keep, len(tags)))
    assert counts == sorted(counts)
    assert min(least, flexible) <= counts[0]
    assert counts[-1] <= flexible
    end = math.floor(warmup * total) if warmup < 1 else int(warmup)
    assert counts[end:] == [flexible] * len(counts[end:])
    for step, count in enumerate(counts[:end]):
        assert count == min(flexible, math.floor(step * (flexible - least) / end) + least)


parts = st.text("abc ", max_size=3)


@settings(deadline=None)
@given(st.lists(st.lists(parts, min_size=1, max_size=4), max_size=4), places)
def test_wildcards_choose_from_their_parts(choices: list[list[str]], place: dict) -> None:
    assume(all("|".join(options) for options in choices))
    text = "-".join("{" + "|".join(options) + "}" for options in choices)
    found = process(text, CaptionSpec(wildcards=True), **place)
    pieces = found.split("-") if choices else []
    assert len(pieces) == len(choices)
    assert all(piece in options for piece, options in zip(pieces, choices, strict=True))


@settings(deadline=None)
@given(tag_lists, places, any_recipe)
def test_templates_change_no_other_draw(tags: list[str], place: dict, spec: CaptionSpec) -> None:
    text = ", ".join(tags)
    plain = replace(spec, templates=())
    filled = replace(spec, templates=("<{}>", "<<{}>>"), subject="", keep_original=False)
    made, inside = process(text, filled, **place), process(text, plain, **place)
    assert made in ({f"<{inside}>", f"<<{inside}>>"} if inside else {""})
