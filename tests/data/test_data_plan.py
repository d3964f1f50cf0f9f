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
    return ImageRecord(Path("x"), name, size, 1, f"caption {number}", True, dataset, 0, repeats, False, 100)


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


@settings(deadline=None, max_examples=40)
@given(pictures, st.integers(1, 7), st.integers(0, 2**40))
def test_three_epochs_show_every_sample_three_times(rows: Rows, global_batch: int, seed: int) -> None:
    records = [record(i, (width, height), repeats) for i, (width, height, repeats) in enumerate(rows)]
    shown: Counter[tuple[int, int]] = Counter()
    orders = set()
    for processes in [n for n in (1, 2, 3) if global_batch % n == 0]:
        plan = build_plan([spec_for(global_batch // processes)], records, 8, processes)
        epochs = tuple(plan.epoch(seed, epoch) for epoch in (1, 2, 3))
        assert all({plan.fits[s.record].bucket for s in b.samples} == {b.bucket} for e in epochs for b in e)
        shown = Counter((s.record, s.repeat) for batches in epochs for batch in batches for s in batch.samples)
        assert shown == Counter({(i, repeat): 3 for i, one in enumerate(records) for repeat in range(one.repeats)})
        orders.add(epochs)
    assert len(orders) == 1


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
        {"subset": 1},
        {"mask": "/masks/0.png", "mask_bytes": 10},
    ],
    ids=lambda change: next(iter(change)),
)
def test_fingerprint_sees_what_is_trained(change: dict[str, Any]) -> None:
    plan = plan_of()
    records = [replace(plan.records[0], **change), *plan.records[1:]]
    spec = replace(spec_for(), subsets=spec_for().subsets * 2)
    changed = build_plan([spec], records, 8, 1)
    assert changed.fingerprint() != plan.fingerprint()


def test_fingerprint_sees_settings_but_no_places() -> None:
    plan = plan_of()
    subset = spec_for().subsets[0]

    def fingerprint(spec: DatasetSpec) -> str:
        return build_plan([spec], plan.records, 8, 1).fingerprint()

    def with_subset(**change: Any) -> DatasetSpec:
        return replace(spec_for(), subsets=(replace(subset, **change),))

    same = [
        spec_for(),
        with_subset(image_dir=Path("moved")),
        with_subset(metadata_file=Path("moved.json"), where="elsewhere", mask_dir=Path("moved")),
        replace(spec_for(), where="elsewhere"),
    ]
    other = [
        spec_for(3),
        replace(spec_for(), network_multiplier=0.5),
        with_subset(flip_aug=True),
        with_subset(random_crop=True),
        with_subset(resize_interpolation="area"),
        with_subset(color_aug=True),
        with_subset(alpha_mask=True),
        with_subset(face_crop_aug_range=(1.0, 2.0)),
        with_subset(custom_attributes={"diff_output_preservation": True}),
        with_subset(caption=CaptionSpec(shuffle=True)),
        with_subset(caption=CaptionSpec(templates=("a photo of {}",))),
        with_subset(caption=CaptionSpec(warmup_step=0.5)),
    ]
    assert {fingerprint(spec) for spec in same} == {plan.fingerprint()}
    assert len({fingerprint(spec) for spec in [spec_for(), *other]}) == len(other) + 1
    moved = [replace(one, folder=Path("/moved")) for one in plan.records]
    assert build_plan([spec_for()], moved, 8, 1).fingerprint() == plan.fingerprint()


def test_pictures_too_small_for_a_bucket_are_named() -> None:
    records = [record(i, (20 + i, 300), 1) for i in range(12)] + [record(99, (128, 128), 1)]
    with pytest.raises(UserError, match=r"3\.png: 23x300 has a side below bucket_reso_steps 64") as error:
        build_plan([spec_for(bucket_no_upscale=True)], records, 8, 1)
    assert len(error.value.problems) == 11
    assert "2 more" in str(error.value)


def test_small_pictures_are_left_out_when_that_is_asked_for() -> None:
    records = [record(i, (20 + i, 300), 1) for i in range(12)] + [record(99, (128, 128), 2)]
    plan = build_plan([spec_for(bucket_no_upscale=True)], records, 8, 1, skip_small=True)
    assert [one.key for one in plan.records] == ["99.png"]
    assert plan.samples_per_epoch == 2
    assert len(plan.left_out) == 11
    assert "0.png: 20x300 has a side below" in plan.left_out[0]
    assert "2 more of 12" in plan.left_out[-1]
    with pytest.raises(UserError, match="2 more of 12"):
        build_plan([spec_for(bucket_no_upscale=True)], records[:12], 8, 1, skip_small=True)


def test_joined_plans_keep_their_records_and_specs() -> None:
    first, second = plan_of(count=4), plan_of(count=3, batch_size=5)
    both = first.joined(second)
    assert [one.key for one in both.records] == [one.key for one in (*first.records, *second.records)]
    assert both.fits == first.fits + second.fits
    for i, one in enumerate(both.records):
        owner = both.datasets[one.dataset]
        assert owner.records[i - owner.first] is one
        assert owner.spec.batch_size == (2 if i < 4 else 5)
    shown = {sample.record for batch in both.epoch(0, 1) for sample in batch.samples}
    assert shown == set(range(7))
    with pytest.raises(ValueError, match="can't be joined"):
        first.joined(plan_of(processes=2))


def test_sizes_are_checked_for_every_dataset() -> None:
    bad = [spec_for(bucket_reso_steps=60), replace(spec_for(enable_bucket=False), resolution=(100, 100))]
    with pytest.raises(UserError) as error:
        build_plan(bad, [], 8, 1)
    assert len(error.value.problems) == 2
