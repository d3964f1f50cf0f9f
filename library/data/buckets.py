"""Which size a picture is trained at: the list of buckets, the bucket of a picture, and what is cropped away.

The numbers equal those of sd-scripts for every size that it accepts. Sizes are (width, height) in pixels. Nothing here
touches pixels (data.pixels) or batches (data.plan).
"""

import math
from dataclasses import dataclass
from functools import lru_cache

from library.errors import Problem
from library.options.specs import DatasetSpec

Size = tuple[int, int]


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
    """All buckets of at most the area of `resolution`, sides multiples of `step` within the limits, ascending."""
    area = resolution[0] * resolution[1]
    side = int(math.sqrt(area) // step) * step
    found = {(side, side)}
    for width in range(min_size, max_size + 1, step):
        if width == 0:
            continue
        height = min(max_size, area // width // step * step)
        if height >= min_size and height > 0:
            found |= {(width, height), (height, width)}
    return tuple(sorted(found))


def check(spec: DatasetSpec, vae_factor: int) -> list[Problem]:
    """What a dataset's sizes ask of this VAE and can't have; limits and steps were checked with the options.

    `vae_factor` is the side in pixels of one latent value; every side that is trained must be a multiple of it.
    """
    where, step, (width, height) = spec.where or "dataset", spec.bucket_reso_steps, spec.resolution
    if spec.enable_bucket:
        if step % vae_factor == 0:
            return []
        advice = f"use a multiple of {vae_factor}, such as {max(1, round(step / vae_factor)) * vae_factor}"
        return [Problem(where, f"bucket_reso_steps {step} is no multiple of the VAE's factor {vae_factor}", advice)]
    if width % vae_factor == 0 and height % vae_factor == 0:
        return []
    near = [max(vae_factor, round(side / vae_factor) * vae_factor) for side in (width, height)]
    advice = f"use {near[0]},{near[1]}, or --enable_bucket"
    return [Problem(where, f"resolution {width}x{height} is no multiple of {vae_factor}", advice)]


def fit(size: Size, spec: DatasetSpec, vae_factor: int) -> Fit:
    """The bucket, resized size and cut of a picture of upright `size`.

    Raises:
        ValueError: with `bucket_no_upscale`, a side is shorter than the step; or the spec fails `check`.
    """
    if not spec.enable_bucket:
        return _cover(size, spec.resolution)
    if spec.bucket_reso_steps % vae_factor:
        raise ValueError(f"bucket_reso_steps {spec.bucket_reso_steps} is no multiple of {vae_factor}")
    if spec.bucket_no_upscale:
        return _shrink_only(size, spec.resolution[0] * spec.resolution[1], spec.bucket_reso_steps)
    buckets = bucket_list(spec.resolution, spec.min_bucket_reso, spec.max_bucket_reso, spec.bucket_reso_steps)
    if size in buckets:
        return _cover(size, size)
    aspect = size[0] / size[1]
    return _cover(size, min(buckets, key=lambda bucket: abs(bucket[0] / bucket[1] - aspect)))


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
        if min(by_width, its_height, by_height, its_width) == 0:
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
