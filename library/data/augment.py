"""Flip, cut and colour of one sample, drawn from its coordinates: the same whether latents are cached or not.

Only numbers are drawn here; data.pixels does to pixels and masks what they say. Each kind of draw has a generator of
its own, so that turning one on changes no other.
"""

from dataclasses import dataclass
from typing import Literal

from library.data.buckets import Fit, Size
from library.data.faces import Face, face_of
from library.options.specs import SubsetSpec
from library.rng import rng

COLOR_CHANCE = 0.33
HUE_SPAN = 8.0
GAMMA_SPAN = 0.05
SMALLEST_MOVED_FACE = 40
"""Pixels. The cut around a smaller face isn't moved at random."""


@dataclass(frozen=True, slots=True)
class ColorShift:
    """A turn of the hue by `amount` (of 180, as OpenCV counts), or a gamma: pixel ** amount on 0..255."""

    kind: Literal["hue", "gamma"]
    amount: float


@dataclass(frozen=True, slots=True)
class Augmentation:
    """`crop` is the (left, top) of the cut from the picture resized to `resized`, in pixels.

    `resized` is that of the fit unless the picture is cut around a face.
    """

    flip: bool
    crop: tuple[int, int]
    resized: Size
    color: ColorShift | None = None


def plain(fit: Fit) -> Augmentation:
    """Nothing but the fit itself."""
    return Augmentation(False, fit.crop, fit.resized)


def draw(subset: SubsetSpec, fit: Fit, *, seed: int, epoch: int, key: str, repeat: int, size: Size) -> Augmentation:
    """The augmentation of one showing of the picture `key`, whose upright (width, height) is `size`."""
    place = (epoch, key, repeat)
    flip, crop, resized = False, fit.crop, fit.resized
    if subset.flip_aug or subset.random_crop:
        draws = rng(seed, "augment", *place)
        flip = bool(draws.random() < 0.5) and subset.flip_aug
        if subset.random_crop:
            left, top = (int(draws.integers(room - side + 1)) for room, side in zip(resized, fit.bucket, strict=True))
            crop = left, top
    if subset.face_crop_aug_range is not None:
        face = face_of(key)
        if face is not None:
            resized, crop = _around(face, subset, fit, size, seed, place)
    return Augmentation(flip, crop, resized, _color(seed, place) if subset.color_aug else None)


def _color(seed: int, place: tuple[int, str, int]) -> ColorShift | None:
    draws = rng(seed, "augment", *place, "color")
    if draws.random() >= COLOR_CHANCE:
        return None
    if draws.random() < 0.5:
        return ColorShift("hue", float(draws.uniform(-HUE_SPAN, HUE_SPAN)))
    return ColorShift("gamma", float(draws.uniform(1 - GAMMA_SPAN, 1 + GAMMA_SPAN)))


def _around(
    face: Face, subset: SubsetSpec, fit: Fit, size: Size, seed: int, place: tuple[int, str, int]
) -> tuple[Size, tuple[int, int]]:
    """Resized size and cut around a face. Source: sd-scripts' face crop; it moves the cut by a share of the face's size
    before scaling, this by one of its size in the picture that is cut.

    The bucket's shorter side is to be between the two numbers of the range times the face's longer one; pictures are
    never enlarged for that, only where they don't cover their bucket.
    """
    draws = rng(seed, "augment", *place, "face")
    least, most = subset.face_crop_aug_range or (1.0, 1.0)
    longer, short = max(face.w, face.h), min(fit.bucket)
    covers = max(target / side for target, side in zip(fit.bucket, size, strict=True))
    smallest = min(1.0, max(covers, short / (longer * most)))
    largest = min(1.0, max(smallest, short / (longer * least)))
    scale = float(draws.uniform(smallest, largest))
    width, height = (max(goal, int(side * scale + 0.5)) for goal, side in zip(fit.bucket, size, strict=True))
    scale, resized = (covers, fit.resized) if covers >= 1 else (scale, (width, height))
    moved = least != most and longer * scale > short // 10 and longer * scale >= SMALLEST_MOVED_FACE
    reach = int(longer * scale) // 20
    crop = []
    for goal, length, side, middle in zip(fit.bucket, resized, size, (face.cx, face.cy), strict=True):
        at = int(middle * length / side + 0.5)
        start = at - goal // 2
        if subset.random_crop:
            room = max(length - at, at)
            start += int(draws.integers(room + 1)) + int(draws.integers(room + 1)) - room
        elif moved:
            start += int(draws.integers(-reach, reach + 1))
        crop.append(max(0, min(start, length - goal)))
    return resized, (crop[0], crop[1])
