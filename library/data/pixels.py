"""A picture file -> the pixels that are trained: decoded, upright, RGB, resized to cover its bucket, cut, flipped.

An alpha channel is dropped, not composited, as sd-scripts does; colour profiles are ignored likewise.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from library.data.buckets import Fit, Size
from library.data.images import BROKEN_HEADER, open_image
from library.data.records import ImageRecord
from library.errors import UserError

Pixels = NDArray[np.uint8]

cv2.setNumThreads(0)

_UPRIGHT: Mapping[int, Image.Transpose] = MappingProxyType(
    {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
)
"""What makes a picture of an EXIF orientation upright."""
_BY_CV2 = MappingProxyType(
    {
        "nearest": cv2.INTER_NEAREST_EXACT,
        "bilinear": cv2.INTER_LINEAR,
        "linear": cv2.INTER_LINEAR,
        "bicubic": cv2.INTER_CUBIC,
        "cubic": cv2.INTER_CUBIC,
        "area": cv2.INTER_AREA,
    }
)
_BY_PIL = MappingProxyType({"lanczos": Image.Resampling.LANCZOS, "box": Image.Resampling.BOX})
INTERPOLATIONS = (*_BY_PIL, *_BY_CV2)


def read_pixels(
    record: ImageRecord,
    fit: Fit,
    *,
    interpolation: str | None = None,
    flip: bool = False,
    crop: tuple[int, int] | None = None,
) -> Pixels:
    """The pixels of one sample, uint8 (height, width, 3) of `fit.bucket`.

    Args:
        interpolation: one of `INTERPOLATIONS`; None shrinks by area means and enlarges by Lanczos.
        crop: (left, top) of the cut from the resized picture; None cuts the centre.

    Raises:
        UserError: the file can't be decoded, or isn't the picture any more whose header was read.
    """
    try:
        pixels = _decode(record)
    except (OSError, Image.DecompressionBombError, *BROKEN_HEADER) as error:
        wrong = f"can't be decoded ({error})"
        raise UserError.single(str(record.path), wrong, "replace or remove it") from error
    if pixels.shape[1::-1] != record.size:
        wrong = f"is {pixels.shape[1]}x{pixels.shape[0]}, but was {record.size[0]}x{record.size[1]} when the run began"
        raise UserError.single(str(record.path), wrong, "start again")
    left, top = fit.crop if crop is None else crop
    width, height = fit.bucket
    pixels = resize(pixels, fit.resized, interpolation)[top : top + height, left : left + width]
    return np.ascontiguousarray(pixels[:, ::-1] if flip else pixels)


def resize(pixels: Pixels, size: Size, interpolation: str | None = None) -> Pixels:
    """uint8 (h, w, 3) resized to `size` (width, height). Source of the choices: sd-scripts."""
    height, width = pixels.shape[:2]
    if (width, height) == size:
        return pixels
    if interpolation is None:
        interpolation = "area" if width >= size[0] and height >= size[1] else "lanczos"
    if interpolation in _BY_PIL:
        return np.asarray(Image.fromarray(pixels).resize(size, _BY_PIL[interpolation]))
    resized: Pixels = cv2.resize(pixels, size, interpolation=_BY_CV2[interpolation]).astype(np.uint8, copy=False)
    return resized


def _decode(record: ImageRecord) -> Pixels:
    """Upright RGB, uint8 (h, w, 3). The orientation is the one that the plan was made with."""
    with record.path.open("rb") as file, open_image(file) as image:
        rgb = _to_rgb(image)
        if record.orientation in _UPRIGHT:
            rgb = rgb.transpose(_UPRIGHT[record.orientation])
        return np.asarray(rgb)


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of any mode. Deep greyscale is scaled down to 8 bits, not clipped."""
    if image.mode.startswith("I;16"):
        return _grey(np.asarray(image).astype(np.float64) / 257)
    if image.mode in ("I", "F"):
        values: NDArray[Any] = np.asarray(image).astype(np.float64)
        top = float(values.max(initial=0))
        scale = 1 / 257 if top > 255 else 255.0 if image.mode == "F" and top <= 1 else 1.0
        return _grey(values * scale)
    if image.mode in ("LA", "La", "PA", "RGBa") or "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def _grey(values: NDArray[Any]) -> Image.Image:
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8)).convert("RGB")
