"""The split for validation: exact counts, nothing in both parts, nothing lost, the same whatever the order."""

import random
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.data.records import ImageRecord
from library.data.sources.listing import Findings
from library.data.sources.scan import survey
from library.data.sources.split import hold_out
from library.options.specs import DatasetSpec, SubsetSpec
from library.options.values import round_half_up
from tests.data.conftest import MakePicture

FRACTIONS = st.sampled_from([0.0, 0.01, 0.1, 0.15, 0.25, 0.29, 1 / 3, 0.5, 0.75, 0.9, 1.0])


def spec_of(*subsets: SubsetSpec, seed: int = 0) -> DatasetSpec:
    return DatasetSpec(batch_size=1, resolution=(64, 64), subsets=subsets, split_seed=seed)


def subset(folder: str = "/data/a", split: float = 0.0, *, is_reg: bool = False) -> SubsetSpec:
    return SubsetSpec(image_dir=Path(folder), validation_split=split, is_reg=is_reg)


def records_of(specs: list[DatasetSpec], counts: dict[tuple[int, int], int]) -> list[ImageRecord]:
    """So many pictures of each (dataset, subset)."""
    return [
        ImageRecord(
            folder=specs[dataset].subsets[number].image_dir,
            key=f"picture{i}.png",
            size=(64, 64),
            orientation=1,
            caption="",
            captioned=False,
            dataset=dataset,
            subset=number,
            repeats=3,
            is_reg=specs[dataset].subsets[number].is_reg,
        )
        for (dataset, number), count in counts.items()
        for i in range(count)
    ]


def split(records: list[ImageRecord], specs: list[DatasetSpec]) -> tuple[list[ImageRecord], list[ImageRecord]]:
    findings = Findings()
    parts = hold_out(records, specs, findings)
    assert not findings.problems, findings.problems
    return parts


def names(records: list[ImageRecord]) -> set[tuple[int, int, str]]:
    return {(record.dataset, record.subset, record.key) for record in records}


@given(count=st.integers(1, 60), first=FRACTIONS, second=FRACTIONS, seed=st.integers(0, 2**40), shuffle=st.randoms())
def test_disjoint_exact_and_independent_of_order(
    count: int, first: float, second: float, seed: int, shuffle: random.Random
) -> None:
    """One folder that trains alone is there in every case, so that the rest may be held out altogether."""
    specs = [
        spec_of(
            subset("/data/a", first), subset("/data/b", second), subset("/data/reg", first, is_reg=True), seed=seed
        ),
        spec_of(subset("/data/c")),
    ]
    records = records_of(specs, {(0, 0): count, (0, 1): 7, (0, 2): 5, (1, 0): 2})
    training, validation = split(records, specs)
    assert not names(training) & names(validation)
    assert names(training) | names(validation) == names(records)
    assert len(training) + len(validation) == len(records)
    held = Counter((record.dataset, record.subset) for record in validation)
    assert held[0, 0] == round_half_up(count, first)
    assert held[0, 1] == round_half_up(7, second)
    assert held[0, 2] == held[1, 0] == 0
    assert {record.repeats for record in validation} <= {1}
    assert {record.repeats for record in training} == {3}
    shuffled = list(records)
    shuffle.shuffle(shuffled)
    other_training, other_validation = split(shuffled, specs)
    assert names(other_training) == names(training)
    assert names(other_validation) == names(validation)
    places = {(record.dataset, record.subset, record.key): i for i, record in enumerate(shuffled)}
    order = [places[record.dataset, record.subset, record.key] for record in other_validation]
    assert order == sorted(order)


@given(count=st.integers(1, 80), fractions=st.lists(FRACTIONS, min_size=2, max_size=2), seed=st.integers(0, 99))
def test_nested_when_the_fraction_grows(count: int, fractions: list[float], seed: int) -> None:
    held = []
    for fraction in sorted(fractions):
        specs = [spec_of(subset("/data/a", fraction), seed=seed), spec_of(subset("/data/b"))]
        held.append(names(split(records_of(specs, {(0, 0): count, (1, 0): 1}), specs)[1]))
    assert held[0] <= held[1]


@given(count=st.integers(2, 40), fraction=st.sampled_from([0.1, 0.3, 0.5]), seed=st.integers(0, 99))
def test_same_side_in_every_dataset(count: int, fraction: float, seed: int) -> None:
    """As with one folder at two resolutions; also where the folder is written differently."""
    specs = [spec_of(subset(folder, fraction), seed=seed) for folder in ("/data/a", "/data/x/../a")]
    training, validation = split(records_of(specs, {(0, 0): count, (1, 0): count}), specs)
    for part in (training, validation):
        assert {r.key for r in part if r.dataset == 0} == {r.key for r in part if r.dataset == 1}


def test_other_seeds_hold_out_others() -> None:
    found = set()
    for seed in range(5):
        specs = [spec_of(subset(split=0.2), seed=seed)]
        found.add(frozenset(names(split(records_of(specs, {(0, 0): 50}), specs)[1])))
    assert len(found) == 5


def test_every_picture_has_the_same_chance() -> None:
    counts: Counter[str] = Counter()
    for seed in range(400):
        specs = [spec_of(subset(split=0.25), seed=seed)]
        counts.update(record.key for record in split(records_of(specs, {(0, 0): 20}), specs)[1])
    assert sum(counts.values()) == 2000
    assert all(60 < counts[f"picture{i}.png"] < 145 for i in range(20)), counts


@pytest.mark.parametrize(
    ("count", "fraction", "held"),
    [(10, 0.3, 3), (10, 0.15, 2), (50, 0.29, 15), (10, 0.04, 0), (1, 0.5, 1), (3, 0.0, 0), (3, 1.0, 3), (5, 0.5, 3)],
)
def test_rounding_is_exact(count: int, fraction: float, held: int) -> None:
    assert round_half_up(count, fraction) == held


@given(count=st.integers(0, 10**6), hundredths=st.integers(0, 100))
def test_rounding_of_decimals(count: int, hundredths: int) -> None:
    exact = Fraction(count * hundredths, 100)
    assert -Fraction(1, 2) < round_half_up(count, hundredths / 100) - exact <= Fraction(1, 2)


def test_nothing_is_copied_without_a_split() -> None:
    specs = [spec_of(subset())]
    records = records_of(specs, {(0, 0): 4})
    assert split(records, specs) == (records, [])


def test_a_dataset_for_validation_alone() -> None:
    specs = [spec_of(subset("/data/a")), spec_of(subset("/data/b", 1.0))]
    training, validation = split(records_of(specs, {(0, 0): 3, (1, 0): 4}), specs)
    assert {record.dataset for record in training} == {0}
    assert [record.dataset for record in validation] == [1] * 4


def test_nothing_left_to_train_on() -> None:
    """Regularization pictures alone are no training."""
    specs = [spec_of(subset("/data/a", 1.0), subset("/data/reg", is_reg=True))]
    findings = Findings()
    hold_out(records_of(specs, {(0, 0): 3, (0, 1): 2}), specs, findings)
    assert ["none is left to train on" in problem.wrong for problem in findings.problems] == [True]


def test_trained_and_held_out() -> None:
    """The same pictures train in one dataset and validate in another."""
    specs = [spec_of(subset("/data/a")), spec_of(subset("/data/a/../a", 1.0))]
    findings = Findings()
    hold_out(records_of(specs, {(0, 0): 12, (1, 0): 12}), specs, findings)
    (problem,) = findings.problems
    assert "pictures would be held out for validation here, and trained on in /data/a (12): " in problem.wrong
    assert "picture0.png" in problem.wrong
    assert "and 2 more" in problem.wrong


def test_absolute_and_relative_names_of_one_picture() -> None:
    specs = [spec_of(subset("/data/a")), spec_of(subset("/elsewhere", 1.0))]
    records = records_of(specs, {(0, 0): 2, (1, 0): 1})
    absolute = ImageRecord(Path("/elsewhere"), "/data/a/picture1.png", (64, 64), 1, "", False, 1, 0, 1, False)
    findings = Findings()
    hold_out([*records, absolute], specs, findings)
    assert [problem.wrong.count("/data/a/picture1.png") for problem in findings.problems] == [1]


def test_a_fraction_that_holds_out_nothing_is_told() -> None:
    specs = [spec_of(subset(split=0.1))]
    findings = Findings()
    assert hold_out(records_of(specs, {(0, 0): 3}), specs, findings)[1] == []
    assert findings.notices == ["/data/a: validation_split 0.1 of 3 pictures holds out none"]


@pytest.mark.parametrize("kind", ["link", "hard link", "link to the folder"])
def test_links_to_trained_pictures_are_found(tmp_path: Path, make_picture: MakePicture, kind: str) -> None:
    make_picture(tmp_path / "a" / "00.png")
    make_picture(tmp_path / "a" / "01.png")
    make_picture(tmp_path / "b" / "own.png")
    if kind == "link":
        (tmp_path / "b" / "hold.png").symlink_to("../a/00.png")
    elif kind == "hard link":
        (tmp_path / "b" / "hold.png").hardlink_to(tmp_path / "a" / "00.png")
    else:
        (tmp_path / "b" / "deep").symlink_to(tmp_path / "a")
    held = SubsetSpec(tmp_path / "b", validation_split=1.0, recursive=True)
    specs = [spec_of(SubsetSpec(tmp_path / "a")), spec_of(held)]
    found = survey(specs)
    (problem,) = found.problems
    assert "trained on in" in problem.wrong
    name = "deep/00.png" if kind == "link to the folder" else "hold.png"
    assert f"{name} (the same file as 00.png)" in problem.wrong
    assert "own.png" not in problem.wrong


def test_copies_are_pictures_of_their_own(tmp_path: Path, make_picture: MakePicture) -> None:
    data = make_picture(tmp_path / "a" / "00.png").read_bytes()
    make_picture(tmp_path / "b" / "hold.png").write_bytes(data)
    found = survey([spec_of(subset(str(tmp_path / "a"))), spec_of(subset(str(tmp_path / "b"), 1.0))])
    assert (found.problems, len(found.held_out)) == ((), 1)
