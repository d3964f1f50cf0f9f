"""From looked-up values and subsets to the specs of a dataset: its sizes and buckets, once for each resolution."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from library.errors import Problem
from library.options.lookup import Lookup
from library.options.specs import AspectBuckets, DatasetSpec, SubsetSpec


@dataclass
class Datasets:
    """What was found, lines to show, and what is wrong."""

    specs: list[DatasetSpec] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def add_dataset(
    lookup: Lookup,
    where: str,
    subsets: Sequence[SubsetSpec],
    found: Datasets,
    bad: frozenset[str],
    *,
    file_is_wrong: bool,
) -> None:
    """Check a dataset's sizes and subsets, and add it: once for its resolution, and once for each further one."""
    if not file_is_wrong and not any(not subset.is_reg for subset in subsets):
        wrong = "has only regularization pictures" if subsets else "has no subset left to train on"
        found.problems.append(Problem(where, wrong))
    buckets = _aspect_buckets(lookup, found)
    resolution, resolution_where = lookup.find("resolution")
    if resolution is None and buckets is not None:
        resolution = (buckets.target, buckets.target)
    if resolution is None:
        if "resolution" not in bad and not lookup.is_bad("resolution"):
            advice = "models were made for --resolution 512,512 (SD1, SD2), 768,768 (SD2 768-v) or 1024,1024 (SDXL)"
            found.problems.append(Problem("--resolution", "the size of training pictures is missing", advice))
        return
    more, more_where = lookup.find("more_resolutions")
    sizes = list(dict.fromkeys([resolution, *(more or ())]))
    places = [resolution_where] + [more_where] * (len(sizes) - 1)
    if more and buckets is not None:
        wrong = "can't be used with aspect_ratio_buckets, which give the size"
        found.problems.append(Problem(more_where, wrong, "leave out one of the two, or write two [[datasets]]"))
    seed = lookup["validation_seed"]
    common = DatasetSpec(
        batch_size=lookup["batch_size"],
        resolution=resolution,
        subsets=tuple(subsets),
        enable_bucket=lookup["enable_bucket"] or buckets is not None,
        bucket_reso_steps=buckets.step if buckets else lookup["bucket_reso_steps"],
        bucket_no_upscale=lookup["bucket_no_upscale"] and buckets is None,
        where=where,
        aspect_buckets=buckets,
        bucket_choice=lookup["bucket_choice"],
        network_multiplier=lookup["network_multiplier"],
        split_seed=0 if seed is None else seed,
    )
    for size, place in zip(sizes, places, strict=True):
        low, high = lookup["min_bucket_reso"], lookup["max_bucket_reso"]
        if lookup["enable_bucket"] and buckets is None:
            low, high = _limits(lookup, size, place, found)
        title = where if size == resolution else f"{where} at {size[0]}x{size[1]}"
        found.specs.append(replace(common, resolution=size, min_bucket_reso=low, max_bucket_reso=high, where=title))


def _aspect_buckets(lookup: Lookup, found: Datasets) -> AspectBuckets | None:
    """invoke-training's buckets, if asked for and possible."""
    numbers, where = lookup.find("aspect_ratio_buckets")
    if numbers is None:
        return None
    wrong = _wrong_buckets(numbers)
    if wrong:
        advice = "wanted: target resolution, shortest and longest side, and what sides are divisible by: 512 256 768 64"
        found.problems.append(Problem(where, wrong, advice))
        return None
    if lookup["bucket_no_upscale"]:
        wrong = "has no effect with aspect_ratio_buckets"
        found.problems.append(Problem(lookup.where("bucket_no_upscale"), wrong, "leave out one of the two"))
    for name in ("resolution", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps"):
        place = lookup.where(name)
        if any(name in table.values for table in lookup.tables) or name in lookup.options.explicit:
            found.notices.append(f"{place}: has no effect on buckets, aspect_ratio_buckets counts")
    return AspectBuckets(*numbers)


def _wrong_buckets(numbers: tuple[Any, ...]) -> str:
    """What is wrong with the numbers of `aspect_ratio_buckets`; an empty text if nothing is."""
    if len(numbers) != 4:
        return f"holds {len(numbers)} numbers"
    target, start, end, step = numbers
    odd = [str(side) for side in (start, end) if side % step]
    if odd:
        return f"{' and '.join(odd)} can't be divided by {step}"
    if not start <= target <= end:
        return f"the target {target} doesn't lie from {start} to {end}"
    return ""


def _limits(lookup: Lookup, resolution: tuple[int, int], where: str, found: Datasets) -> tuple[int, int]:
    """Shortest and longest side of a bucket, as multiples of the steps: rounded down and up."""
    (steps, steps_where), (low, low_where) = lookup.find("bucket_reso_steps"), lookup.find("min_bucket_reso")
    high, high_where = lookup.find("max_bucket_reso")
    if steps % 64:
        found.notices.append(
            f"{steps_where}: {steps} is no multiple of 64, for which Stable Diffusion models were made"
        )
    if lookup["bucket_no_upscale"]:
        return low, high
    rounded_low, rounded_high = max(low // steps, 1) * steps, math.ceil(high / steps) * steps
    for value, rounded, place in ((low, rounded_low, low_where), (high, rounded_high, high_where)):
        if value != rounded:
            found.notices.append(f"{place}: {value} becomes {rounded}, a multiple of bucket_reso_steps {steps}")
    size = f"{resolution[0]}x{resolution[1]}"
    if min(resolution) < rounded_low:
        wrong = f"{size} has a side shorter than min_bucket_reso {rounded_low}"
        found.problems.append(Problem(where, wrong, f"set min_bucket_reso to {min(resolution)} or less ({low_where})"))
    if max(resolution) > rounded_high:
        wrong = f"{size} has a side longer than max_bucket_reso {rounded_high}"
        found.problems.append(Problem(where, wrong, f"set max_bucket_reso to {max(resolution)} or more ({high_where})"))
    return rounded_low, rounded_high
