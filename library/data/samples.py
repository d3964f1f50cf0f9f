"""What one sample of an epoch is: its picture, cut, caption and weight. Loader and contact sheets ask the same place.

No tensors here (data.loader), no order (data.plan). Everything follows from the coordinates of a sample, and may be
asked from several threads.
"""

from dataclasses import dataclass

from library.data import augment, captions
from library.data.augment import Augmentation
from library.data.buckets import Fit
from library.data.captions import Progress
from library.data.faces import face_of
from library.data.pixels import Picture, cut, decoded, read_picture, scaled
from library.data.plan import Plan, Sample
from library.data.records import ImageRecord
from library.options.specs import SubsetSpec


@dataclass(frozen=True, slots=True)
class Shown:
    """One sample as it is trained, but for its pixels. `number` is its record's index in `Plan.records`."""

    number: int
    repeat: int
    record: ImageRecord
    fit: Fit
    subset: SubsetSpec
    augmentation: Augmentation
    caption: str
    loss_weight: float

    @property
    def wants_mask(self) -> bool:
        """Whether its loss may be masked."""
        return self.record.mask is not None or self.subset.alpha_mask


class Samples:
    """The samples of any epoch of a plan.

    Args:
        prior_loss_weight: loss weight of regularization samples; the others weigh 1.
        accumulation: micro-batches per optimizer step.
        total_steps: optimizer steps of the run, for captions that grow with it; 0 shows them whole.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        seed: int,
        prior_loss_weight: float = 1.0,
        accumulation: int = 1,
        total_steps: int = 0,
    ) -> None:
        self.plan = plan
        self.seed = seed
        self.prior_loss_weight = prior_loss_weight
        self.accumulation = accumulation
        self.total_steps = total_steps
        self._kept: dict[int, Picture] = {}

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch; the last one may have fewer micro-batches."""
        return -(-self.plan.batches_per_epoch // self.accumulation)

    def shown(self, sample: Sample, epoch: int, index: int) -> Shown:
        """A sample of global micro-batch `index` of an epoch (counted from 1)."""
        record, fit = self.plan.records[sample.record], self.plan.fits[sample.record]
        subset = self.plan.datasets[record.dataset].spec.subsets[record.subset]
        seed, key, repeat = self.seed, record.key, sample.repeat
        augmentation = augment.draw(subset, fit, seed=seed, epoch=epoch, key=key, repeat=repeat, size=record.size)
        progress = self._progress(epoch, index)
        caption = captions.process(
            record.caption, subset.caption, seed=seed, epoch=epoch, key=key, repeat=repeat, progress=progress
        )
        weight = self.prior_loss_weight if record.is_reg else 1.0
        return Shown(sample.record, repeat, record, fit, subset, augmentation, caption, weight)

    def picture(self, shown: Shown) -> Picture:
        """Pixels and mask of a sample, of the size of its bucket; not to be changed in place.

        Pictures of subsets that say `keep_in_memory` are decoded once, and kept as they are before they are cut.

        Raises:
            UserError: as `read_picture`.
        """
        record, fit, subset, drawn = shown.record, shown.fit, shown.subset, shown.augmentation
        if not subset.keep_in_memory:
            return read_picture(record, fit, subset, augmentation=drawn)
        kept = self._kept.get(shown.number)
        if kept is None:
            kept = decoded(record, alpha=subset.alpha_mask)
            if subset.face_crop_aug_range is None or face_of(record.key) is None:
                kept = scaled(kept, fit.resized, subset.resize_interpolation)
            self._kept[shown.number] = kept
        return cut(scaled(kept, drawn.resized, subset.resize_interpolation), fit.bucket, drawn)

    def _progress(self, epoch: int, index: int) -> Progress | None:
        if self.total_steps == 0:
            return None
        return Progress((epoch - 1) * self.steps_per_epoch + index // self.accumulation, self.total_steps)
