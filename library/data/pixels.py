"""A picture file -> the pixels that are trained, and its mask: decoded, upright, resized, cut, flipped, recoloured.

An alpha channel is dropped, not composited, as sd-scripts does; colour profiles are ignored likewise. A mask goes the
same way as its picture, whether it is a picture of its own or the alpha channel.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from library.data import augment
from library.data.augment import Augmentation, ColorShift
from library.data.buckets import Fit, Size
from library.data.records import ImageRecord
from library.data.sources.fast_headers import ORIENTATION_TAG
from library.data.sources.images import BROKEN_HEADER, open_image
from library.errors import DamagedPictureError, UserError
from library.options.specs import SubsetSpec

Pixels = NDArray[np.uint8]
Mask = NDArray[np.uint8]
Taken = TypeVar("Taken")

cv2.setNumThreads(0)

_BY_CV2 = {
    "nearest": cv2.INTER_NEAREST_EXACT,
    "bilinear": cv2.INTER_LINEAR,
    "linear": cv2.INTER_LINEAR,
    "bicubic": cv2.INTER_CUBIC,
    "cubic": cv2.INTER_CUBIC,
    "area": cv2.INTER_AREA,
}
_BY_PIL = {"lanczos": Image.Resampling.LANCZOS, "box": Image.Resampling.BOX}
INTERPOLATIONS = (*_BY_PIL, *_BY_CV2)
_ALPHA_MODES = ("RGBA", "LA", "PA", "La", "RGBa")
_UNREADABLE = (OSError, Image.DecompressionBombError, *BROKEN_HEADER)
_LEVELS = (np.arange(256, dtype=np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """`pixels` uint8 (h, w, 3), RGB. `mask` uint8 (h, w), 255 where the loss counts in full, or None without one."""

    pixels: Pixels
    mask: Mask | None = None


def read_picture(
    record: ImageRecord, fit: Fit, subset: SubsetSpec, *, augmentation: Augmentation | None = None
) -> Picture:
    """Pixels and mask of one sample, of the size of `fit.bucket`, from one decoding. None: cut as the fit says.

    Raises:
        UserError: a file can't be decoded, isn't the picture any more whose header was read, or the mask has another
            upright size than its picture.
    """
    augmentation = augmentation or augment.plain(fit)
    picture = scaled(decoded(record, alpha=subset.alpha_mask), augmentation.resized, subset.resize_interpolation)
    return cut(picture, fit.bucket, augmentation)


def decoded(record: ImageRecord, *, alpha: bool) -> Picture:
    """Upright picture and mask at their own size; `alpha` takes the mask from the alpha channel if no picture is named.

    Raises:
        UserError: as `read_picture`.
    """
    if record.mask is None:
        return _picture_of(record, alpha=alpha)
    picture = _picture_of(record, alpha=False)
    mask = _read(Path(record.mask), _first_channel)
    if mask.shape != picture.pixels.shape[:2]:
        (height, width), (own_height, own_width) = picture.pixels.shape[:2], mask.shape
        wrong = f"this mask is {own_width}x{own_height}, but its picture {record.path} is {width}x{height}"
        raise UserError.single(record.mask, wrong, "give both one size")
    return Picture(picture.pixels, mask)


def scaled(picture: Picture, size: Size, interpolation: str | None = None) -> Picture:
    """A picture and its mask resized to `size` (width, height)."""
    mask = None if picture.mask is None else resize_mask(picture.mask, size)
    return Picture(resize(picture.pixels, size, interpolation), mask)


def cut(picture: Picture, bucket: Size, augmentation: Augmentation) -> Picture:
    """The part of a resized picture that is trained, flipped and recoloured. It may share memory with `picture`."""
    (left, top), (width, height) = augmentation.crop, bucket

    def part(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
        inside = values[top : top + height, left : left + width]
        return np.ascontiguousarray(inside[:, ::-1] if augmentation.flip else inside)

    pixels = part(picture.pixels)
    if augmentation.color is not None:
        pixels = shift_color(pixels, augmentation.color)
    return Picture(pixels, None if picture.mask is None else part(picture.mask))


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


def resize_mask(mask: Mask, size: Size) -> Mask:
    """uint8 (h, w) resized to `size` (width, height): area means shrink, straight lines between pixels enlarge."""
    height, width = mask.shape
    if (width, height) == size:
        return mask
    shrinks = width >= size[0] and height >= size[1]
    resized: Mask = cv2.resize(mask, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return resized


def shift_color(pixels: Pixels, shift: ColorShift) -> Pixels:
    """A copy of uint8 (h, w, 3) RGB with its hue turned or its gamma changed. Source of the numbers: sd-scripts."""
    if shift.kind == "gamma":
        table = np.clip(np.rint(np.arange(256, dtype=np.float64) ** shift.amount), 0, 255).astype(np.uint8)
        changed: Pixels = cv2.LUT(pixels, table)
        return changed
    hsv = cv2.cvtColor(pixels.astype(np.float32) / np.float32(255), cv2.COLOR_RGB2HSV)
    hsv[..., 0] = (hsv[..., 0] + np.float32(2 * shift.amount)) % np.float32(360)
    rgb = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    return np.clip(np.rint(rgb * np.float32(255)), 0, 255).astype(np.uint8)


def unit_range(pictures: Sequence[Pixels]) -> NDArray[np.float32]:
    """uint8 (H, W, 3) pictures of one size -> float32 (b, 3, H, W), (value / 255 - 0.5) / 0.5.

    By tables, plane by plane, without torch: each thread that calls it would get a pool of threads of its own.
    """
    height, width = pictures[0].shape[:2]
    values = np.empty((len(pictures), 3, height, width), np.float32)
    for planes, picture in zip(values, pictures, strict=True):
        for plane, channel in zip(planes, cv2.split(picture), strict=True):
            cv2.LUT(channel, _LEVELS, dst=plane)
    return values


def _picture_of(record: ImageRecord, *, alpha: bool) -> Picture:
    """The picture of a record, with its alpha channel as mask if it is asked for and there.

    The orientation is the one that the plan was made with.
    """

    def taken(image: Image.Image) -> Picture:
        mask = _upright(_alpha_of(image), record.orientation) if alpha and _has_alpha(image) else None
        return Picture(_upright(_rgb_of(image), record.orientation), mask)

    picture = _read(record.path, taken)
    if picture.pixels.shape[1::-1] != record.size:
        height, width = picture.pixels.shape[:2]
        wrong = f"is {width}x{height}, but was {record.size[0]}x{record.size[1]} when the run began"
        raise UserError.single(str(record.path), wrong, "start again")
    return picture


def _read(path: Path, take: Callable[[Image.Image], Taken]) -> Taken:
    """What `take` makes of an opened picture."""
    try:
        with path.open("rb") as file, open_image(file) as image:
            return take(image)
    except _UNREADABLE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError.single(str(path), f"can't be read ({error.strerror})", "replace or remove it") from error
        raise DamagedPictureError(path, error) from error


def _first_channel(image: Image.Image) -> Mask:
    """The first channel in 8 bits, made upright by the file's own EXIF data, which may stand behind the pixels."""
    values = np.asarray(image) if image.mode == "L" else _rgb_of(image)[..., 0]
    orientation = image.getexif().get(ORIENTATION_TAG, 1)
    return _upright(np.ascontiguousarray(values), orientation if isinstance(orientation, int) else 1)


def _upright(values: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """uint8 (h, w) or (h, w, 3) of an EXIF orientation made upright."""
    if orientation >= 5:
        values = values.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        values = values[:, ::-1]
    if orientation in (3, 4, 7, 8):
        values = values[::-1]
    return np.ascontiguousarray(values)


def _rgb_of(image: Image.Image) -> Pixels:
    """uint8 (h, w, 3) of a picture of any mode, not yet upright."""
    return np.asarray(_to_rgb(image))


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in _ALPHA_MODES or "transparency" in image.info


def _alpha_of(image: Image.Image) -> Mask:
    """uint8 (h, w), 255 where the picture is opaque; also of a palette or of one transparent colour."""
    return np.asarray((image if image.mode == "RGBA" else image.convert("RGBA")).getchannel("A"))


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of any mode. Deep greyscale is scaled down to 8 bits, not clipped."""
    if image.mode.startswith("I;16"):
        return _grey(np.asarray(image).astype(np.float64) / 257)
    if image.mode in ("I", "F"):
        values: NDArray[Any] = np.asarray(image).astype(np.float64)
        top = float(values.max(initial=0))
        scale = 1 / 257 if top > 255 else 255.0 if image.mode == "F" and top <= 1 else 1.0
        return _grey(values * scale)
    if image.mode != "RGBA" and _has_alpha(image):
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def _grey(values: NDArray[Any]) -> Image.Image:
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8)).convert("RGB")
