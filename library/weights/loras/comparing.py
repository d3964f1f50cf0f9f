"""Two LoRA files side by side: what each changes of every module, and how far the changes are apart.

Ranks, alphas, layouts and dtypes may differ: compared are the changes of the weights. Nothing is printed here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from pathlib import Path

import torch
from torch import Tensor

from library.console import track
from library.errors import UserError
from library.weights.loras.amended import STALE
from library.weights.loras.forms import delta, factors
from library.weights.loras.lora import Lora, Module
from library.weights.loras.low_rank import distance, inner, norm

_MAGNITUDES = "dora_scale"


@dataclass(frozen=True)
class Pair:
    """What two files change of one module.

    Attributes:
        norms: Frobenius norms of both changes.
        product: their inner product.
        apart: the norm of their difference.
        ranks: None for what is no product of small factors.
        magnitudes: how far the magnitudes of a DoRA are apart, against the larger ones; 0 without any, 1 if only one
            file has them.
    """

    name: str
    norms: tuple[float, float]
    product: float
    apart: float
    ranks: tuple[int | None, int | None] = (None, None)
    magnitudes: float = 0.0

    @property
    def difference(self) -> float:
        """0 of the same changes; 1 if one is zero; 2 of opposite ones."""
        return max(_share(self.apart, max(self.norms)), self.magnitudes)


@dataclass(frozen=True)
class Comparison:
    """Two files.

    Attributes:
        pairs: modules that both have, in the first file's order.
        strangers: modules that both have in forms that can't be compared as numbers, and that aren't the same bytes.
        only: modules that one file alone has, for each file.
        rest: keys of other tensors that differ or that one file alone has.
        metadata: keys whose values differ, with both; empty where a file has none. Hashes of the file are left out.
    """

    pairs: tuple[Pair, ...]
    strangers: tuple[str, ...]
    only: tuple[tuple[str, ...], tuple[str, ...]]
    rest: tuple[str, ...]
    metadata: Mapping[str, tuple[str, str]]

    def above(self, tolerance: float) -> list[str]:
        """Modules whose relative difference is larger; what only one file has counts as 1, as does what can't be
        compared."""
        found = [pair.name for pair in self.pairs if not pair.difference <= tolerance]
        return found if tolerance >= 1 else [*found, *self.strangers, *self.only[0], *self.only[1], *self.rest]


@dataclass(frozen=True)
class Total:
    """Several modules as one change: `norms`, `cosine` (None where a change is zero), `difference` as of a pair, and
    the largest one of a single module."""

    norms: tuple[float, float]
    cosine: float | None
    difference: float
    largest: float


def compare(one: Lora, other: Lora, device: torch.device | None = None) -> Comparison:
    """Compare two files.

    Raises:
        UserError: a number is not finite, modules of one name have different sizes, or there is none that both have.
    """
    shared = [name for name in one.modules if name in other.modules]
    if not shared:
        wrong = f"has no module that {one.path} has, so that there is nothing to compare"
        raise UserError.single(str(other.path), wrong, "give LoRAs of one family, for the same parts")
    pairs, strangers = [], []
    for name in track(shared, "comparing", len(shared)):
        pair = _pair(one, other, name, device)
        if pair is None:
            strangers.append(name)
        else:
            pairs.append(pair)
    only = tuple(name for name in one.modules if name not in other.modules)
    others = tuple(name for name in other.modules if name not in one.modules)
    rest = tuple(sorted(key for key in one.rest.keys() | other.rest.keys() if not _same(one.rest, other.rest, key)))
    return Comparison(tuple(pairs), tuple(strangers), (only, others), rest, _metadata(one.metadata, other.metadata))


def total(pairs: Sequence[Pair]) -> Total:
    """Pairs as one change."""
    norms = tuple(sqrt(sum(pair.norms[place] ** 2 for pair in pairs)) for place in (0, 1))
    product = sum(pair.product for pair in pairs)
    apart = sqrt(sum(pair.apart**2 for pair in pairs))
    cosine = product / (norms[0] * norms[1]) if norms[0] and norms[1] else None
    largest = max((pair.difference for pair in pairs), default=0.0)
    return Total((norms[0], norms[1]), cosine, _share(apart, max(norms)), largest)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _pair(one: Lora, other: Lora, name: str, device: torch.device | None) -> Pair | None:
    first, second = one.modules[name], other.modules[name]
    left, right = factors(first, torch.float64, device), factors(second, torch.float64, device)
    if left is None or right is None:
        return _whole(one.path, other.path, first, second, device)
    norms = _finite(norm(left), one.path, name), _finite(norm(right), other.path, name)
    magnitudes = _magnitudes(first, second)
    _finite(magnitudes, other.path, name)
    apart = distance(left, right, f"{one.path} and {other.path}: {name}")
    return Pair(name, norms, inner(left, right), apart, (left.rank, right.rank), magnitudes=magnitudes)


def _finite(number: float, path: Path, name: str) -> float:
    if not isfinite(number):
        raise UserError.single(f"{path}: {name}", "holds numbers that are not finite", "give a sound file")
    return number


def _whole(path: Path, other_path: Path, first: Module, second: Module, device: torch.device | None) -> Pair | None:
    """Modules of which one at least has no small factors: by the changes as whole matrices, else, if both are of one
    form, by the numbers that stand in the files; None where neither can be."""
    left, right = (delta(module, torch.float64, device) for module in (first, second))
    if left is None or right is None:
        shapes = [{leaf: tensor.shape for leaf, tensor in module.leaves.items()} for module in (first, second)]
        if shapes[0] != shapes[1] or first.alpha != second.alpha:
            return None
        stored = [
            torch.cat([module.leaves[leaf].double().flatten() for leaf in shapes[0]]) for module in (first, second)
        ]
        left, right = stored
    if left.numel() != right.numel():
        return None
    left, right = left.flatten(), right.flatten()
    norms = _finite(float(left.norm()), path, first.name), _finite(float(right.norm()), other_path, first.name)
    return Pair(first.name, norms, float(left @ right), float((left - right).norm()))


def _magnitudes(first: Module, second: Module) -> float:
    left, right = first.leaves.get(_MAGNITUDES), second.leaves.get(_MAGNITUDES)
    if left is None or right is None:
        return 0.0 if left is right else 1.0
    if left.numel() != right.numel():
        return 1.0
    left, right = left.double().flatten(), right.double().flatten()
    return _share(float((left - right).norm()), max(float(left.norm()), float(right.norm())))


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor], key: str) -> bool:
    return key in one and key in other and torch.equal(one[key], other[key].to(one[key].dtype))


def _metadata(one: Mapping[str, str], other: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    return {
        key: (one.get(key, ""), other.get(key, ""))
        for key in sorted((one.keys() | other.keys()) - set(STALE))
        if one.get(key) != other.get(key)
    }
