"""The plan of every epoch: which sample stands in which batch, as a pure function of (seed, epoch).

Every sample of an epoch appears exactly as often as its repeats say. Batches are global: `batch_size x processes`
samples of one bucket, the last of a bucket may be shorter. What happens to the pixels is data.loader's.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

from library.data import buckets
from library.data.buckets import Fit, Size
from library.data.records import ImageRecord
from library.errors import Problem, UserError
from library.options.specs import DatasetSpec
from library.rng import rng

FINGERPRINT_VERSION = 1
SHOWN = 10


@dataclass(frozen=True, slots=True)
class Sample:
    """One showing of a picture: `record` indexes `Plan.records`, `repeat` counts from 0."""

    record: int
    repeat: int


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """The samples of one micro-step over all processes; all of one dataset and one bucket (width, height)."""

    dataset: int
    bucket: Size
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class Dataset:
    """Records that share a spec, with the fit of each. `first` is the index of its first record in `Plan.records`."""

    spec: DatasetSpec
    records: tuple[ImageRecord, ...]
    fits: tuple[Fit, ...]
    first: int

    @cached_property
    def samples(self) -> dict[Size, tuple[Sample, ...]]:
        """The samples of one epoch by bucket, buckets ascending, in the order of records and repeats."""
        found: dict[Size, list[Sample]] = defaultdict(list)
        for index, (record, fit) in enumerate(zip(self.records, self.fits, strict=True), self.first):
            found[fit.bucket] += [Sample(index, repeat) for repeat in range(record.repeats)]
        return {bucket: tuple(found[bucket]) for bucket in sorted(found)}


@dataclass(frozen=True)
class Plan:
    """Datasets with their fits, the VAE's factor, and the number of processes that share a global batch."""

    datasets: tuple[Dataset, ...]
    vae_factor: int
    processes: int

    @cached_property
    def records(self) -> tuple[ImageRecord, ...]:
        """The records of all datasets in order; `Sample.record` and the latent store index it."""
        return tuple(record for dataset in self.datasets for record in dataset.records)

    @cached_property
    def fits(self) -> tuple[Fit, ...]:
        """The fit of each of `records`."""
        return tuple(fit for dataset in self.datasets for fit in dataset.fits)

    def global_batch_size(self, dataset: int) -> int:
        """Samples in a full global micro-batch of one dataset."""
        return self.datasets[dataset].spec.batch_size * self.processes

    @cached_property
    def batches_per_epoch(self) -> int:
        """Global micro-batches in one epoch."""
        return sum(
            -(-len(samples) // self.global_batch_size(number))
            for number, dataset in enumerate(self.datasets)
            for samples in dataset.samples.values()
        )

    @cached_property
    def samples_per_epoch(self) -> int:
        """Samples in one epoch: the sum of all repeats."""
        return sum(record.repeats for record in self.records)

    def epoch(self, seed: int, epoch: int) -> tuple[GlobalBatch, ...]:
        """The batches of one epoch in the order in which they are trained. `epoch` counts from 1."""
        batches: list[GlobalBatch] = []
        for number, dataset in enumerate(self.datasets):
            size = self.global_batch_size(number)
            for bucket, samples in dataset.samples.items():
                order = rng(seed, "order", epoch, "samples", number, *bucket).permutation(len(samples))
                mixed = [samples[i] for i in order]
                batches += [
                    GlobalBatch(number, bucket, tuple(mixed[start : start + size]))
                    for start in range(0, len(mixed), size)
                ]
        return tuple(batches[i] for i in rng(seed, "order", epoch, "batches").permutation(len(batches)))

    def fingerprint(self) -> str:
        """A hash of all that decides what is trained in which order: names, captions, sizes, repeats, buckets, batches.

        Folders may move and file times may change; the length of a picture's file may not. Pixels aren't read.
        """
        described = {
            "version": FINGERPRINT_VERSION,
            "vae_factor": self.vae_factor,
            "datasets": [_describe(dataset, self.global_batch_size(i)) for i, dataset in enumerate(self.datasets)],
        }
        text = json.dumps(described, sort_keys=True, ensure_ascii=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _describe(dataset: Dataset, global_batch: int) -> dict[str, object]:
    spec = dataset.spec
    used = sorted({record.subset for record in dataset.records})
    return {
        "global_batch": global_batch,
        "resolution": spec.resolution,
        "subsets": {
            str(i): {
                "caption": asdict(spec.subsets[i].caption),
                "flip_aug": spec.subsets[i].flip_aug,
                "random_crop": spec.subsets[i].random_crop,
                "resize_interpolation": spec.subsets[i].resize_interpolation,
            }
            for i in used
        },
        "records": [
            (
                r.key,
                r.subset,
                r.size,
                r.orientation,
                r.file_bytes,
                r.caption,
                r.repeats,
                r.is_reg,
                f.bucket,
                f.resized,
                f.crop,
            )
            for r, f in zip(dataset.records, dataset.fits, strict=True)
        ],
    }


def build_plan(specs: Sequence[DatasetSpec], records: Sequence[ImageRecord], vae_factor: int, processes: int) -> Plan:
    """Fit every record into its bucket. `vae_factor` is the side in pixels of one latent value.

    Raises:
        UserError: sizes that the VAE can't take, or pictures too small for a bucket.
    """
    problems = [problem for spec in specs for problem in buckets.check(spec, vae_factor)]
    if problems:
        raise UserError(problems)
    datasets: list[Dataset] = []
    first = 0
    for number, spec in enumerate(specs):
        mine = tuple(record for record in records if record.dataset == number)
        fits: list[Fit] = []
        for record in mine:
            try:
                fits.append(buckets.fit(record.size, spec, vae_factor))
            except ValueError as error:
                problems.append(
                    Problem(str(record.path), str(error), "use a larger picture or turn off bucket_no_upscale")
                )
        datasets.append(Dataset(spec, mine, tuple(fits), first))
        first += len(mine)
    if problems:
        rest = len(problems) - SHOWN
        raise UserError(
            problems[:SHOWN] + ([Problem("pictures", f"{rest} more that don't fit a bucket")] if rest > 0 else [])
        )
    return Plan(tuple(datasets), vae_factor, processes)
