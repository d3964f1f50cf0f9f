"""What SDXL models are told about sizes and cuts: sd-scripts' numbers by default, the true ones where asked."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from library.data.augment import Augmentation
from library.data.buckets import Fit, fit
from library.data.caches.latents import LatentCache
from library.data.loader import Batch, Loader
from library.data.plan import Plan, build_plan
from library.data.sizes import estimated, exact
from library.data.sources import scan as sources
from library.options.specs import DatasetSpec

MakePicture = Callable[..., Path]
MakeSpec = Callable[..., DatasetSpec]

LEGACY = json.loads((Path(__file__).parent / "crop_ltrb.json").read_text(encoding="utf-8"))


def in_bucket(bucket: tuple[int, int], resized: tuple[int, int] | None = None) -> Fit:
    return Fit(bucket, resized or bucket, (0, 0), 0.0, 0.0)


@pytest.mark.parametrize("row", LEGACY, ids=lambda row: f"{row['size']}-{row['bucket']}")
def test_estimates_are_those_of_sd_scripts(row: dict[str, Any]) -> None:
    (width, height), bucket = row["size"], tuple(row["bucket"])
    left, top, right, _ = row["crop_ltrb"]
    plain = estimated((width, height), in_bucket(bucket), Augmentation(False, (5, 7), bucket))
    assert plain == (height, width, int(top), int(left), bucket[1], bucket[0])
    mirrored = estimated((width, height), in_bucket(bucket), Augmentation(True, (5, 7), bucket))
    assert mirrored == (height, width, int(top), int(bucket[0] - right), bucket[1], bucket[0])


def test_a_wide_picture_by_hand() -> None:
    spec = DatasetSpec(1, (512, 512), (), enable_bucket=True)
    found = fit((1920, 1080), spec, 8)
    assert (found.bucket, found.resized, found.crop) == ((640, 384), (683, 384), (21, 0))
    for flip, left in ((False, 21), (True, 683 - 21 - 640)):
        assert estimated((1920, 1080), found, Augmentation(flip, found.crop, found.resized)) == (
            1080,
            1920,
            12,
            0,
            384,
            640,
        )
        assert exact((1920, 1080), found, Augmentation(flip, found.crop, found.resized)) == (
            1080,
            1920,
            0,
            left,
            384,
            640,
        )


@given(
    bucket=st.tuples(st.integers(8, 100), st.integers(8, 100)),
    room=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    data=st.data(),
)
def test_a_mirrored_cut_lies_where_the_cut_lies_in_the_mirrored_picture(
    bucket: tuple[int, int], room: tuple[int, int], data: st.DataObject
) -> None:
    resized = (bucket[0] + room[0], bucket[1] + room[1])
    left, top = data.draw(st.integers(0, room[0])), data.draw(st.integers(0, room[1]))
    columns = np.arange(resized[0])
    seen = columns[left : left + bucket[0]][::-1]
    numbers = exact((50, 60), in_bucket(bucket, resized), Augmentation(True, (left, top), resized))
    assert numbers[:3] == (60, 50, top)
    assert np.array_equal(columns[::-1][numbers[3] : numbers[3] + bucket[0]], seen)


def write_map(path: Path, size: tuple[int, int]) -> None:
    """A picture in which every pixel's red is its column and green its row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.arange(width)[None, :]
    pixels[..., 1] = np.arange(height)[:, None]
    Image.fromarray(pixels).save(path)


def batches(plan: Plan, **how: Any) -> list[Batch]:
    return [batch for epoch in (1, 2, 3) for batch in Loader(plan, seed=3, **how).epoch(epoch)]


@pytest.mark.parametrize("random_crop", [False, True])
def test_exact_numbers_are_where_the_pixels_come_from(tmp_path: Path, make_spec: MakeSpec, random_crop: bool) -> None:
    for name, size in {"a": (101, 64), "b": (64, 75), "c": (150, 64)}.items():
        write_map(tmp_path / "maps" / f"{name}.png", size)
    spec = make_spec(tmp_path / "maps", enable_bucket=False, num_repeats=4, flip_aug=True, random_crop=random_crop)
    plan = build_plan([spec], sources.scan([spec]).records, 8, 1)
    sizes = {str(record.path): record.size for record in plan.records}
    mirrored, seen = 0, set()
    for batch in batches(plan, exact_crops=True):
        assert batch.sizes.dtype == torch.float32
        assert batch.pixels is not None
        for name, row, picture in zip(batch.names, batch.sizes.tolist(), batch.pixels, strict=True):
            width, height = sizes[name]
            levels = ((picture + 1) * 127.5).round().int()
            columns, rows = levels[0, 0], levels[1, :, 0]
            flip = bool(columns[0] > columns[-1])
            left = width - 1 - int(columns[0]) if flip else int(columns[0])
            assert row == [height, width, int(rows[0]), left, 64, 64]
            mirrored += flip
            seen.add((name, left))
    assert 0 < mirrored < 36
    assert len(seen) > 8 if random_crop else len(seen) <= 6


def test_numbers_are_the_same_with_cached_latents(
    tmp_path: Path, make_picture: MakePicture, make_spec: MakeSpec
) -> None:
    for i, size in enumerate([(120, 33), (64, 64), (70, 71), (33, 110)]):
        make_picture(tmp_path / "cats" / f"p{i}.png", size, orientation=6 if i == 3 else 1)
    spec = make_spec(tmp_path / "cats", num_repeats=3, flip_aug=True)
    plan = build_plan([spec], sources.scan([spec]).records, 8, 1)
    encode = torch.nn.AvgPool2d(8)
    store = LatentCache.build(
        plan, lambda pixels: encode(torch.cat([pixels, pixels[:, :1]], 1)), vae_id="v", to_disk=False
    )
    for exact_crops in (False, True):
        plain = batches(plan, exact_crops=exact_crops)
        for one, other in zip(plain, batches(plan, exact_crops=exact_crops, latents=store), strict=True):
            assert torch.equal(one.sizes, other.sizes)
    for batch in batches(plan):
        records = [next(r for r in plan.records if str(r.path) == name) for name in batch.names]
        assert batch.sizes[:, :2].tolist() == [[float(r.size[1]), float(r.size[0])] for r in records]
        assert batch.sizes[:, 4:].tolist() == [[float(batch.bucket[1]), float(batch.bucket[0])]] * len(records)


def test_a_process_without_samples_has_no_rows(tmp_path: Path, make_picture: MakePicture, make_spec: MakeSpec) -> None:
    make_picture(tmp_path / "a.png")
    spec = make_spec(tmp_path)
    plan = build_plan([spec], sources.scan([spec]).records, 8, 2)
    (batch,) = Loader(plan, seed=0, rank=1, world_size=2).epoch(1)
    assert batch.sizes.shape == (0, 6)
