"""What the numbers of a LoRA file are like: how large its changes are, how much of their rank is used, what is broken.

Changes are measured without the full matrix where they have factors (`low_rank`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt

import torch
from torch import Tensor

from library.weights.loras.forms import delta, factors
from library.weights.loras.forms import kind as kind_of
from library.weights.loras.lora import Module
from library.weights.loras.low_rank import norm, numerical_rank
from library.weights.loras.lycoris import Kind
from library.weights.loras.tables import block_of, block_order

_FP16_MOST = float(torch.finfo(torch.float16).max)


@dataclass(frozen=True)
class ModuleFacts:
    """One module.

    Attributes:
        rank: of its factors, as the file has them; None of kinds without.
        norm: Frobenius norm of the change, alpha counted; None where it depends on the base model's weight.
        used: how many singular values of the change are more than the rounding of the stored dtype times the greatest.
        not_finite: leaves with NaN or infinite numbers.
        too_large: leaves with numbers that float16 can't hold.
    """

    name: str
    kind: Kind
    rank: int | None
    alpha: float | None
    norm: float | None
    used: int | None
    not_finite: tuple[str, ...] = ()
    too_large: tuple[str, ...] = ()

    @property
    def block(self) -> str:
        """The block that it stands in."""
        return block_of(self.name)

    @property
    def is_zero(self) -> bool:
        """It changes nothing."""
        return self.norm == 0.0


@dataclass(frozen=True)
class BlockFacts:
    """The modules of a block; `norm` is that of all their changes together, None where none is known."""

    block: str
    modules: int
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    used: tuple[int, ...]
    norm: float | None
    zero: int
    broken: int


def facts_of(module: Module) -> ModuleFacts:
    """Measure a module."""
    own = dict(module.leaves)
    not_finite = tuple(leaf for leaf, tensor in own.items() if not _is_finite(tensor))
    if module.alpha is not None and not isfinite(module.alpha):
        not_finite += ("alpha",)
    too_large = tuple(leaf for leaf, tensor in own.items() if leaf not in not_finite and _largest(tensor) > _FP16_MOST)
    rank = _rank_of(own)
    kind = kind_of(module)
    if not_finite:
        return ModuleFacts(module.name, kind, rank, module.alpha, None, None, not_finite, too_large)
    found = factors(module)
    if found is not None:
        used = numerical_rank(found, _rounding(own.values()), module.name)
        return ModuleFacts(module.name, kind, rank, module.alpha, norm(found), used, (), too_large)
    whole = delta(module)
    size = None if whole is None else float(whole.norm())
    return ModuleFacts(module.name, kind, rank, module.alpha, size, None, (), too_large)


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(_wide(tensor)).all())


def _largest(tensor: Tensor) -> float:
    return float(_wide(tensor).abs().max()) if tensor.numel() and tensor.is_floating_point() else 0.0


def _wide(tensor: Tensor) -> Tensor:
    """Eight-bit numbers as wider ones, which torch can compute with."""
    return tensor.float() if tensor.dtype.itemsize == 1 else tensor


def _rank_of(leaves: Mapping[str, Tensor]) -> int | None:
    for leaf in ("lora_down.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b", "a2.weight"):
        if leaf in leaves:
            return int(leaves[leaf].shape[0])
    return None


def _rounding(tensors: Iterable[Tensor]) -> float:
    """The relative rounding of the coarsest dtype among them."""
    return max((torch.finfo(one.dtype).eps for one in tensors if one.is_floating_point()), default=0.0)


def by_block(modules: Iterable[ModuleFacts]) -> list[BlockFacts]:
    """The same by block, in the order in which data flows."""
    groups: dict[str, list[ModuleFacts]] = {}
    for one in modules:
        groups.setdefault(one.block, []).append(one)
    return [together(block, groups[block]) for block in sorted(groups, key=block_order)]


def together(block: str, modules: Sequence[ModuleFacts]) -> BlockFacts:
    """Several modules as one row."""
    norms = [one.norm for one in modules if one.norm is not None]
    return BlockFacts(
        block,
        len(modules),
        tuple(sorted({one.rank for one in modules if one.rank is not None})),
        tuple(sorted({one.alpha for one in modules if one.alpha is not None and isfinite(one.alpha)})),
        tuple(sorted(one.used for one in modules if one.used is not None)),
        sqrt(sum(size * size for size in norms)) if norms else None,
        sum(one.is_zero for one in modules),
        sum(bool(one.not_finite) for one in modules),
    )
