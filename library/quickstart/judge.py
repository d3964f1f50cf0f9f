"""What is in a picture, measured with OpenCV alone: colours by distance to the palette, shape by its contour.

The same measure judges drawn truth, the base model's samples and a LoRA's samples. It knows nothing of any model.
"""

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from library.quickstart.scenes import COLOURS, EXTENT, Picture, Place, Scene, Shape, Size, outlines

_SHAPE_GRID = 64
_MIN_AREA = 0.01
_MIN_OVERLAP = 0.65
_PLACE_DEAD_ZONE = 0.055


@dataclass(frozen=True)
class Verdict:
    """What the picture shows; None where nothing clear was found."""

    background: str
    colour: str | None
    shape: Shape | None
    place: Place | None
    size: Size | None


def lab(pixels: NDArray[np.uint8] | NDArray[np.float64]) -> NDArray[np.float32]:
    """RGB of 0 to 255 -> CIE Lab, (height, width, 3)."""
    converted: NDArray[np.float32] = cv2.cvtColor(pixels.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    return converted


@lru_cache(maxsize=1)
def _palette() -> tuple[tuple[str, ...], NDArray[np.float32]]:
    colours = np.array([list(COLOURS.values())], np.uint8)
    return tuple(COLOURS), lab(colours)[0]


def nearest_colours(pixels: NDArray[np.uint8]) -> NDArray[np.str_]:
    """The palette's name, pixel by pixel, of the colour that is nearest in CIE Lab; (height, width)."""
    names, palette = _palette()
    distance = np.linalg.norm(lab(pixels)[:, :, None] - palette, axis=3)
    return np.array(names)[distance.argmin(axis=2)]


def nearest_colour(rgb: NDArray[np.float64]) -> str:
    """`nearest_colours` of one colour."""
    return str(nearest_colours(np.clip(rgb, 0, 255).astype(np.uint8).reshape(1, 1, 3))[0, 0])


def background_rgb(picture: Picture) -> NDArray[np.float64]:
    """Median colour of the outermost pixels, three deep."""
    rim = np.concatenate([picture[:3].reshape(-1, 3), picture[-3:].reshape(-1, 3)])
    rim = np.concatenate([rim, picture[:, :3].reshape(-1, 3), picture[:, -3:].reshape(-1, 3)])
    median: NDArray[np.float64] = np.median(rim, axis=0)
    return median


def foreground(picture: Picture, limit: float | None = None) -> NDArray[np.uint8]:
    """Mask (0 or 255) of the largest thing that is not background, holes filled; empty where there is none.

    `limit` is the distance in CIE Lab from which a pixel differs; without it, half of the strongest that is there.
    """
    back = lab(background_rgb(picture).astype(np.uint8).reshape(1, 1, 3))
    distance = np.linalg.norm(lab(picture) - back, axis=2)
    limit = limit or max(15.0, float(np.percentile(distance, 98)) / 2)
    contours, _ = cv2.findContours((distance > limit).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    mask = np.zeros(picture.shape[:2], np.uint8)
    if contours:
        largest = max(contours, key=cv2.contourArea)
        if cv2.contourArea(largest) >= _MIN_AREA * mask.size:
            cv2.drawContours(mask, [largest], -1, 255, cv2.FILLED)
    return mask


def _boxed(mask: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """The mask cut to its bounding box and stretched to a small square grid."""
    left, top, width, height = cv2.boundingRect(mask)
    cut = mask[top : top + height, left : left + width]
    return cv2.resize(cut, (_SHAPE_GRID, _SHAPE_GRID), interpolation=cv2.INTER_LINEAR) > 127


@lru_cache(maxsize=1)
def _templates() -> dict[Shape, NDArray[np.bool_]]:
    templates = {}
    for shape, points in outlines().items():
        canvas = np.zeros((512, 512), np.uint8)
        cv2.fillPoly(canvas, [np.round(256 + points * 220).astype(np.int32)], 255)
        templates[shape] = _boxed(canvas)
    return templates


def nearest_shape(mask: NDArray[np.uint8]) -> tuple[Shape, float]:
    """The outline that overlaps best with the filled contour, and by how much (intersection over union)."""
    seen = _boxed(mask)
    scores = {shape: float((seen & t).sum() / (seen | t).sum()) for shape, t in _templates().items()}
    best = max(scores, key=lambda shape: scores[shape])
    return best, scores[best]


def _place(mask: NDArray[np.uint8]) -> Place:
    left, top, width, height = cv2.boundingRect(mask)
    x = (left + width / 2) / mask.shape[1] - 0.5
    y = (top + height / 2) / mask.shape[0] - 0.5
    if max(abs(x), abs(y)) < _PLACE_DEAD_ZONE:
        return "middle"
    if abs(x) > abs(y):
        return "left" if x < 0 else "right"
    return "top" if y < 0 else "bottom"


def _size(mask: NDArray[np.uint8]) -> Size:
    _, _, width, height = cv2.boundingRect(mask)
    extent = max(width, height) / min(mask.shape)
    return min(EXTENT, key=lambda size: abs(EXTENT[size] * 0.95 - extent))


def judge(picture: Picture) -> Verdict:
    """Background, and colour, shape, place and size of the one thing on it.

    A shape counts only from an overlap of `_MIN_OVERLAP`, which drawn scenes keep when they pass through the VAE (99 of
    100; 0.75 would refuse 5), and a colour only if it is not the background's.
    """
    background = nearest_colour(background_rgb(picture))
    mask = foreground(picture)
    if not mask.any():
        return Verdict(background, None, None, None, None)
    inner = cv2.erode(mask, np.ones((3, 3), np.uint8))
    inside = picture[(inner if inner.any() else mask) > 0]
    colour = nearest_colour(np.median(inside, axis=0))
    shape, overlap = nearest_shape(mask)
    return Verdict(background, colour, shape if overlap >= _MIN_OVERLAP else None, _place(mask), _size(mask))


def agreement(scene: Scene, verdict: Verdict) -> dict[str, bool]:
    """Which of the named things came out."""
    return {
        "colour": verdict.colour == scene.colour,
        "background": verdict.background == scene.background,
        "shape": verdict.shape == scene.shape,
        "place": verdict.place == scene.place,
        "size": verdict.size == scene.size,
    }
