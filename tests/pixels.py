"""The pixels of a sample with a cut of one's choice: what tests compare loaders and caches with."""

from dataclasses import replace

from library.data.augment import Augmentation
from library.data.buckets import Fit
from library.data.pixels import Pixels, cut, decoded, scaled
from library.data.records import ImageRecord


def read_pixels(
    record: ImageRecord,
    fit: Fit,
    *,
    interpolation: str | None = None,
    flip: bool = False,
    crop: tuple[int, int] | None = None,
) -> Pixels:
    """uint8 (height, width, 3) of `fit.bucket`, without a mask; `crop` is (left, top), None the centre."""
    picture = scaled(decoded(replace(record, mask=None), alpha=False), fit.resized, interpolation)
    return cut(picture, fit.bucket, Augmentation(flip, crop or fit.crop, fit.resized)).pixels
