"""Batches in the order of the plan, made ahead by threads. The result is the same for any number of them.

Every draw comes from a sample's coordinates, so nothing here has a state that a resume would need.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from library.data import augment, captions
from library.data.ahead import ahead
from library.data.augment import Augmentation
from library.data.buckets import Size
from library.data.cache import LatentStore, to_unit_range
from library.data.pixels import Pixels, read_pixels
from library.data.plan import GlobalBatch, Plan, Sample
from library.data.sizes import estimated, exact
from library.options.specs import SubsetSpec


@dataclass(frozen=True)
class Batch:
    """This process's share of one global micro-batch; it may be empty.

    `index` is the number of the global micro-batch in its epoch, `positions` are this share's places in it, and
    `global_size` is the number of samples over all processes. `bucket` is (width, height) in pixels. `names` are the
    paths of the pictures. `loss_weights` is float32 (b,). `sizes` is float32 (b, 6), what data.sizes tells of each
    picture. Either `latents`, float32 (b, c, h, w), unscaled posterior means, or `pixels`, float32 (b, 3, H, W) in
    [-1, 1], is there.
    """

    epoch: int
    index: int
    bucket: Size
    positions: tuple[int, ...]
    global_size: int
    names: tuple[str, ...]
    captions: tuple[str, ...]
    loss_weights: torch.Tensor
    sizes: torch.Tensor
    latents: torch.Tensor | None
    pixels: torch.Tensor | None


class Loader:
    """Makes the batches of any epoch of a plan for one of `world_size` processes.

    Args:
        latents: the store to take latents from; None reads pixels from the pictures.
        workers: threads that work ahead; 0 makes each batch when it is asked for.
        prior_loss_weight: loss weight of regularization samples; the others weigh 1.
        exact_crops: `Batch.sizes` holds the true cuts, not sd-scripts' estimates.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        seed: int,
        latents: LatentStore | None = None,
        workers: int = 0,
        prior_loss_weight: float = 1.0,
        exact_crops: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if world_size != plan.processes:
            raise ValueError(f"a plan for {plan.processes} processes is loaded by {world_size}")
        self.plan = plan
        self.seed = seed
        self.latents = latents
        self.workers = workers
        self.prior_loss_weight = prior_loss_weight
        self.exact_crops = exact_crops
        self.rank = rank
        self.world_size = world_size

    def epoch(self, epoch: int, start: int = 0) -> Generator[Batch, None, None]:
        """The batches of an epoch (counted from 1) from global micro-batch `start` on; close it to end early.

        Raises:
            UserError: a picture or a cached file can't be read; it is named.
        """
        batches = self.plan.epoch(self.seed, epoch)

        def make(index: int) -> Batch:
            return self._make(epoch, index, batches[index])

        return ahead(make, range(start, len(batches)), threads=self.workers, depth=2 * self.workers)

    def _make(self, epoch: int, index: int, batch: GlobalBatch) -> Batch:
        positions = tuple(range(self.rank, len(batch.samples), self.world_size))
        samples = [batch.samples[position] for position in positions]
        records = [self.plan.records[sample.record] for sample in samples]
        draws = [self._augmentation(sample, epoch) for sample in samples]
        weights = [self.prior_loss_weight if record.is_reg else 1.0 for record in records]
        return Batch(
            epoch=epoch,
            index=index,
            bucket=batch.bucket,
            positions=positions,
            global_size=len(batch.samples),
            names=tuple(str(record.path) for record in records),
            captions=tuple(self._caption(sample, epoch) for sample in samples),
            loss_weights=torch.tensor(weights, dtype=torch.float32),
            sizes=self._sizes(samples, draws),
            latents=None if self.latents is None else self._latents(self.latents, samples, draws, batch.bucket),
            pixels=self._pixels(samples, draws, batch.bucket) if self.latents is None else None,
        )

    def _subset(self, sample: Sample) -> SubsetSpec:
        record = self.plan.records[sample.record]
        return self.plan.datasets[record.dataset].spec.subsets[record.subset]

    def _caption(self, sample: Sample, epoch: int) -> str:
        record, spec = self.plan.records[sample.record], self._subset(sample).caption
        return captions.process(record.caption, spec, seed=self.seed, epoch=epoch, key=record.key, repeat=sample.repeat)

    def _augmentation(self, sample: Sample, epoch: int) -> Augmentation:
        record, fit = self.plan.records[sample.record], self.plan.fits[sample.record]
        subset = self._subset(sample)
        return augment.draw(subset, fit, seed=self.seed, epoch=epoch, key=record.key, repeat=sample.repeat)

    def _sizes(self, samples: Sequence[Sample], draws: Sequence[Augmentation]) -> torch.Tensor:
        describe = exact if self.exact_crops else estimated
        rows = [
            describe(self.plan.records[sample.record].size, self.plan.fits[sample.record], drawn)
            for sample, drawn in zip(samples, draws, strict=True)
        ]
        return torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)

    def _latents(
        self, store: LatentStore, samples: Sequence[Sample], draws: Sequence[Augmentation], bucket: Size
    ) -> torch.Tensor:
        if not samples:
            width, height = (side // self.plan.vae_factor for side in bucket)
            return torch.empty((0, store.channels, height, width))
        arrays = [store.array(sample.record, drawn.flip) for sample, drawn in zip(samples, draws, strict=True)]
        return torch.from_numpy(np.stack(arrays))

    def _pixels(self, samples: Sequence[Sample], draws: Sequence[Augmentation], bucket: Size) -> torch.Tensor:
        if not samples:
            return torch.empty((0, 3, bucket[1], bucket[0]))
        return to_unit_range([self._read(*pair) for pair in zip(samples, draws, strict=True)])

    def _read(self, sample: Sample, augmentation: Augmentation) -> Pixels:
        return read_pixels(
            self.plan.records[sample.record],
            self.plan.fits[sample.record],
            interpolation=self._subset(sample).resize_interpolation,
            flip=augmentation.flip,
            crop=augmentation.crop,
        )
