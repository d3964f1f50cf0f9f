"""Which rank a change gets: as many singular values as a criterion needs, no more. It knows nothing of files.

All criteria look at the singular values s of a module's change, greatest first, and keep the first k of them:

* `static`: k is given.
* `sv_ratio` p: every value greater than s_1 / p.
* `sv_cumulative` p: the smallest k whose values add up to at least p times the sum of all.
* `sv_fro` p: the smallest k that keeps at least p times the Frobenius norm; their squares add up to p^2 of all.

`legacy` keeps one more, as sd-scripts does. At least one is kept always, and a limit may stand above all of it.
Imports no torch before there are values to look at.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import isfinite, sqrt
from typing import TYPE_CHECKING, Literal

from library.errors import Problem

if TYPE_CHECKING:
    from torch import Tensor

Method = Literal["static", "sv_ratio", "sv_fro", "sv_cumulative"]
DYNAMIC: tuple[Method, ...] = ("sv_ratio", "sv_fro", "sv_cumulative")
_LEGACY_ZERO = 1e-6
"""sd-scripts gives rank 1 to a change whose greatest singular value isn't above this."""
_STEPS = 64
_DIGITS = 1_000_000


@dataclass(frozen=True)
class Criterion:
    """How ranks are chosen.

    Attributes:
        method: `static` keeps as many as the limit allows.
        parameter: of a dynamic method: at least 1 of `sv_ratio`, else above 0 and at most 1.
        legacy: one rank more than a dynamic method needs.
    """

    method: Method = "static"
    parameter: float = 1.0
    legacy: bool = False

    def __str__(self) -> str:
        return self.method if self.method == "static" else f"{self.method} {self.parameter:.10g}"

    def problem(self, flag: str) -> Problem | None:
        """What is wrong with the parameter; `flag` is its name."""
        if self.method == "sv_ratio" and not (isfinite(self.parameter) and self.parameter >= 1):
            return Problem(flag, f"{self.parameter:g} is below 1", "sv_ratio keeps values above the greatest / this")
        if self.method in ("sv_fro", "sv_cumulative") and not 0 < self.parameter <= 1:
            return Problem(flag, f"{self.parameter:g} is no share", f"{self.method} takes numbers above 0 and up to 1")
        return None


def needed(values: "Tensor", criterion: Criterion) -> int:
    """The rank that a criterion needs, before any limit.

    Args:
        values: (k,) singular values of one change, descending.

    Returns:
        1..k.
    """
    count = len(values)
    if count == 0 or criterion.method == "static":
        return max(count, 1)
    greatest = float(values[0])
    if greatest <= (_LEGACY_ZERO if criterion.legacy else 0.0):
        return 1
    if criterion.method == "sv_ratio":
        raw = int((values > greatest / criterion.parameter).sum())
    else:
        import torch

        power, share = (1, criterion.parameter) if criterion.method == "sv_cumulative" else (2, criterion.parameter**2)
        sums = torch.cumsum((values.double() / greatest) ** power, dim=0)
        raw = int(torch.searchsorted(sums, share * sums[-1])) + 1
    return min(max(raw, 1) + criterion.legacy, count)


def chosen(values: "Tensor", criterion: Criterion, limit: int | None = None) -> int:
    """The rank that a change gets: what the criterion needs, at most `limit`, at least 1."""
    rank = needed(values, criterion)
    return rank if limit is None else max(1, min(rank, limit))


def retained(values: "Tensor", rank: int) -> float:
    """The share of the Frobenius norm that the first `rank` singular values hold; 1 of a zero change."""
    whole = float(values.norm())
    return float(values[:rank].norm()) / whole if whole else 1.0


def fitted(size: Callable[[Criterion], int], start: Criterion, limit: int, spread: float) -> Criterion | None:
    """The greatest parameter of a dynamic method with which a file is at most `limit` bytes.

    Args:
        size: bytes of the file by criterion; it must not shrink as the parameter grows.
        start: the method; its parameter doesn't count.
        spread: the parameter of `sv_ratio` that keeps everything: above the ratio of the greatest to the least value.

    Returns:
        The criterion, its parameter rounded down to six digits behind the point; None where even the smallest file is
        larger.
    """
    ratio = start.method == "sv_ratio"
    low, high = (1.0, max(spread, 1.0)) if ratio else (1 / _DIGITS, 1.0)
    if size(replace(start, parameter=low)) > limit:
        return None
    if size(replace(start, parameter=high)) <= limit:
        return replace(start, parameter=high)
    for _ in range(_STEPS):
        middle = sqrt(low * high) if ratio else (low + high) / 2
        low, high = (middle, high) if size(replace(start, parameter=middle)) <= limit else (low, middle)
    rounded = int(low * _DIGITS) / _DIGITS
    return replace(start, parameter=max(rounded, 1.0 if ratio else 1 / _DIGITS))
