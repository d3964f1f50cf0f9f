"""Buckets equal those of sd-scripts, number by number (buckets.json and crop_ltrb.json were made by running it)."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from library.data.buckets import bucket_list, check, fit, legacy_crop
from library.options.specs import DatasetSpec

HERE = Path(__file__).parent
CONFIGURATIONS = json.loads((HERE / "buckets.json").read_text())
CROPS = json.loads((HERE / "crop_ltrb.json").read_text())


def spec_of(configuration: dict) -> DatasetSpec:
    return DatasetSpec(
        batch_size=1,
        resolution=tuple(configuration["max_reso"]),
        subsets=(),
        enable_bucket=True,
        min_bucket_reso=configuration["min_size"],
        max_bucket_reso=configuration["max_size"],
        bucket_reso_steps=configuration["reso_steps"],
        bucket_no_upscale=configuration["no_upscale"],
    )


@pytest.mark.parametrize(
    "configuration", [c for c in CONFIGURATIONS if "buckets" in c], ids=lambda c: str(c["max_reso"])
)
def test_bucket_lists(configuration: dict) -> None:
    spec = spec_of(configuration)
    found = bucket_list(spec.resolution, spec.min_bucket_reso, spec.max_bucket_reso, spec.bucket_reso_steps)
    assert [list(bucket) for bucket in found] == configuration["buckets"]


@pytest.mark.parametrize("number", range(len(CONFIGURATIONS)))
def test_the_bucket_of_each_size(number: int) -> None:
    spec = spec_of(CONFIGURATIONS[number])
    for image in CONFIGURATIONS[number]["images"]:
        if "error" in image:
            with pytest.raises(ValueError, match="1x1 has a side below bucket_reso_steps"):
                fit((1, 1), spec, 8)
            continue
        found = fit(tuple(image["size"]), spec, 8)
        assert [list(found.bucket), list(found.resized), found.ar_error] == [
            image["bucket"],
            image["resized"],
            image["ar_error"],
        ], image["size"]


def test_legacy_crops() -> None:
    for row in CROPS:
        assert list(legacy_crop(tuple(row["size"]), tuple(row["bucket"]))) == row["crop_ltrb"], row


def test_counts_of_verified_lists() -> None:
    assert [len(bucket_list((s, s), low, high, 64)) for s, low, high in ((512, 256, 1024), (768, 256, 1024))] == [
        17,
        19,
    ]
    assert [len(bucket_list((1024, 1024), low, 2048, 64)) for low in (256, 512)] == [41, 33]


@pytest.mark.parametrize(
    ("size", "bucket", "resized", "crop"),
    [((1920, 1080), (1344, 768), (1365, 768), (10, 0)), ((1080, 1920), (768, 1344), (768, 1365), (0, 10))],
)
def test_centred_cut(
    size: tuple[int, int], bucket: tuple[int, int], resized: tuple[int, int], crop: tuple[int, int]
) -> None:
    spec = DatasetSpec(1, (1024, 1024), (), enable_bucket=True, max_bucket_reso=2048)
    found = fit(size, spec, 8)
    assert (found.bucket, found.resized, found.crop) == (bucket, resized, crop)
    assert found.cropped == pytest.approx(1 - 1344 * 768 / (1365 * 768))


def test_without_buckets_every_picture_covers_the_resolution() -> None:
    spec = DatasetSpec(1, (96, 64), ())
    assert (fit((300, 100), spec, 8).bucket, fit((300, 100), spec, 8).resized) == ((96, 64), (192, 64))
    assert fit((10, 10), spec, 8).resized == (96, 96)


sides = st.integers(1, 6000)


@examples(deadline=None)
@given(st.tuples(sides, sides), st.booleans(), st.sampled_from([8, 16, 32, 64]), st.booleans())
def test_a_fit_covers_its_bucket(size: tuple[int, int], no_upscale: bool, step: int, enabled: bool) -> None:
    spec = DatasetSpec(
        1,
        (512, 384),
        (),
        enabled,
        min_bucket_reso=256,
        max_bucket_reso=1024,
        bucket_reso_steps=step,
        bucket_no_upscale=no_upscale,
    )
    try:
        found = fit(size, spec, 8)
    except ValueError:
        assert no_upscale
        assert min(size) < step or max(size) / min(size) > 10
        return
    (left, top), (width, height) = found.crop, found.bucket
    assert width % 8 == 0
    assert height % 8 == 0
    assert 0 <= left <= found.resized[0] - width
    assert 0 <= top <= found.resized[1] - height
    assert 0 <= found.cropped < 1
    if enabled and no_upscale:
        assert found.resized[0] <= size[0] + 1
        assert found.resized[1] <= size[1] + 1


def wrong(factor: int = 8, **settings: Any) -> str:
    problems = check(DatasetSpec(**{"batch_size": 1, "resolution": (512, 512), "subsets": (), **settings}), factor)
    return "\n".join(map(str, problems))


def test_sizes_that_the_vae_cannot_take() -> None:
    assert "resolution 510x512 is no multiple of 8; use 512,512" in wrong(resolution=(510, 512))
    assert "bucket_reso_steps 20 is no multiple of the VAE's factor 8; use a multiple of 8" in wrong(
        enable_bucket=True, bucket_reso_steps=20
    )
    assert not wrong(enable_bucket=True, bucket_reso_steps=20, factor=4)
    assert not wrong(resolution=(510, 512), enable_bucket=True)
