"""Checkpoints of one layout blended tensor by tensor: weighted sums and differences, with a share for each block.

Here it is decided what becomes of each tensor, from headers alone; `stream.write_stream` then has them made one by one.
The first checkpoint gives names, dtypes and everything that isn't blended: what another one lacks or has in another
shape, schedules' buffers and numbers that are no weights. Copies of averaged weights (EMA) are left out, as nobody
would blend them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import asin, prod, sin
from typing import Literal

import torch
from torch import Tensor

from library.errors import UserError
from library.models.headers import Entry, Header
from library.models.original_names import EMA, PART_PREFIXES
from library.models.tensors import WEIGHT_DTYPES, Reader, Source, stored_dtype
from library.weights.checkpoints.stream import Planned

Share = Callable[[str], float]
"""The factor of a block, by the name of a tensor in it."""
Interpolation = Literal["weighted_sum", "sigmoid", "inv_sigmoid"]
INTERPOLATIONS: tuple[Interpolation, ...] = ("weighted_sum", "sigmoid", "inv_sigmoid")
UNET = "model.diffusion_model."
_WHOLE = 1e-6
"""Ratios whose sum is as near to 1 as this make 1."""


@dataclass(frozen=True)
class Term:
    """`ratio * share * (plus - minus)`, of checkpoints by their places."""

    plus: int
    minus: int
    ratio: float
    share: Share

    def weight(self, name: str) -> float:
        """What the difference of a tensor is multiplied by."""
        return self.ratio * self.share(name)


@dataclass(frozen=True)
class Recipe:
    """`scale * first + sum of terms`. Differences are taken first, so weights that are the same stay, bit for bit."""

    scale: float
    terms: tuple[Term, ...]


def weighted_sum(ratios: Sequence[float], shares: Sequence[Share]) -> Recipe:
    """Every checkpoint times its ratio.

    Args:
        shares: of every checkpoint but the first, on top of its ratio; the first takes what they leave.
    """
    total = math.fsum(ratios)
    scale = 1.0 if abs(total - 1) <= _WHOLE else total
    numbered = enumerate(zip(ratios[1:], shares, strict=True), start=1)
    return Recipe(scale, tuple(Term(number, 0, ratio, share) for number, (ratio, share) in numbered))


def difference(ratio: float, share: Share) -> Recipe:
    """first + ratio * (second - third)."""
    return Recipe(1.0, (Term(1, 2, ratio, share),))


def bent(ratio: float, how: Interpolation) -> float:
    """The second checkpoint's ratio, 0..1, as an interpolation has it: `sigmoid` draws it to the nearer end by the
    smoothstep 3x^2 - 2x^3, `inv_sigmoid` is the inverse of that."""
    if how == "sigmoid":
        return ratio * ratio * (3 - 2 * ratio)
    return 0.5 - sin(asin(1 - 2 * ratio) / 3) if how == "inv_sigmoid" else ratio


@dataclass(frozen=True)
class Blend:
    """What a file to come is made of.

    Attributes:
        planned: its tensors, in the file's order.
        blended: how many are made of several checkpoints.
        kept: (name, reason) of what of the first is copied though it was to be blended, and of what of any checkpoint
            is left out.
    """

    planned: tuple[Planned, ...]
    blended: int
    kept: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Work:
    """How a blend is computed.

    Attributes:
        compute: the dtype of sums.
        dtype: that blended tensors are stored in; None leaves each its own.
        unet_only: nothing but the U-Net is blended.
    """

    compute: torch.dtype = torch.float32
    dtype: torch.dtype | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    unet_only: bool = False


def plan_blend(headers: Sequence[Header], recipe: Recipe, reader: Reader, work: Work) -> Blend:
    """Decide on every tensor of the first checkpoint. Nothing is read yet: `planned` reads through `reader`.

    Raises:
        UserError: a weight of a U-Net has another size in one of them, or is in a format that can't be added.
    """
    first, tables = headers[0], [{_common(name): name for name in header.entries} for header in headers]
    planned, notes, blended = [], [], 0
    for name, entry in first.entries.items():
        if name.startswith(EMA):
            continue
        sources = [_source(header, table.get(_common(name))) for header, table in zip(headers, tables, strict=True)]
        source = _known(sources[0])
        dtype = stored_dtype(source) if work.dtype is None or not _counts(name, entry) else work.dtype
        values: Callable[[], Tensor] = partial(_kept, source, reader, dtype)
        if _counts(name, entry) and work.unet_only and not name.startswith(UNET):
            notes.append((name, "outside of the U-Net (--unet_only)"))
        elif _counts(name, entry):
            terms = _active(recipe, name)
            if reason := _obstacle(name, sources, headers, terms):
                notes.append((name, reason))
            elif terms or recipe.scale != 1:
                values = partial(_blended, sources, recipe.scale, terms, reader, work, dtype)
                blended += 1
        planned.append(Planned(name, dtype, entry.shape, values))
    notes += _left_out(headers, tables)
    return Blend(tuple(sorted(planned, key=lambda one: (-one.dtype.itemsize, one.name))), blended, tuple(notes))


def _common(name: str) -> str:
    """A name without the level `text_model.`, which some files have and others don't."""
    return name.replace("transformer.text_model.", "transformer.", 1)


def _source(header: Header, name: str | None) -> Source | None:
    return None if name is None else Source(name, header.path, header.entries[name], name)


def _active(recipe: Recipe, name: str) -> list[tuple[int, int, float]]:
    """Places and weight of the terms that count for a tensor."""
    weighed = ((term.plus, term.minus, term.weight(name)) for term in recipe.terms)
    return [term for term in weighed if term[2]]


def _counts(name: str, entry: Entry) -> bool:
    """Whether a tensor holds weights of a part of the model."""
    return name.startswith(PART_PREFIXES) and entry.dtype in WEIGHT_DTYPES and prod(entry.shape) > 0


def _obstacle(
    name: str, sources: Sequence[Source | None], headers: Sequence[Header], terms: Sequence[tuple[int, int, float]]
) -> str:
    """Why a weight of the first can't be blended; "" if nothing speaks against it."""
    first = _known(sources[0])
    for place in sorted({place for plus, minus, _ in terms for place in (plus, minus)}):
        other, path = sources[place], headers[place].path
        if other is None:
            return f"not in {path.name}"
        if other.entry.dtype not in WEIGHT_DTYPES:
            wrong = f"its tensor {name} is of type {other.entry.dtype}"
            raise UserError.single(str(path), wrong, "use a file in fp32, fp16 or bf16")
        if _plain(other.entry.shape) != _plain(first.entry.shape):
            if name.startswith(UNET):
                wrong = f"its tensor {name} is {list(other.entry.shape)}, the first one's {list(first.entry.shape)}"
                raise UserError.single(str(path), wrong, "give models of one size")
            return f"of another shape in {path.name}"
    return ""


def _known(source: Source | None) -> Source:
    assert source is not None
    return source


def _plain(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape in which a 1x1 kernel counts as none."""
    return shape[:2] if shape[2:] == (1, 1) else shape


def _left_out(headers: Sequence[Header], tables: Sequence[dict[str, str]]) -> list[tuple[str, str]]:
    """Tensors that no new file has: EMA copies of the first, and of others what the first lacks."""
    found = [(name, "EMA copy, left out") for name in headers[0].entries if name.startswith(EMA)]
    for header, table in zip(headers[1:], tables[1:], strict=True):
        alone = (name for common, name in table.items() if common not in tables[0] and not name.startswith(EMA))
        found += [(name, f"only in {header.path.name}, left out") for name in alone]
    return found


def _kept(source: Source, reader: Reader, dtype: torch.dtype) -> Tensor:
    values = reader.read(source)
    return values if values.dtype == dtype else _stored(values, dtype, source)


def _blended(
    sources: Sequence[Source | None],
    scale: float,
    terms: Sequence[tuple[int, int, float]],
    reader: Reader,
    work: Work,
    dtype: torch.dtype,
) -> Tensor:
    first = _known(sources[0])

    def values(place: int) -> Tensor:
        stored = reader.read(_known(sources[place])).view(first.shape)
        return stored.to(device=work.device, dtype=work.compute)

    if scale == 1 and len(terms) == 1 and terms[0][1:] == (0, 1.0):
        return _stored(values(terms[0][0]), dtype, first)
    base = values(0)
    found = base if scale == 1 else base * scale
    for plus, minus, weight in terms:
        other = values(minus) if minus else base
        found = found + (values(plus) - other) * weight
    return _stored(found, dtype, first)


def _stored(values: Tensor, dtype: torch.dtype, source: Source) -> Tensor:
    """Values as a file has them.

    Raises:
        UserError: some are no finite numbers, or too large for the dtype.
    """
    cast = values.to(dtype).cpu()
    if bool((cast if dtype.itemsize > 1 else cast.float()).isfinite().all()):
        return cast
    if bool((values if values.dtype.itemsize > 1 else values.float()).isfinite().all()):
        wrong = f"holds values that are too large for {str(dtype).removeprefix('torch.')}"
        raise UserError.single(source.name, wrong, "use --saving_precision bf16 or float")
    wrong = "holds values that are no finite numbers in one of the models"
    raise UserError.single(source.name, wrong, "a file is damaged, or its training diverged; use another one")
