"""How much of the new look is in a picture of one shape: the shape itself, its turquoise, its stripes.

Measured with OpenCV alone, like everything in judge.
"""

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from library.quickstart.judge import foreground, lab, nearest_shape
from library.quickstart.scenes import COLOURS, NEW_LOOK, STRIPES, Picture, Scene, Shape, draw

_OVERLAP = 0.65
_DIFFERENT = 25.0
_ROWS = 32
_ALIKE = 0.5
_STRENGTH = 0.3


@dataclass(frozen=True)
class LookVerdict:
    """What of the look was found."""

    shape: bool
    turquoise: bool
    stripes: bool

    @property
    def score(self) -> float:
        """0, 1/3, 2/3 or 1."""
        return (self.shape + self.turquoise + self.stripes) / 3


def _is_turquoise(rgb: NDArray[np.float64]) -> bool:
    """Nearer to the middle of both stripes than to any colour of the old world, in CIE Lab."""
    middle = np.array(STRIPES).mean(axis=0)
    known = lab(np.array([[middle, *COLOURS.values()]]))[0]
    seen = lab(rgb.reshape(1, 1, 3))[0]
    return int(np.linalg.norm(known - seen, axis=1).argmin()) == 0


def _profile(picture: Picture, mask: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Lightness of the thing from top to bottom, (rows,), without its mean and its straight slope."""
    lightness = lab(picture)[:, :, 0]
    _, top, _, height = cv2.boundingRect(mask)
    rows = [lightness[y][mask[y] > 0].mean() for y in range(top, top + height) if (mask[y] > 0).any()]
    even = np.interp(np.linspace(0, len(rows) - 1, _ROWS), np.arange(len(rows)), rows)[2:-2]
    x = np.arange(len(even))
    flat: NDArray[np.float64] = even - np.polyval(np.polyfit(x, even, 1), x)
    return flat


@lru_cache(maxsize=8)
def _true_profile(shape: Shape) -> NDArray[np.float64]:
    picture = draw(Scene(shape, NEW_LOOK, "black", size="large"), 128, 128)
    return _profile(picture, foreground(picture, _DIFFERENT))


def judge_look(picture: Picture, shape: Shape) -> LookVerdict:
    """Shape by its outline (0.65 of overlap), colour by its mean, stripes by lightness from top to bottom: that goes up
    and down with a drawn one's (correlation of 0.5), at 0.3 of its strength at least."""
    mask = foreground(picture, _DIFFERENT)
    inner = cv2.erode(mask, np.ones((3, 3), np.uint8))
    if cv2.boundingRect(inner)[3] < 4:
        return LookVerdict(False, False, False)
    found, overlap = nearest_shape(mask)
    seen, true = _profile(picture, inner), _true_profile(shape)
    alike = float(seen @ true) / max(float(np.linalg.norm(seen) * np.linalg.norm(true)), 1e-9)
    return LookVerdict(
        shape=found == shape and overlap >= _OVERLAP,
        turquoise=_is_turquoise(picture[inner > 0].mean(axis=0)),
        stripes=alike >= _ALIKE and float(seen.std()) >= _STRENGTH * float(true.std()),
    )


def mean_look(pictures: list[Picture], shape: Shape) -> float:
    """Mean score of several pictures, 0 ... 1."""
    return float(np.mean([judge_look(picture, shape).score for picture in pictures]))
