"""Which size a picture is trained at: the list of buckets, the bucket of a picture, and what is cropped away.

The numbers equal those of sd-scripts for every size that it accepts, and with `aspect_buckets` those of
invoke-training. Sizes are (width, height) in pixels. Nothing here touches pixels (data.pixels) or batches (data.plan).
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from library.errors import Problem
from library.options.specs import AspectBuckets, BucketChoice, DatasetSpec

Size = tuple[int, int]
REMEMBERED = 2**14
"""Sizes of pictures whose fit is kept."""


@dataclass(frozen=True, slots=True)
class Fit:
    """How a picture comes into its bucket: resized to cover it, then cut at (left, top).

    `crop` is the offset of a centred cut. `ar_error` is the bucket's aspect ratio minus the picture's. `cropped` is the
    fraction of the resized picture's area that is cut away.
    """

    bucket: Size
    resized: Size
    crop: tuple[int, int]
    ar_error: float
    cropped: float


@lru_cache(maxsize=64)
def bucket_list(resolution: Size, min_size: int, max_size: int, step: int) -> tuple[Size, ...]:
    """All buckets of at most the area of `resolution`, sides multiples of `step` within the limits, ascending.

    Empty where a square of that area is smaller than `step`.
    """
    area = resolution[0] * resolution[1]
    side = int(math.sqrt(area) // step) * step
    if side == 0:
        return ()
    found = {(side, side)}
    for width in range(min_size, max_size + 1, step):
        if width == 0:
            continue
        height = min(max_size, area // width // step * step)
        if height >= min_size and height > 0:
            found |= {(width, height), (height, width)}
    return tuple(sorted(found))


@lru_cache(maxsize=64)
def aspect_bucket_list(wanted: AspectBuckets) -> tuple[Size, ...]:
    """invoke-training's buckets, ascending: for each height from `start` to `end` the width that gives the area of
    `target` x `target`, rounded down to the step, and the same turned. Sides that would be 0 are left out."""
    area = wanted.target**2
    found = set()
    for height in range(wanted.start, wanted.end + 1, wanted.step):
        width = area // height // wanted.step * wanted.step if height > 0 else 0
        if width > 0:
            found |= {(width, height), (height, width)}
    return tuple(sorted(found))


def check(spec: DatasetSpec, vae_factor: int) -> list[Problem]:
    """What a dataset's sizes ask of this VAE and can't have; limits and steps were checked with the options.

    `vae_factor` is the side in pixels of one latent value; every side that is trained must be a multiple of it.
    """
    where, step, (width, height) = spec.where or "dataset", spec.bucket_reso_steps, spec.resolution
    if spec.aspect_buckets is not None:
        return [
            Problem(where, f"aspect_ratio_buckets: {wrong}", advice)
            for wrong, advice in _wrong_aspects(spec.aspect_buckets, spec.bucket_no_upscale, vae_factor)
        ]
    if spec.enable_bucket:
        if step % vae_factor:
            advice = f"use a multiple of {vae_factor}, such as {_nearest(step, vae_factor)}"
            return [Problem(where, f"bucket_reso_steps {step} is no multiple of the VAE's factor {vae_factor}", advice)]
        if width * height < step**2:
            wrong = f"resolution {width}x{height} is smaller than a bucket of bucket_reso_steps {step}"
            return [Problem(where, wrong, f"use a resolution of {step} or more, or smaller steps")]
        return []
    if width % vae_factor == 0 and height % vae_factor == 0:
        return []
    near = [_nearest(side, vae_factor) for side in (width, height)]
    advice = f"use {near[0]},{near[1]}, or --enable_bucket"
    return [Problem(where, f"resolution {width}x{height} is no multiple of {vae_factor}", advice)]


def _nearest(length: int, step: int) -> int:
    """The multiple of `step` nearest to a length, at least one."""
    return max(1, round(length / step)) * step


def _wrong_aspects(wanted: AspectBuckets, no_upscale: bool, vae_factor: int) -> list[tuple[str, str]]:
    """What can't be done about aspect buckets, each with what to write instead."""
    target, start, end, step = wanted.target, wanted.start, wanted.end, wanted.step
    if min(target, start, end, step) < 1:
        return [(f"{target}, {start}, {end}, {step} are not all above 0", "use 512, 256, 1024, 64, for instance")]
    if step % vae_factor:
        wrong = f"the step {step} is no multiple of the VAE's factor {vae_factor}, so neither are all sides"
        return [(wrong, f"use a multiple of {vae_factor}, such as {_nearest(step, vae_factor)}")]
    found = [
        (f"{name} {length} is no multiple of the step {step}", f"use {_nearest(length, step)}")
        for name, length in (("target", target), ("start", start), ("end", end))
        if length % step
    ]
    if start > end:
        found.append((f"start {start} is above end {end}", f"use start {end}, end {start}"))
    elif not found and target**2 // end < step:
        longest = target**2 // step // step * step
        wrong = f"beside a side of {end}, the other would be shorter than {step} for {target}x{target} pixels"
        found.append((wrong, f"use an end of at most {longest}" + (" and a start below it" if start > longest else "")))
    if no_upscale:
        found.append(
            ("they are a list of sizes, while bucket_no_upscale makes sizes of its own", "leave one of them out")
        )
    return found


def fit(size: Size, spec: DatasetSpec, vae_factor: int) -> Fit:
    """The bucket, resized size and cut of a picture of upright `size`; remembered by size.

    Raises:
        ValueError: with `bucket_no_upscale`, a side is shorter than the step; or the spec fails `check`.
    """
    return _fit(
        size,
        vae_factor,
        spec.resolution,
        spec.enable_bucket,
        spec.min_bucket_reso,
        spec.max_bucket_reso,
        spec.bucket_reso_steps,
        spec.bucket_no_upscale,
        spec.aspect_buckets,
        spec.bucket_choice,
    )


@lru_cache(maxsize=REMEMBERED)
def _fit(
    size: Size,
    vae_factor: int,
    resolution: Size,
    enabled: bool,
    min_size: int,
    max_size: int,
    step: int,
    no_upscale: bool,
    aspects: AspectBuckets | None,
    choice: BucketChoice,
) -> Fit:
    """`fit`, with what it needs of a spec."""
    if min(size) < 1:
        raise ValueError(f"{size[0]}x{size[1]} has no pixels")
    if aspects is None and not enabled:
        return _cover(size, resolution)
    if aspects is not None:
        step = aspects.step
    if step < 1 or step % vae_factor:
        raise ValueError(f"sides in steps of {step} are no multiples of {vae_factor}")
    if no_upscale and aspects is None:
        return _shrink_only(size, resolution[0] * resolution[1], step)
    return _cover(size, _choices(resolution, min_size, max_size, step, aspects, choice).of(size))


class _Choices:
    """Buckets by their shape, so that a picture's is found without looking at all of them."""

    def __init__(self, buckets: Sequence[Size], choice: BucketChoice) -> None:
        if not buckets:
            raise ValueError("no bucket is possible with these sizes and steps")
        self._buckets = frozenset(buckets)
        self._by_logarithm = choice == "log_ratio"
        firsts: dict[float, tuple[int, Size]] = {}
        for place, bucket in enumerate(buckets):
            firsts.setdefault(self._shape(bucket), (place, bucket))
        self._shapes = sorted(firsts)
        self._firsts = [firsts[shape] for shape in self._shapes]

    def _shape(self, size: Size) -> float:
        return math.log(size[0] / size[1]) if self._by_logarithm else size[0] / size[1]

    def of(self, size: Size) -> Size:
        """The bucket of just this size, else the first with the nearest shape."""
        if size in self._buckets:
            return size
        shape = self._shape(size)
        after = bisect_left(self._shapes, shape)
        near = range(max(0, after - 1), min(after + 1, len(self._shapes)))
        return min((abs(self._shapes[i] - shape), *self._firsts[i]) for i in near)[2]


@lru_cache(maxsize=64)
def _choices(
    resolution: Size, min_size: int, max_size: int, step: int, aspects: AspectBuckets | None, choice: BucketChoice
) -> _Choices:
    if aspects is not None:
        return _Choices(aspect_bucket_list(aspects), choice)
    return _Choices(bucket_list(resolution, min_size, max_size, step), choice)


def _cover(size: Size, bucket: Size) -> Fit:
    (width, height), (bucket_width, bucket_height) = size, bucket
    wide = width / height > bucket_width / bucket_height
    scale = bucket_height / height if wide else bucket_width / width
    return _cut(size, (int(width * scale + 0.5), int(height * scale + 0.5)), bucket)


def _shrink_only(size: Size, area: int, step: int) -> Fit:
    """A bucket of the picture's own: shrunk to `area` if it is larger, each side floored to the step."""
    width, height = size
    aspect = width / height
    resized = size
    if width * height > area:
        ideal_width = math.sqrt(area * aspect)
        ideal_height = area / ideal_width
        by_width = _floor(ideal_width, step)
        its_height = _floor(by_width / aspect, step)
        by_height = _floor(ideal_height, step)
        its_width = _floor(by_height * aspect, step)
        if 0 in (its_height, by_height):
            raise ValueError(f"{width}x{height} is too narrow for buckets of {step} px")
        if abs(by_width / its_height - aspect) < abs(its_width / by_height - aspect):
            resized = (by_width, int(by_width / aspect + 0.5))
        else:
            resized = (int(by_height * aspect + 0.5), by_height)
    bucket = (resized[0] // step * step, resized[1] // step * step)
    if 0 in bucket:
        raise ValueError(f"{width}x{height} has a side below bucket_reso_steps {step}")
    return _cut(size, resized, bucket)


def _floor(length: float, step: int) -> int:
    """Rounded to whole pixels, then floored to the step."""
    return int(length + 0.5) // step * step


def _cut(size: Size, resized: Size, bucket: Size) -> Fit:
    left, top = (resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2
    cropped = 1 - bucket[0] * bucket[1] / (resized[0] * resized[1])
    return Fit(bucket, resized, (left, top), bucket[0] / bucket[1] - size[0] / size[1], cropped)


def legacy_crop(size: Size, bucket: Size) -> tuple[float, float, float, float]:
    """The (left, top, right, bottom) that sd-scripts writes into caches and feeds to SDXL, in pixels of the bucket.

    It is that of a picture fitted into the bucket, not the real cut; kept for the sake of existing files.
    """
    aspect = size[0] / size[1]
    if bucket[0] / bucket[1] > aspect:
        width, height = bucket[1] * aspect, float(bucket[1])
    else:
        width, height = float(bucket[0]), bucket[0] / aspect
    left, top = (bucket[0] - width) // 2, (bucket[1] - height) // 2
    return left, top, left + width, top + height
