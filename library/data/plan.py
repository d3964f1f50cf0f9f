"""The plan of every epoch: which sample stands in which batch, as a pure function of (seed, epoch).

Every sample of an epoch appears exactly as often as its repeats say. Batches are global: `batch_size x processes`
samples of one bucket, the last of a bucket may be shorter. What happens to the pixels is data.loader's; what the hash
of a plan covers stands in data.fingerprint.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from library.data import buckets, fingerprint
from library.data.buckets import Fit, Size
from library.data.garbage import uncollected
from library.data.records import ImageRecord
from library.data.sources.picture_files import SHOWN, some
from library.errors import Problem, UserError
from library.options.specs import DatasetSpec
from library.rng import rng


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
        with uncollected():
            for index, (record, fit) in enumerate(zip(self.records, self.fits, strict=True), self.first):
                found[fit.bucket] += [Sample(index, repeat) for repeat in range(record.repeats)]
        return {bucket: tuple(found[bucket]) for bucket in sorted(found)}


@dataclass(frozen=True)
class Plan:
    """Datasets with their fits, the VAE's factor, and the number of processes that share a global batch.

    `left_out` are notices about pictures that are too small.
    """

    datasets: tuple[Dataset, ...]
    vae_factor: int
    processes: int
    left_out: tuple[str, ...] = ()

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
        with uncollected():
            return self._epoch(seed, epoch)

    def _epoch(self, seed: int, epoch: int) -> tuple[GlobalBatch, ...]:
        batches: list[GlobalBatch] = []
        for number, dataset in enumerate(self.datasets):
            size = self.global_batch_size(number)
            for bucket, samples in dataset.samples.items():
                order = rng(seed, "order", epoch, "samples", number, *bucket).permutation(len(samples))
                mixed = tuple([samples[i] for i in order.tolist()])
                batches += [
                    GlobalBatch(number, bucket, mixed[start : start + size]) for start in range(0, len(mixed), size)
                ]
        return tuple([batches[i] for i in rng(seed, "order", epoch, "batches").permutation(len(batches)).tolist()])

    def joined(self, other: "Plan") -> "Plan":
        """The datasets of both, those of `self` first, for what is made once for all pictures, such as caches.

        `records` are those of `self`, then those of `other`; the latter index the joined `datasets`.

        Raises:
            ValueError: the plans are for different VAEs or numbers of processes.
        """
        if (self.vae_factor, self.processes) != (other.vae_factor, other.processes):
            raise ValueError("plans of different VAEs or numbers of processes can't be joined")
        shift, first = len(self.datasets), len(self.records)
        moved = [
            replace(
                dataset,
                records=tuple(replace(record, dataset=record.dataset + shift) for record in dataset.records),
                first=dataset.first + first,
            )
            for dataset in other.datasets
        ]
        return replace(self, datasets=(*self.datasets, *moved), left_out=(*self.left_out, *other.left_out))

    def fingerprint(self) -> str:
        """A hash of all that decides what is trained in which order: names, captions, sizes, repeats, buckets, batches.

        Folders may move and file times may change; the length of a picture's file may not. Pixels aren't read.
        """
        found = fingerprint.Hash()
        found.add(self.vae_factor)
        for number, dataset in enumerate(self.datasets):
            found.add_dataset(dataset.spec, dataset.records, dataset.fits, self.global_batch_size(number))
        return found.hexdigest()


def build_plan(
    specs: Sequence[DatasetSpec],
    records: Sequence[ImageRecord],
    vae_factor: int,
    processes: int,
    *,
    skip_small: bool = False,
) -> Plan:
    """Fit every record into its bucket. `vae_factor` is the side in pixels of one latent value.

    With `skip_small`, pictures that are too small for a bucket are left out, with notices; repeats stay as they are.

    Raises:
        UserError: sizes that the VAE can't take, or pictures too small for a bucket.
    """
    problems = [problem for spec in specs for problem in buckets.check(spec, vae_factor)]
    if problems:
        raise UserError(problems)
    datasets: list[Dataset] = []
    small: list[tuple[ImageRecord, str]] = []
    first = 0
    for number, spec in enumerate(specs):
        mine = [record for record in records if record.dataset == number]
        fits: dict[Size, Fit | str] = {}
        for size in {record.size for record in mine}:
            try:
                fits[size] = buckets.fit(size, spec, vae_factor)
            except ValueError as error:
                fits[size] = str(error)
        fitted = [fits[record.size] for record in mine]
        if any(isinstance(fit, str) for fit in fits.values()):
            small += [(record, fit) for record, fit in zip(mine, fitted, strict=True) if isinstance(fit, str)]
            mine = [record for record, fit in zip(mine, fitted, strict=True) if not isinstance(fit, str)]
        kept = tuple([fit for fit in fitted if not isinstance(fit, str)])
        datasets.append(Dataset(spec, tuple(mine), kept, first))
        first += len(mine)
    if small and not (skip_small and first):
        raise UserError(_too_small(small))
    return Plan(tuple(datasets), vae_factor, processes, tuple(_left_out(small)))


def _too_small(small: Sequence[tuple[ImageRecord, str]]) -> list[Problem]:
    advice = "use a larger picture, turn off bucket_no_upscale, or use --skip_small_images"
    problems = [Problem(some([str(record.path)]), wrong, advice) for record, wrong in small[:SHOWN]]
    rest = len(small) - SHOWN
    return problems + [Problem("pictures", f"{rest} more of {len(small)} that don't fit a bucket")] * (rest > 0)


def _left_out(small: Sequence[tuple[ImageRecord, str]]) -> list[str]:
    lines = [f"left out: {some([str(record.path)])}: {wrong}" for record, wrong in small[:SHOWN]]
    rest = len(small) - SHOWN
    return lines + [f"left out: {rest} more of {len(small)} pictures that don't fit a bucket"] * (rest > 0)
