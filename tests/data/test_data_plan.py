"""The plan of an epoch: nothing lost, nothing twice, the same every time."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.data.plan import Plan, build_plan
from library.data.records import ImageRecord
from library.errors import UserError
from library.options.specs import CaptionSpec, DatasetSpec, SubsetSpec

Rows = list[tuple[int, int, int]]


def spec_for(batch_size: int = 2, **how: Any) -> DatasetSpec:
    settings = {"enable_bucket": True, "min_bucket_reso": 64, "max_bucket_reso": 256, **how}
    return DatasetSpec(batch_size, (128, 128), (SubsetSpec(image_dir=Path("x")),), **settings)


def record(number: int, size: tuple[int, int], repeats: int, dataset: int = 0) -> ImageRecord:
    name = f"{number}.png"
    return ImageRecord(Path(name), name, size, 1, f"caption {number}", True, dataset, 0, repeats, False, 100)


pictures = st.lists(st.tuples(st.integers(40, 400), st.integers(40, 400), st.integers(1, 5)), min_size=1, max_size=30)


@settings(deadline=None)
@given(pictures, pictures, st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**40), st.integers(1, 9))
def test_every_sample_stands_exactly_once(
    first: Rows, second: Rows, batch_size: int, processes: int, seed: int, epoch: int
) -> None:
    rows = [(*row, 0) for row in first] + [(*row, 1) for row in second]
    records = [record(i, (width, height), repeats, dataset) for i, (width, height, repeats, dataset) in enumerate(rows)]
    plan = build_plan([spec_for(batch_size), spec_for(3, bucket_no_upscale=False)], records, 8, processes)
    batches = plan.epoch(seed, epoch)
    shown = Counter((sample.record, sample.repeat) for batch in batches for sample in batch.samples)
    assert shown == Counter((i, repeat) for i, one in enumerate(records) for repeat in range(one.repeats))
    assert len(batches) == plan.batches_per_epoch
    assert plan.samples_per_epoch == sum(one.repeats for one in records)
    sizes: Counter[tuple[int, tuple[int, int]]] = Counter()
    for batch in batches:
        limit = plan.global_batch_size(batch.dataset)
        assert 1 <= len(batch.samples) <= limit == (batch_size, 3)[batch.dataset] * processes
        assert {plan.records[sample.record].dataset for sample in batch.samples} == {batch.dataset}
        assert {plan.fits[sample.record].bucket for sample in batch.samples} == {batch.bucket}
        sizes[batch.dataset, batch.bucket] += len(batch.samples) < limit
    assert max(sizes.values()) <= 1
    assert plan.epoch(seed, epoch) == batches


def plan_of(count: int = 20, repeats: int = 2, processes: int = 1, batch_size: int = 2, **how: Any) -> Plan:
    records = [record(i, ((128, 128), (256, 64), (64, 256))[i % 3], repeats) for i in range(count)]
    return build_plan([spec_for(batch_size, **how)], records, 8, processes)


def test_epochs_and_seeds_differ() -> None:
    plan = plan_of()
    assert len({plan.epoch(seed, epoch) for seed in (0, 1) for epoch in (1, 2, 3)}) == 6


def test_processes_share_what_one_process_would_take() -> None:
    assert plan_of(batch_size=4, processes=1).epoch(3, 1) == plan_of(batch_size=2, processes=2).epoch(3, 1)
    assert plan_of(batch_size=4).fingerprint() == plan_of(batch_size=2, processes=2).fingerprint()


def test_steps() -> None:
    plan = plan_of(count=10, repeats=3, batch_size=4)
    assert [len(samples) for samples in plan.datasets[0].samples.values()] == [9, 12, 9]
    assert plan.batches_per_epoch == 3 + 3 + 3


@pytest.mark.parametrize(
    "change",
    [
        {"caption": "other"},
        {"repeats": 3},
        {"size": (130, 128)},
        {"file_bytes": 101},
        {"orientation": 3},
        {"key": "other.png"},
        {"is_reg": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_fingerprint_sees_what_is_trained(change: dict[str, Any]) -> None:
    plan = plan_of()
    records = [replace(plan.records[0], **change), *plan.records[1:]]
    changed = build_plan([spec_for()], records, 8, 1)
    assert changed.fingerprint() != plan.fingerprint()


def test_fingerprint_sees_settings_but_no_places() -> None:
    plan = plan_of()
    subset = spec_for().subsets[0]

    def fingerprint(spec: DatasetSpec) -> str:
        return build_plan([spec], plan.records, 8, 1).fingerprint()

    def with_subset(**change: Any) -> DatasetSpec:
        return replace(spec_for(), subsets=(replace(subset, **change),))

    same = [spec_for(), with_subset(image_dir=Path("moved")), replace(spec_for(), where="elsewhere")]
    other = [
        spec_for(3),
        with_subset(flip_aug=True),
        with_subset(random_crop=True),
        with_subset(resize_interpolation="area"),
        with_subset(caption=CaptionSpec(shuffle=True)),
    ]
    assert {fingerprint(spec) for spec in same} == {plan.fingerprint()}
    assert len({fingerprint(spec) for spec in [spec_for(), *other]}) == len(other) + 1
    moved = [replace(one, path=Path("/moved") / one.key) for one in plan.records]
    assert build_plan([spec_for()], moved, 8, 1).fingerprint() == plan.fingerprint()


def test_pictures_too_small_for_a_bucket_are_named() -> None:
    records = [record(i, (20 + i, 300), 1) for i in range(12)] + [record(99, (128, 128), 1)]
    with pytest.raises(UserError, match=r"3\.png: 23x300 has a side below bucket_reso_steps 64") as error:
        build_plan([spec_for(bucket_no_upscale=True)], records, 8, 1)
    assert len(error.value.problems) == 11
    assert "2 more" in str(error.value)


def test_sizes_are_checked_for_every_dataset() -> None:
    bad = [spec_for(bucket_reso_steps=60), replace(spec_for(enable_bucket=False), resolution=(100, 100))]
    with pytest.raises(UserError) as error:
        build_plan(bad, [], 8, 1)
    assert len(error.value.problems) == 2
