"""Pictures made smaller on disk: at most so many pixels, sides that divide evenly, cut in the middle."""

import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from library.data.buckets import Size
from library.data.pixels import Picture, Pixels, decoded, scaled
from library.data.records import ImageRecord
from library.data.sources.images import Damage, open_image, probe
from library.errors import DamagedPictureError

JPEG_QUALITY = 100
_OF_RGB = ("RGB", "RGBA", "P")
_SPACE = slice(16, 20)
"""Where an ICC profile names its colour space."""


@dataclass(frozen=True)
class Shrink:
    """How a picture is made smaller.

    Attributes:
        most: pixels that the result may have at most, width times height; smaller pictures aren't enlarged.
        divisible: both sides are multiples of it.
        interpolation: one of data.pixels.INTERPOLATIONS; None takes area means.
    """

    most: int
    divisible: int = 1
    interpolation: str | None = None

    def sizes(self, size: Size) -> tuple[Size, Size]:
        """(resized, cut) of a picture of `size` (width, height); sides are rounded down."""
        width, height = size
        resized = size
        if width * height > self.most:
            sides = (math.isqrt(self.most * one // other) for one, other in ((width, height), (height, width)))
            resized = (max(1, next(sides)), max(1, next(sides)))
        cut = tuple(side if side < self.divisible else side - side % self.divisible for side in resized)
        return resized, (cut[0], cut[1])


def read_whole(path: Path) -> Picture:
    """A picture upright at its own size; its mask is the alpha channel if it has one.

    Raises:
        DamagedPictureError: it can't be read.
    """
    header = probe(path)
    if isinstance(header, Damage):
        raise DamagedPictureError(path, header.wrong)
    record = ImageRecord(path.parent, path.name, header.size, header.orientation, "", False, 0, 0, 1, False)
    return decoded(record, alpha=True)


def shrunk(picture: Picture, how: Shrink) -> Picture:
    """The picture resized and cut in the middle."""
    height, width = picture.pixels.shape[:2]
    resized, (wide, high) = how.sizes((width, height))
    small = scaled(picture, resized, how.interpolation)
    left, top = (resized[0] - wide) // 2, (resized[1] - high) // 2

    def inside(values: Pixels) -> Pixels:
        return np.ascontiguousarray(values[top : top + high, left : left + wide])

    return Picture(inside(small.pixels), None if small.mask is None else inside(small.mask))


def encoded(picture: Picture, source: Path, *, png: bool) -> bytes:
    """The bytes of a JPEG file (quality 100, no colour subsampling, without alpha), or of a PNG file with its alpha.

    The colour profile of `source` goes along if it is one for red, green and blue, as the pixels are.
    """
    with source.open("rb") as file, open_image(file) as image:
        profile = image.info.get("icc_profile") if image.mode in _OF_RGB else None
    if profile and profile[_SPACE] != b"RGB ":
        profile = None
    more = {"icc_profile": profile} if profile else {}
    target = io.BytesIO()
    if not png:
        Image.fromarray(picture.pixels).save(target, "JPEG", quality=JPEG_QUALITY, subsampling=0, **more)
        return target.getvalue()
    pixels = picture.pixels if picture.mask is None else np.dstack([picture.pixels, picture.mask])
    Image.fromarray(pixels).save(target, "PNG", **more)
    return target.getvalue()
