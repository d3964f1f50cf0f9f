"""How much of a blorp is in a picture: its four parts, each in its colour, its share of the whole and its place.

Measured with OpenCV alone, like everything in judge.
"""

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from library.quickstart.judge import foreground, nearest_colours
from library.quickstart.scenes import Picture, Scene, draw

_PARTS = {"hat": "yellow", "body": "purple", "feet": "red", "eye": "white"}
_LEAST, _MOST = 0.45, 1.8
_ASIDE = 0.2
_DIFFERENT = 25.0


@dataclass(frozen=True)
class BlorpVerdict:
    """Which parts were found where they belong."""

    hat: bool
    body: bool
    feet: bool
    eye: bool

    @property
    def score(self) -> float:
        """0, 0.25, 0.5, 0.75 or 1."""
        return (self.hat + self.body + self.feet + self.eye) / 4


@dataclass(frozen=True)
class _Spot:
    """A colour's share of the thing and its centre, both relative to the thing's bounding box (0 ... 1)."""

    share: float
    x: float
    y: float


def _spots(picture: Picture) -> dict[str, _Spot]:
    mask = foreground(picture, _DIFFERENT)
    if not mask.any():
        return {}
    left, top, width, height = cv2.boundingRect(mask)
    names = nearest_colours(picture)
    spots = {}
    for part, colour in _PARTS.items():
        ys, xs = np.nonzero((names == colour) & (mask > 0))
        if len(xs):
            x, y = (float(xs.mean()) - left) / width, (float(ys.mean()) - top) / height
            spots[part] = _Spot(len(xs) / cv2.countNonZero(mask), x, y)
    return spots


@lru_cache(maxsize=1)
def _truth() -> dict[str, _Spot]:
    return _spots(draw(Scene("blorp", "", "blue", size="large"), 128, 128))


def _present(spots: dict[str, _Spot], part: str) -> bool:
    true = _truth()[part]
    return part in spots and _LEAST * true.share <= spots[part].share <= _MOST * true.share


def judge_blorp(picture: Picture) -> BlorpVerdict:
    """A part counts with 0.45 to 1.8 of its true share of the thing, in its place above, on or under the body."""
    spots = _spots(picture)
    body = _present(spots, "body")

    def belongs(part: str, low: float, high: float) -> bool:
        if not (body and _present(spots, part)):
            return False
        down = spots[part].y - spots["body"].y
        return low <= down <= high and abs(spots[part].x - spots["body"].x) < _ASIDE

    return BlorpVerdict(
        hat=belongs("hat", -0.6, -0.12), body=body, feet=belongs("feet", 0.12, 0.6), eye=belongs("eye", -0.15, 0.25)
    )


def blorp_score(picture: Picture) -> float:
    """`judge_blorp(picture).score`."""
    return judge_blorp(picture).score


def mean_score(pictures: list[Picture]) -> float:
    """Mean score of several pictures, 0 ... 1."""
    scores: NDArray[np.float64] = np.array([blorp_score(picture) for picture in pictures])
    return float(scores.mean())
