"""Batches in the order of the plan, made ahead by threads. The result is the same for any number of them.

Every draw comes from a sample's coordinates, so nothing here has a state that a resume would need. Threads share the
plan and all that is kept in memory; they live as long as their loader.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from library.data.ahead import ahead
from library.data.buckets import Size
from library.data.caches.latents import LatentStore
from library.data.pixels import Picture, unit_range
from library.data.plan import GlobalBatch, Plan
from library.data.samples import Samples, Shown
from library.data.sizes import estimated, exact
from library.data.sources.index import remember_damages
from library.errors import DamagedPictureError
from library.rng import rng


@dataclass(frozen=True)
class Batch:
    """This process's share of one global micro-batch; it may be empty.

    `index` is the number of the global micro-batch in its epoch, `positions` are this share's places in it, and
    `global_size` is the number of samples over all processes. `bucket` is (width, height) in pixels. `names` are the
    paths of the pictures. `loss_weights` is float32 (b,). `sizes` is float32 (b, 6), what data.sizes tells of each
    picture. Either `latents`, float32 (b, c, h, w), unscaled, or `pixels`, float32 (b, 3, H, W) in [-1, 1], is there.

    `masks`, float32 (b, 1, h, w) in [0, 1], are means over the pixels of each latent value, ones for samples without a
    mask; None if no sample has one. Where latents are to be drawn, `latents` are means, `logvar` holds the logarithms
    of the variances around them, and `posterior` standard normal draws, both float32 (b, c, h, w). `multiplier` is the
    strength of the network for this dataset. `custom_attributes` are those of each sample's subset.
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
    masks: torch.Tensor | None = None
    logvar: torch.Tensor | None = None
    posterior: torch.Tensor | None = None
    multiplier: float = 1.0
    custom_attributes: tuple[Mapping[str, Any], ...] = ()


Turn = tuple[int, int, GlobalBatch]
"""Epoch, index in it, and what is to be made there."""


class Loader:
    """Makes the batches of any epoch of a plan for one of `world_size` processes. To be used from one thread.

    Args:
        latents: the store to take latents from; None reads pixels from the pictures.
        workers: threads that work ahead; 0 makes each batch when it is asked for.
        prior_loss_weight: loss weight of regularization samples; the others weigh 1.
        exact_crops: `Batch.sizes` holds the true cuts, not sd-scripts' estimates.
        accumulation: micro-batches per optimizer step.
        total_steps: optimizer steps of the run: captions may grow with it, and the first batches of each epoch but the
            last one are made while the one before ends. 0: neither.
        channels: of the VAE's latents.
        sample_posterior: latents are to be drawn from the VAE's distribution: `Batch.posterior` is there.
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
        accumulation: int = 1,
        total_steps: int = 0,
        channels: int = 4,
        sample_posterior: bool = False,
    ) -> None:
        if world_size != plan.processes:
            raise ValueError(f"a plan for {plan.processes} processes is loaded by {world_size}")
        self.plan = plan
        self.seed = seed
        self.latents = latents
        self.workers = workers
        self.exact_crops = exact_crops
        self.rank = rank
        self.world_size = world_size
        self.channels = channels
        self.sample_posterior = sample_posterior
        self._samples = Samples(
            plan,
            seed=seed,
            prior_loss_weight=prior_loss_weight,
            accumulation=accumulation,
            total_steps=total_steps,
        )
        self._last_epoch = -(-total_steps // max(1, self._samples.steps_per_epoch))
        self._pool: ThreadPoolExecutor | None = None
        self._order: tuple[int, Future[tuple[GlobalBatch, ...]]] | None = None
        self._begun: tuple[int, Generator[Batch, None, None]] | None = None

    def epoch(self, epoch: int, start: int = 0) -> Generator[Batch, None, None]:
        """The batches of an epoch (counted from 1) from global micro-batch `start` on; close it to end early.

        Raises:
            UserError: a picture or a cached file can't be read; it is named.
        """
        batches, whole = self._from(epoch, start), False
        try:
            for number in range(start, self.plan.batches_per_epoch):
                batch = next(batches)
                if number == start:
                    self._order_ahead(epoch + 1)
                yield batch
            whole = True
        finally:
            if whole and epoch < self._last_epoch:
                self._begun = epoch + 1, batches
            else:
                batches.close()

    def close(self) -> None:
        """End all threads. A later `epoch` starts them anew."""
        self._drop_begun()
        self._order = None
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def _from(self, epoch: int, start: int) -> Generator[Batch, None, None]:
        """The batches from a place on; those that were begun already if they stand there."""
        if self._begun is not None and (epoch, start) == (self._begun[0], 0):
            batches, self._begun = self._begun[1], None
            return batches
        self._drop_begun()
        turns, depth = self._turns(epoch, start), 2 * self.workers
        return ahead(self._make, turns, threads=self.workers, depth=depth, pool=self._threads())

    def _drop_begun(self) -> None:
        if self._begun is not None:
            self._begun[1].close()
            self._begun = None

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(max(1, self.workers), thread_name_prefix="data")
        return self._pool

    def _turns(self, epoch: int, start: int) -> Iterator[Turn]:
        """What there is to make from a place on, to the end of the epoch, or of the last one if that is known."""
        while True:
            batches = self._order_of(epoch)
            for index in range(start, len(batches)):
                yield epoch, index, batches[index]
            if epoch >= self._last_epoch:
                return
            epoch, start = epoch + 1, 0

    def _order_of(self, epoch: int) -> tuple[GlobalBatch, ...]:
        if self._order is not None and self._order[0] == epoch:
            return self._order[1].result()
        return self.plan.epoch(self.seed, epoch)

    def _order_ahead(self, epoch: int) -> None:
        """Have a thread make the order of an epoch, so that nobody waits for it when the epoch begins."""
        if (self._last_epoch == 0 or epoch <= self._last_epoch) and (self._order is None or self._order[0] != epoch):
            self._order = epoch, self._threads().submit(self.plan.epoch, self.seed, epoch)

    def _make(self, turn: Turn) -> Batch:
        epoch, index, batch = turn
        positions = tuple(range(self.rank, len(batch.samples), self.world_size))
        shown = [self._samples.shown(batch.samples[position], epoch, index) for position in positions]
        latents, pixels, masks = self._arrays(shown, batch.bucket)
        return Batch(
            epoch=epoch,
            index=index,
            bucket=batch.bucket,
            positions=positions,
            global_size=len(batch.samples),
            names=tuple(str(one.record.path) for one in shown),
            captions=tuple(one.caption for one in shown),
            loss_weights=torch.tensor([one.loss_weight for one in shown], dtype=torch.float32),
            sizes=self._sizes(shown),
            latents=latents,
            pixels=pixels,
            masks=self._masks(masks, batch.bucket),
            logvar=None if self.latents is None else self._logvars(self.latents, shown),
            posterior=self._posterior(shown, epoch, batch.bucket),
            multiplier=self.plan.datasets[batch.dataset].spec.network_multiplier,
            custom_attributes=tuple(one.subset.custom_attributes for one in shown),
        )

    def _sizes(self, shown: Sequence[Shown]) -> torch.Tensor:
        describe = exact if self.exact_crops else estimated
        rows = [describe(one.record.size, one.fit, one.augmentation) for one in shown]
        return torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)

    def _arrays(
        self, shown: Sequence[Shown], bucket: Size
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, list[NDArray[Any] | None]]:
        """Latents or pixels, and the masks of the bucket's pixels, None for samples without one."""
        store = self.latents
        if store is None:
            pictures = self._pictures(shown)
            masks: list[NDArray[Any] | None] = [picture.mask for picture in pictures]
            if not pictures:
                return None, torch.empty((0, 3, bucket[1], bucket[0])), masks
            return None, torch.from_numpy(unit_range([picture.pixels for picture in pictures])), masks
        masks = [store.mask(one.number, one.augmentation.flip) if one.wants_mask else None for one in shown]
        if not shown:
            return torch.empty((0, store.channels, *self._cells(bucket))), None, masks
        means = [store.array(one.number, one.augmentation.flip) for one in shown]
        return torch.from_numpy(np.stack(means)), None, masks

    def _pictures(self, shown: Sequence[Shown]) -> list[Picture]:
        """The decoded samples; a damaged one is remembered for the next scan."""
        try:
            return [self._samples.picture(one) for one in shown]
        except DamagedPictureError as error:
            remember_damages({error.path: error.why})
            raise

    def _logvars(self, store: LatentStore, shown: Sequence[Shown]) -> torch.Tensor | None:
        """The logarithms of the variances around cached latents, where latents are drawn."""
        if not self.sample_posterior or not shown:
            return None
        found = [store.logvar(one.number, one.augmentation.flip) for one in shown]
        if any(one is None for one in found):
            raise ValueError("latents were cached without their variance")
        return torch.from_numpy(np.stack([one for one in found if one is not None]))

    def _draws(self, shown: Shown, epoch: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
        draws = rng(self.seed, "posterior", epoch, shown.record.key, shown.repeat)
        return draws.standard_normal(shape, dtype=np.float32)

    def _posterior(self, shown: Sequence[Shown], epoch: int, bucket: Size) -> torch.Tensor | None:
        if not self.sample_posterior:
            return None
        shape = (self.channels, *self._cells(bucket))
        draws = [self._draws(one, epoch, shape) for one in shown]
        return torch.from_numpy(np.stack(draws)) if draws else torch.empty((0, *shape))

    def _cells(self, bucket: Size) -> tuple[int, int]:
        """(height, width) of the latents of a bucket."""
        return bucket[1] // self.plan.vae_factor, bucket[0] // self.plan.vae_factor

    def _masks(self, masks: Sequence[NDArray[Any] | None], bucket: Size) -> torch.Tensor | None:
        if all(mask is None for mask in masks):
            return None
        values = np.ones((len(masks), 1, *self._cells(bucket)), np.float32)
        for place, mask in zip(values, masks, strict=True):
            if mask is not None:
                place[0] = block_means(mask, self.plan.vae_factor)
        return torch.from_numpy(values)


def block_means(mask: NDArray[Any], factor: int) -> NDArray[np.float32]:
    """A mask (H, W), uint8 or float in [0, 1] with steps of 1/255 -> the means of its blocks, float32 in [0, 1]."""
    levels = mask if mask.dtype == np.uint8 else np.rint(np.asarray(mask, np.float64) * 255)
    height, width = levels.shape
    sums = levels.reshape(height // factor, factor, width // factor, factor).sum((1, 3), dtype=np.float64)
    return (sums / (255 * factor * factor)).astype(np.float32)
