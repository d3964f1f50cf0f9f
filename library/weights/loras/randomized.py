"""The best change of low rank to a whole matrix, by randomized subspace iteration where that is cheaper than a whole
decomposition, and with its true error. For changes that are factors already there is `low_rank`.

Halko, Martinsson and Tropp, "Finding structure with randomness" (2011), algorithms 4.4 and 5.1. Passes over the matrix
go on until another one improves the error by less than a given share. Draws come from `library.rng`, by a name, so the
same matrix gives the same factors in whatever order modules come.
"""

from dataclasses import dataclass
from math import sqrt

import numpy as np
import torch
from torch import Tensor

from library.errors import UserError
from library.rng import rng
from library.weights.loras.low_rank import Svd

_SMALL = 192
"""Matrices with a shorter side up to this are decomposed as a whole."""
_SHARE = 0.4
"""So are those of which more than this share of the shorter side would be sampled."""
_PASSES = 24
_NOTHING = 5e-4
"""Below this share of the norm, the error as it is told from singular values is float32's rounding."""


@dataclass(frozen=True)
class Cut:
    """A matrix cut to a rank.

    Attributes:
        svd: the leading singular values and vectors, float32; all of them where the matrix was decomposed as a whole.
        norm: the Frobenius norm of the whole matrix.
        passes: how often the matrix was multiplied by a basis and back; 0 where it was decomposed as a whole.
    """

    svd: Svd
    norm: float
    passes: int

    @property
    def values(self) -> Tensor:
        """The singular values, (k,) float64; where only some are known, one more with the norm of all others."""
        if not self.passes:
            return self.svd.s.double().cpu()
        rest = max(self.norm**2 - float(self.svd.s.double().square().sum()), 0.0)
        return torch.cat([self.svd.s.double().cpu(), torch.tensor([sqrt(rest)], dtype=torch.float64)])


def cut(matrix: Tensor, rank: int, *, name: str, seed: int = 0, exact: bool = False, tolerance: float = 0.01) -> Cut:
    """The leading singular values and vectors of a matrix.

    Args:
        matrix: (m, n) float32; it is left as it is.
        rank: how many are wanted; at most min(m, n) are there.
        name: of the module: its draws differ from those of others, and errors name it.
        exact: decompose the whole matrix, whatever that takes.
        tolerance: stop when a pass makes the error smaller by no more than this share of it.

    Raises:
        UserError: a number is not finite.
    """
    norm = float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
    if not np.isfinite(norm):
        wrong = "the difference of the models holds numbers that are not finite"
        raise UserError.single(name, wrong, "one of the files is damaged, or was trained to NaN")
    short = min(matrix.shape)
    rank = min(rank, short)
    width = min(rank + max(8, rank // 4), short)
    if exact or short <= _SMALL or width > _SHARE * short:
        return Cut(Svd(*torch.linalg.svd(matrix, full_matrices=False)), norm, 0)
    return _iterated(matrix, rank, width, norm, tolerance, rng(seed, "init", "extract", name))


def _iterated(matrix: Tensor, rank: int, width: int, norm: float, tolerance: float, draws: np.random.Generator) -> Cut:
    start = torch.from_numpy(draws.standard_normal((matrix.shape[1], width), dtype=np.float32)).to(matrix.device)
    left = torch.linalg.qr(matrix @ start).Q
    before = norm
    for passes in range(1, _PASSES + 1):
        right, core = torch.linalg.qr(matrix.T @ left)
        inner, s, outer = torch.linalg.svd(core.T)
        error = sqrt(max(norm**2 - float(s[:rank].double().square().sum()), 0.0))
        settled = passes > 1 and before - error <= tolerance * before
        if settled or error <= _NOTHING * norm or passes == _PASSES:
            break
        before = error
        left = torch.linalg.qr(matrix @ right).Q
    return Cut(Svd(left @ inner[:, :rank], s[:rank], outer[:rank] @ right.T), norm, passes)


def error_of(matrix: Tensor, up: Tensor, down: Tensor) -> float:
    """The Frobenius norm of what two factors leave of a matrix, from all its entries."""
    return float(torch.linalg.vector_norm(torch.addmm(matrix, up, down, alpha=-1.0), dtype=torch.float64))


def clamped(up: Tensor, down: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """Both factors within plus and minus one quantile of all their values, signs included; 1 leaves them."""
    if quantile >= 1:
        return up, down
    values = torch.cat([up.flatten(), down.flatten()]).cpu().numpy()
    bound = float(np.quantile(values, quantile))
    return up.clamp(-bound, bound), down.clamp(-bound, bound)
