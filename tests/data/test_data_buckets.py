"""Buckets equal those of sd-scripts, number by number (buckets.json and crop_ltrb.json were made by running it)."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from library.data.buckets import Size, aspect_bucket_list, bucket_list, check, fit, legacy_crop
from library.options.specs import AspectBuckets, BucketChoice, DatasetSpec

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


def nearest(size: Size, buckets: tuple[Size, ...], choice: BucketChoice) -> Size:
    """The plain rule: the bucket of just this size, else the first of those with the nearest shape."""

    def off(bucket: Size) -> float:
        shapes = [side[0] / side[1] for side in (bucket, size)]
        return abs(math.log(shapes[0]) - math.log(shapes[1]) if choice == "log_ratio" else shapes[0] - shapes[1])

    return size if size in buckets else min(buckets, key=off)


lists = st.tuples(
    st.tuples(st.integers(64, 1100), st.integers(64, 1100)),
    st.sampled_from([0, 64, 256, 512]),
    st.sampled_from([512, 768, 2048]),
    st.sampled_from([8, 32, 64]),
)


@examples(deadline=None, max_examples=300)
@given(st.tuples(sides, sides), lists, st.sampled_from(["ratio", "log_ratio"]))
def test_the_first_nearest_bucket_is_chosen(
    size: Size, limits: tuple[Size, int, int, int], choice: BucketChoice
) -> None:
    buckets = bucket_list(*limits)
    resolution, low, high, step = limits
    spec = DatasetSpec(1, resolution, (), True, low, high, step, bucket_choice=choice)
    assert fit(size, spec, 8).bucket == nearest(size, buckets, choice)


def test_a_picture_that_is_a_bucket_stays_as_it_is() -> None:
    """Also where another bucket of its shape comes first."""
    spec = DatasetSpec(1, (1024, 1024), (), True, 256, 512)
    assert [fit(size, spec, 8).bucket for size in ((1024, 1024), (1025, 1025))] == [(1024, 1024), (512, 512)]


def test_a_step_larger_than_the_area_leaves_no_bucket() -> None:
    assert bucket_list((40, 60), 64, 128, 64) == ()
    with pytest.raises(ValueError, match="no bucket is possible"):
        fit((64, 64), DatasetSpec(1, (40, 60), (), True), 8)


def test_the_logarithm_treats_both_orientations_alike() -> None:
    ratio, log = (DatasetSpec(1, (512, 512), (), True, bucket_choice=choice) for choice in ("ratio", "log_ratio"))
    sizes = [(400 + 7 * i, 900) for i in range(200)]
    turned = [
        [fit(size, spec, 8).bucket == fit(size[::-1], spec, 8).bucket[::-1] for size in sizes] for spec in (ratio, log)
    ]
    assert all(turned[1])
    assert not all(turned[0])


def aspects(*numbers: int, choice: BucketChoice = "ratio") -> DatasetSpec:
    return DatasetSpec(1, (512, 512), (), True, aspect_buckets=AspectBuckets(*numbers), bucket_choice=choice)


def test_buckets_of_invoke() -> None:
    """For each height the width that gives at most the target's area, and both turned."""
    assert aspect_bucket_list(AspectBuckets(512, 512, 704, 64)) == (
        (320, 704), (384, 640), (448, 576), (512, 512), (576, 448), (640, 384), (704, 320),
    )  # fmt: skip
    assert aspect_bucket_list(AspectBuckets(512, 256, 320, 64)) == ((256, 1024), (320, 768), (768, 320), (1024, 256))
    assert fit((1920, 1080), aspects(512, 512, 704, 64), 8).bucket == (640, 384)
    assert fit((1080, 1920), aspects(512, 512, 704, 64), 8).bucket == (384, 640)
    assert not check(aspects(512, 512, 704, 64), 8)


@examples(deadline=None, max_examples=300)
@given(
    st.tuples(sides, sides),
    st.tuples(st.integers(1, 32), st.integers(1, 64), st.integers(1, 64)),
    st.sampled_from([8, 16, 64]),
    st.sampled_from(["ratio", "log_ratio"]),
)
def test_aspect_buckets_that_pass_the_check_work(
    size: Size, steps: tuple[int, int, int], step: int, choice: BucketChoice
) -> None:
    spec = aspects(*(number * step for number in steps), step, choice=choice)
    wanted = spec.aspect_buckets
    assert wanted is not None
    problems = check(spec, 8)
    buckets = aspect_bucket_list(wanted)
    heights = range(wanted.start, wanted.end + 1, step)
    complete = bool(heights) and all(wanted.target**2 // height >= step for height in heights)
    assert bool(problems) != complete
    assert all(min(bucket) >= step and not any(side % step for side in bucket) for bucket in buckets)
    assert {bucket[::-1] for bucket in buckets} == set(buckets)
    if complete:
        assert {(wanted.target**2 // height // step * step, height) for height in heights} <= set(buckets)
        assert fit(size, spec, 8).bucket == nearest(size, buckets, choice)


@examples(deadline=None, max_examples=400)
@given(
    st.tuples(st.integers(0, 5000), st.integers(0, 5000)),
    st.tuples(st.integers(1, 1100), st.integers(1, 1100)),
    st.integers(0, 300),
    st.integers(0, 1100),
    st.integers(0, 70),
    st.booleans(),
    st.booleans(),
    st.sampled_from([4, 8]),
    st.one_of(st.none(), st.builds(AspectBuckets, *[st.integers(0, 300)] * 3, st.integers(0, 70))),
)
def test_no_size_and_no_setting_divides_by_zero(
    size: Size,
    resolution: Size,
    low: int,
    high: int,
    step: int,
    enabled: bool,
    no_upscale: bool,
    factor: int,
    wanted: AspectBuckets | None,
) -> None:
    spec = DatasetSpec(1, resolution, (), enabled, low, high, step, no_upscale, aspect_buckets=wanted)
    try:
        found = fit(size, spec, factor)
    except ValueError as error:
        words = ("has no pixels", "sides in steps of", "no bucket is possible", "too narrow", "has a side below")
        assert any(word in str(error) for word in words), error
        return
    assert min(found.bucket) > 0
    assert all(resized >= side for resized, side in zip(found.resized, found.bucket, strict=True))
    assert 0 <= found.cropped < 1


def test_the_fit_of_a_size_is_remembered_by_what_decides_it() -> None:
    spec = DatasetSpec(1, (512, 512), (), True)
    one = fit((700, 500), spec, 8)
    assert fit((700, 500), DatasetSpec(9, (512, 512), (), True, network_multiplier=0.5), 8) is one
    for other in (
        DatasetSpec(1, (768, 512), (), True),
        DatasetSpec(1, (512, 512), ()),
        DatasetSpec(1, (512, 512), (), True, bucket_reso_steps=16),
        DatasetSpec(1, (512, 512), (), True, bucket_no_upscale=True),
        aspects(512, 256, 320, 64),
    ):
        assert fit((700, 500), other, 8) != one


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
    assert "resolution 40x60 is smaller than a bucket of bucket_reso_steps 64; use a resolution of 64 or more" in wrong(
        enable_bucket=True, resolution=(40, 60)
    )
    assert not wrong(enable_bucket=True, resolution=(32, 128))


@pytest.mark.parametrize(
    ("numbers", "said", "instead"),
    [
        ((512, 256, 1024, 20), "the step 20 is no multiple of the VAE's factor 8", "use a multiple of 8, such as 16"),
        ((512, 256, 1024, 4), "the step 4 is no multiple", "such as 8"),
        ((520, 256, 1024, 64), "target 520 is no multiple of the step 64", "use 512"),
        ((512, 100, 1024, 64), "start 100 is no multiple of the step 64", "use 128"),
        ((512, 4, 1024, 8), "start 4 is no multiple of the step 8", "use 8"),
        ((512, 256, 1000, 64), "end 1000 is no multiple of the step 64", "use 1024"),
        ((512, 768, 256, 64), "start 768 is above end 256", "use start 256, end 768"),
        ((512, 256, 8192, 64), "beside a side of 8192, the other would be shorter than 64", "an end of at most 4096"),
        ((64, 128, 192, 64), "beside a side of 192, the other", "an end of at most 64 and a start below it"),
        ((512, 0, 1024, 64), "512, 0, 1024, 64 are not all above 0", "use 512, 256, 1024, 64, for instance"),
    ],
)
def test_aspect_buckets_that_cannot_be(numbers: tuple[int, int, int, int], said: str, instead: str) -> None:
    (problem,) = check(aspects(*numbers), 8)
    assert problem.wrong.startswith("aspect_ratio_buckets: ")
    assert said in problem.wrong
    assert instead in problem.advice


def test_every_number_of_aspect_buckets_is_complained_about() -> None:
    assert len(check(aspects(500, 100, 1000, 64), 8)) == 3
    both = DatasetSpec(1, (512, 512), (), bucket_no_upscale=True, aspect_buckets=AspectBuckets(512, 256, 1024, 64))
    assert "bucket_no_upscale" in check(both, 8)[0].wrong


def test_narrow_pictures_without_enlarging_as_sd_scripts_takes_them(make_spec: Callable) -> None:
    """Only a height of 0 can't be divided by there; a width of 0 is a candidate that loses."""
    spec = make_spec(resolution=(512, 512), enable_bucket=True, bucket_no_upscale=True, bucket_reso_steps=64)
    found = fit((298, 19298), spec, 8)
    assert (found.bucket, found.resized) == ((64, 4096), (64, 4145))
