"""The algebra of changes of low rank: decomposition, truncation, sums, norms and products of two factors, without the
full matrix. It knows nothing of files or of which rank is wanted; that is in `ranks`.

Both factors are brought to triangles by a QR decomposition; what is left is a core of rank x rank. So a decomposition
costs O((out + in) r^2) where that of the whole matrix costs O(out * in * min(out, in)). All of it runs in float64.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt

import torch
from torch import Tensor

from library.errors import UserError
from library.weights.loras.forms import Factors

_ROUNDING = 2.0**-52
_SMALL = 1e-6
"""Singular vectors of values below this share of the greatest are formed from the triangles' orthonormal factors."""
_CANCELLED = 1e-5
"""Below this relative difference a distance told from Gram matrices has lost too many digits."""


@dataclass(frozen=True)
class Svd:
    """The singular values of a change, scale included, and their vectors; float64.

    Attributes:
        u: (out, k); columns are orthonormal.
        s: (k,), descending; k = min(out, in, rank).
        vh: (k, in * kernel); rows are orthonormal.
        floor: singular values up to this are rounding, told from the sizes of the factors: of A - A all are.
    """

    u: Tensor
    s: Tensor
    vh: Tensor
    floor: float = 0.0


def svd_of(found: Factors, name: str = "a module") -> Svd:
    """The exact singular value decomposition of `found.product()`.

    Args:
        name: how messages call the module.

    Raises:
        UserError: a number is not finite.
    """
    up, down = _doubles(found, name)
    left, upper = torch.linalg.qr(up)
    right, lower = torch.linalg.qr(down.T)
    u, s, vh = torch.linalg.svd(upper @ lower.T * found.scale, full_matrices=False)
    return Svd(left @ u, s, vh @ right.T, floor=_floor(found, upper, lower))


def truncated(svd: Svd, rank: int, shape: tuple[int, ...]) -> Factors:
    """The best factors of at most `rank`, at least 1: down holds right singular vectors, up the left ones times their
    values; scale 1.

    Args:
        shape: of the weight that the factors change.
    """
    kept = max(1, min(rank, len(svd.s)))
    return Factors(svd.u[:, :kept] * svd.s[:kept], svd.vh[:kept], shape)


def shortened(found: Factors, choose: Callable[[Tensor], int], name: str = "a module") -> tuple[Factors, Tensor]:
    """`truncated(svd_of(found), ...)` to a rank that is chosen by the singular values, at a fraction of the cost: only
    the vectors that stay are formed, and from the factors themselves.

    With up = Q R, down^T = P T and U S V^T the decomposition of R T^T: Q U S = up T^T V, and V^T P^T = S^-1 U^T R down.

    Args:
        choose: given (k,) values, descending, scale included, float64: the rank.

    Returns:
        The factors, scale 1, and the values.

    Raises:
        UserError: a number is not finite.
    """
    up, down = _doubles(found, name)
    upper, lower = _triangle(up), _triangle(down.T)
    u, s, vh = torch.linalg.svd(upper @ lower.T * found.scale, full_matrices=False)
    rank = max(1, min(choose(s), len(s)))
    if float(s[rank - 1]) <= _SMALL * float(s[0]):
        return truncated(svd_of(found, name), rank, found.shape), s
    left = up @ (lower.T @ vh[:rank].T * found.scale)
    right = ((u[:, :rank] / s[:rank]).T @ upper * found.scale) @ down
    return Factors(left, right, found.shape), s


def singular_values(found: Factors, name: str = "a module") -> Tensor:
    """(min(out, in, rank),) in float64, descending, scale included.

    Raises:
        UserError: a number is not finite.
    """
    return spectrum(found, name)[0]


def spectrum(found: Factors, name: str = "a module") -> tuple[Tensor, float]:
    """The same, and what they have to be above to be more than rounding: `Svd.floor`.

    Raises:
        UserError: a number is not finite.
    """
    up, down = _doubles(found, name)
    upper, lower = _triangle(up), _triangle(down.T)
    values = torch.linalg.svdvals(upper @ lower.T * found.scale)
    return values, _floor(found, upper, lower)


def _floor(found: Factors, upper: Tensor, lower: Tensor) -> float:
    size = abs(found.scale) * float(upper.norm()) * float(lower.norm())
    return _ROUNDING * max(*found.up.shape, *found.down.shape) * size


def _triangle(matrix: Tensor) -> Tensor:
    return torch.linalg.qr(matrix, mode="r").R


def concatenated(parts: Sequence[Factors], weights: Sequence[float], name: str = "a module") -> Factors:
    """The exact sum of weighted changes: a change whose rank is the sum of theirs, scale 1, in float64.

    Each weight and scale counts once, in the up-factor. A linear layer and a 1x1 convolution of the same sizes can be
    added, as the latter.

    Raises:
        UserError: they change weights of different sizes, or a number is not finite.
    """
    first = parts[0]
    ups, downs = [], []
    for part, weight in zip(parts, weights, strict=True):
        if _sides(part) != _sides(first):
            wrong = f"changes of {list(part.shape)} and {list(first.shape)} don't go together"
            raise UserError.single(name, wrong, "give LoRAs of one family")
        up, down = _doubles(part, name)
        ups.append(up * (weight * part.scale))
        downs.append(down)
    shape = max((part.shape for part in parts), key=len)
    return Factors(torch.cat(ups, dim=1), torch.cat(downs, dim=0), shape)


def inner(one: Factors, other: Factors) -> float:
    """The Frobenius inner product of two changes: the sum over all entries of their products."""
    (up, down), (other_up, other_down) = _doubles(one), _doubles(other)
    return one.scale * other.scale * float(((up.T @ other_up) * (down @ other_down.T)).sum())


def norm(found: Factors) -> float:
    """The Frobenius norm of a change; not finite where its numbers aren't."""
    square = inner(found, found)
    return sqrt(max(square, 0.0)) if isfinite(square) else square


def distance(one: Factors, other: Factors, name: str = "a module") -> float:
    """The Frobenius norm of the difference of two changes.

    Where they are nearly the same, differences of Gram matrices cancel, and it is read from the triangles of a QR
    decomposition instead.

    Raises:
        UserError: they change weights of different sizes, or a number is not finite.
    """
    both = concatenated((one, other), (1.0, -1.0), name)
    first, second = norm(one), norm(other)
    gram = norm(both)
    if gram > _CANCELLED * max(first, second):
        return gram
    upper, lower = _triangle(both.up), _triangle(both.down.T)
    found = float((upper @ lower.T).norm())
    rounding = _ROUNDING * max(*both.up.shape, *both.down.shape) * float(upper.norm()) * float(lower.norm())
    return found if found > rounding else 0.0


def numerical_rank(found: Factors, eps: float = 1e-10, name: str = "a module") -> int:
    """How many singular values are more than `eps` times the greatest, and more than rounding; 0 of a zero change.

    Raises:
        UserError: a number is not finite.
    """
    values, floor = spectrum(found, name)
    return int((values > max(eps * float(values[0]), floor)).sum()) if len(values) else 0


def _sides(found: Factors) -> tuple[int, int, tuple[int, ...]]:
    """What has to agree between two changes that are added; a kernel of 1x1 counts as none."""
    kernel = tuple(found.shape[2:])
    return found.shape[0], found.shape[1], () if set(kernel) <= {1} else kernel


def _doubles(found: Factors, name: str | None = None) -> tuple[Tensor, Tensor]:
    """Both factors in float64.

    Raises:
        UserError: a number is not finite; only where a name is given.
    """
    up, down = found.up.double(), found.down.double()
    if name is not None and not (isfinite(found.scale) and bool(up.isfinite().all()) and bool(down.isfinite().all())):
        raise UserError.single(name, "holds numbers that are not finite", "the file is damaged, or was trained to NaN")
    return up, down
