"""Regularization pictures are shown as often as sd-scripts shows them."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from library.data.records import ImageRecord
from library.data.sources.balance import balance
from library.data.sources.listing import Findings


def record(number: int, repeats: int, *, is_reg: bool, dataset: int = 0) -> ImageRecord:
    return ImageRecord(Path("x"), f"{number}.png", (64, 64), 1, "", True, dataset, int(is_reg), repeats, is_reg)


def by_rounds(wanted: int, repeats: list[int]) -> list[int]:
    """One picture after another gets its repeats, then one more each, until the number is reached."""
    found, reached, first = [0] * len(repeats), 0, True
    while reached < wanted:
        for i, own in enumerate(repeats):
            found[i] += own if first else 1
            reached += own if first else 1
            if reached >= wanted:
                break
        first = False
    return found


counts = st.lists(st.integers(1, 9), min_size=1, max_size=12)


@given(counts, counts, counts)
def test_balance_is_that_of_the_rounds(train: list[int], reg: list[int], other: list[int]) -> None:
    records = [record(i, repeats, is_reg=False) for i, repeats in enumerate(train)]
    records += [record(i, repeats, is_reg=True) for i, repeats in enumerate(reg)]
    records += [record(i, repeats, is_reg=False, dataset=1) for i, repeats in enumerate(other)]
    found = balance(records, 2, Findings())
    expected = by_rounds(sum(train), reg)
    assert [one.repeats for one in found if one.is_reg] == [count for count in expected if count]
    assert [one for one in found if not one.is_reg] == [one for one in records if not one.is_reg]


def test_without_training_pictures_none_is_shown() -> None:
    assert balance([record(0, 3, is_reg=True)], 1, Findings()) == []
