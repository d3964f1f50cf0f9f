"""What SDXL models are told about the size of a training picture and about the part that was cut out of it.

Six numbers of pixels: height and width of the upright picture, top and left of the cut, height and width of the bucket.
They follow from geometry alone, so that they are the same with and without cached latents. Which samples there are, and
how each is cut, is not decided here (data.plan, data.augment).
"""

from library.data.augment import Augmentation
from library.data.buckets import Fit, Size, legacy_crop

SizeConditioning = tuple[int, int, int, int, int, int]
"""Original height and width, crop top and left, target height and width, in pixels."""


def estimated(size: Size, fit: Fit, augmentation: Augmentation) -> SizeConditioning:
    """The numbers that sd-scripts gives: those of a picture fitted into its bucket, wherever it was really cut.

    `size` is the upright (width, height). Fractions are cut off, as when sd-scripts puts them into a batch.
    """
    left, top, right, _ = legacy_crop(size, fit.bucket)
    if augmentation.flip:
        left = fit.bucket[0] - right
    return size[1], size[0], int(top), int(left), fit.bucket[1], fit.bucket[0]


def exact(size: Size, fit: Fit, augmentation: Augmentation) -> SizeConditioning:
    """The true numbers of this very sample: the offset of its cut in the resized picture, mirrored if that is."""
    left, top = augmentation.crop
    if augmentation.flip:
        left = augmentation.resized[0] - left - fit.bucket[0]
    return size[1], size[0], top, left, fit.bucket[1], fit.bucket[0]
