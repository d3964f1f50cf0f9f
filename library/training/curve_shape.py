"""What a loss curve did: where it went flat, where it began to rise, whether it jumped. Pure functions of its points.

What a user is told about it stands in library.training.watch. Standard library only.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median

_SHARE = 0.05
"""What is less than this share of the whole improvement counts as nothing."""
_LEAST = 0.002
"""So does what is less than this share of the loss itself."""
_LATE = 0.75
"""A curve that reaches its floor after this share of its steps was still falling."""
_FEWEST = 5
"""A rise before a jump is looked for in no fewer points."""

Points = Sequence[tuple[int, float]]
"""(step, finite loss), steps ascending."""


@dataclass(frozen=True)
class Shape:
    """A curve, judged. Losses are smoothed ones; steps are those of points.

    Attributes:
        start: loss at the first point, not smoothed.
        improved: whether it ever was noticeably lower than that.
        best: lowest loss; of the part before a jump, if there was one.
        end: loss at the last point.
        tolerance: differences up to this mean nothing.
        flat_from: step from which it no longer fell noticeably; None while it still fell.
        rises_from: last step at which it was near its best, where it rose noticeably after that.
        jumps_at: step after which it rose suddenly, and stayed there.
    """

    start: float
    improved: bool
    best: float
    end: float
    tolerance: float
    flat_from: int | None
    rises_from: int | None
    jumps_at: int | None

    @property
    def ends_above_start(self) -> bool:
        """Whether what was gained was lost again, and more."""
        return self.end > self.start + self.tolerance


def smooth(values: Sequence[float], passes: int) -> list[float]:
    """Values after so many passes of the weights (1, 2, 1)/4; ends stand in for what lies beyond them."""
    found = list(values)
    for _ in range(passes):
        padded = [found[0], *found, found[-1]]
        found = [(a + 2 * b + c) / 4 for a, b, c in zip(padded, padded[1:], padded[2:], strict=False)]
    return found


def noise_of(values: Sequence[float]) -> float:
    """Standard deviation of the noise around a smooth curve, from the median size of second differences.

    White noise of deviation s has second differences of deviation sqrt(6) s, whose median size is 0.6745 times that.
    0.0 for less than five values.
    """
    if len(values) < 5:
        return 0.0
    bends = [abs(a - 2 * b + c) for a, b, c in zip(values, values[1:], values[2:], strict=False)]
    return median(bends) / (0.6745 * math.sqrt(6))


def judge(points: Points) -> Shape:
    """The shape of a curve of at least one point.

    What noise does to the smoothed curve is taken from the variance of n passes of (1, 2, 1)/4, about that of a normal
    curve of variance n/2; at the ends, where neighbours are missing on one side, it is twice as large.
    """
    jump = _jump([loss for _, loss in points])
    calm = points if jump is None else points[: jump + 1]
    values = [loss for _, loss in calm]
    passes = len(values) // 12 + 1 if len(values) >= 5 else 0
    curve = smooth(values, passes)
    left = 1.0 if passes == 0 else math.sqrt(1 / (2 * math.sqrt(math.pi * passes / 2)))
    rough = noise_of(values)
    noise = rough * left
    best = min(curve)
    gain = values[0] - best
    least = max(_SHARE * gain, _LEAST * abs(best))
    tolerance = max(least, 2.5 * noise)
    first = next(i for i, loss in enumerate(curve) if loss <= best + tolerance)
    last = max(i for i, loss in enumerate(curve) if loss <= best + tolerance / 2)
    rises = (jump is None or len(calm) >= _FEWEST) and curve[-1] > best + max(least, 4 * noise * math.sqrt(2))
    steps = [step for step, _ in calm]
    late = steps[first] > steps[0] + _LATE * (points[-1][0] - steps[0])
    tail = [loss for _, loss in points[-(len(points) // 12 + 1) :]]
    return Shape(
        start=values[0],
        improved=gain > max(least, 3 * rough),
        best=best,
        end=curve[-1] if jump is None else median(tail),
        tolerance=tolerance,
        flat_from=None if late and not rises else steps[first],
        rises_from=steps[last] if rises else None,
        jumps_at=None if jump is None else steps[-1],
    )


def _jump(values: Sequence[float]) -> int | None:
    """The index before the first sudden rise that lasted, or None.

    Sudden is what takes at most a twelfth of the curve, is many times what neighbours usually differ by, undoes half
    of what was gained until then, and is a tenth of the loss.
    """
    if len(values) < 4:
        return None
    usual = median(abs(b - a) for a, b in pairwise(values))
    reach = len(values) // 12 + 1
    for i, value in enumerate(values[:-1]):
        for after in range(i + 1, min(i + reach, len(values) - 1) + 1):
            rise = values[after] - value
            gain = max(values[: i + 1]) - value
            if rise > max(8 * usual, gain / 2, value / 10) and median(values[after:]) > value + rise / 2:
                return max(range(i, after), key=lambda k: values[k + 1] - values[k])
    return None


def value_at(points: Points, step: int) -> float:
    """The loss at any step, by linear interpolation; beyond the ends, that of the nearest point."""
    after = next((i for i, (at, _) in enumerate(points) if at >= step), len(points))
    if after == 0:
        return points[0][1]
    if after == len(points):
        return points[-1][1]
    (left, low), (right, high) = points[after - 1], points[after]
    return low + (high - low) * (step - left) / (right - left)


def thinned(points: Points, most: int) -> list[tuple[int, float]]:
    """At most so many points: means of equally long stretches, each at the step of its last point."""
    size = max(1, -(-len(points) // most))
    pieces = [points[i : i + size] for i in range(0, len(points), size)]
    return [(piece[-1][0], fmean(loss for _, loss in piece)) for piece in pieces]
