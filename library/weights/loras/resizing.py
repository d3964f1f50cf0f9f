"""A LoRA at other ranks: each module's change is decomposed and its greatest singular values are kept.

Which rank a module gets is told by `ranks`, the algebra is in `low_rank`; here is what becomes of a file. The scale
(alpha / rank) of most modules stays what it was, so alpha shrinks as the rank does; all get that alpha (`alphas`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod, sqrt
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import TypeVar

import torch
from torch import Tensor

from library.console import track
from library.errors import UserError
from library.weights.loras.alphas import commonest, leaves_with, own_alpha, telling
from library.weights.loras.amended import amended
from library.weights.loras.forms import Factors, as_leaves, factors
from library.weights.loras.lora import DYNAMIC, Lora, Module, family_of, shared, write
from library.weights.loras.low_rank import shortened, singular_values
from library.weights.loras.peft import place_of
from library.weights.loras.plain import plain_metadata
from library.weights.loras.ranks import Criterion, chosen, fitted, needed, retained
from library.weights.loras.tables import block_of, block_order

Found = TypeVar("Found")
_FACTOR_LEAVES = ("lora_", "hada_", "lokr_", "scalar")
_LONGER = 60
"""Bytes by which a module's place in a header may grow: two tensors with offsets and shapes of more digits, alpha."""
_IN_A_PATTERN = 32
"""Bytes that an entry of peft's `rank_pattern` takes beside the module's path: quotes and indents, escaped, a rank."""


@dataclass(frozen=True)
class Limits:
    """The greatest ranks: of linear layers, and of convolutions, 1x1 ones too; None sets no limit."""

    linear: int | None
    conv: int | None

    def of(self, shape: Sequence[int]) -> int | None:
        """The limit for a weight of this shape."""
        return self.conv if len(shape) == 4 else self.linear


@dataclass(frozen=True)
class Change:
    """What became of one module.

    Attributes:
        old: the rank that it had.
        needed: what the criterion asks for, before the limit.
        new: the rank that it has.
        values: (k,) its singular values before, scale included, float64.
        shape: of the weight.
    """

    name: str
    old: int
    needed: int
    new: int
    values: Tensor
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Resized:
    """A file after resizing; `kept` are modules without factors, which stay as they were."""

    lora: Lora
    changes: tuple[Change, ...] = field(default=())
    kept: tuple[str, ...] = field(default=())


def resized(
    lora: Lora, criterion: Criterion, limits: Limits, dtype: torch.dtype, device: torch.device | None = None
) -> Resized:
    """Every module that has factors at the rank that the criterion gives it; metadata tell what was done.

    All of them get one alpha. Of a DoRA the direction is resized and the magnitudes stay. LyCORIS modules with factors
    become plain ones.

    Args:
        dtype: of the new factors.
        device: where the algebra runs.

    Raises:
        UserError: no module has factors, a number is not finite, or too large for `dtype`.
    """
    modules, held = dict(lora.modules), torch.promote_types(dtype, torch.float32)

    def one(module: Module, found: Factors) -> tuple[Factors, Change]:
        limit = limits.of(found.shape)
        new, values = shortened(found, lambda values: chosen(values, criterion, limit), _named(lora, module))
        scale = found.scale or 1.0
        made = Factors((new.up / scale).to("cpu", held), new.down.to("cpu", held), new.shape, scale)
        return made, Change(module.name, found.rank, needed(values, criterion), new.rank, values.cpu(), found.shape)

    found = list(_each(lora, one, device, "resizing"))
    alpha = commonest(own_alpha(made) for made, _ in found)
    for made, change in found:
        module = lora.modules[change.name]
        leaves = leaves_with(made, alpha, dtype, _named(lora, module))
        modules[change.name] = Module(change.name, {**leaves, **_others(module)}, alpha)
    changes = tuple(change for _, change in found)
    done = {change.name for change in changes}
    metadata = _metadata(lora.metadata, modules, criterion, limits, changes, alpha)
    return Resized(lora.with_modules(modules, metadata), changes, tuple(name for name in modules if name not in done))


def criterion_for_size(
    lora: Lora,
    start: Criterion,
    limits: Limits,
    dtype: torch.dtype,
    limit: int,
    device: torch.device | None = None,
    name: str = "lora.safetensors",
) -> Criterion:
    """The greatest parameter of a dynamic method with which the file holds at most `limit` bytes.

    Args:
        limits, dtype, device: as of `resized`.
        name: of the file that will be written.

    Raises:
        UserError: as `resized`, or the file is larger even with the smallest ranks.
    """

    def one(module: Module, found: Factors) -> tuple[str, Tensor, tuple[int, ...]]:
        return module.name, singular_values(found, _named(lora, module)).cpu(), found.shape

    found = {name: (values, shape) for name, values, shape in _each(lora, one, device, "measuring")}
    shapes = {name: shape for name, (_, shape) in found.items()}
    longest = replace(start, parameter=0.1234567)
    fixed = _size_without_factors(lora, shapes, dtype, longest, limits, name)

    def size(criterion: Criterion) -> int:
        """Of the file, were it written with this criterion."""
        return fixed + sum(
            chosen(values, criterion, limits.of(shape)) * _rank_bytes(shape, dtype) for values, shape in found.values()
        )

    spread = max((_spread(values) for values, _ in found.values()), default=1.0)
    picked = fitted(size, start, limit, spread)
    if picked is None:
        least = fixed + sum(_rank_bytes(shape, dtype) for shape in shapes.values())
        wrong = f"with rank 1 everywhere the file has {least / 1e6:.2f} MB already"
        raise UserError.single("--target_size_mb", wrong, "give more, or a smaller --save_precision")
    return picked


def _rank_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """What one rank of a module takes in a file."""
    return (shape[0] + prod(shape[1:])) * dtype.itemsize


def _size_without_factors(
    lora: Lora,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    criterion: Criterion,
    limits: Limits,
    file_name: str,
) -> int:
    """Bytes of the file beside its factors: a file of rank 1 is written to a temporary folder to see it, and longer
    numbers in the header of the real one are allowed for, as is a rank for each module in peft's settings."""
    modules = dict(lora.modules)
    for name, shape in shapes.items():
        zeros = Factors(torch.zeros(shape[0], 1), torch.zeros(1, prod(shape[1:])), shape)
        modules[name] = Module(name, {**as_leaves(zeros, dtype), **_others(lora.modules[name])}, 1.0)
    with TemporaryDirectory() as folder:
        path = Path(folder) / file_name
        write(lora.with_modules(modules, _metadata(lora.metadata, modules, criterion, limits, (), 1.0)), path)
        written = path.stat().st_size
    places = [place_of(name) for name in shapes] if lora.layout == "peft" else []
    patterns = sum(len(place.path) + _IN_A_PATTERN for place in places if place is not None)
    allowed = _LONGER * (len(shapes) + 1) + patterns
    return written - sum(_rank_bytes(shape, dtype) for shape in shapes.values()) + allowed


def _spread(values: Tensor) -> float:
    """Above the ratio of the greatest singular value to the least that isn't zero."""
    kept = values[values > 0]
    return 2 * float(values[0] / kept[-1]) if len(kept) else 1.0


def _named(lora: Lora, module: Module) -> str:
    return f"{lora.path}: {module.name}"


def _each(
    lora: Lora, work: Callable[[Module, Factors], Found], device: torch.device | None, doing: str
) -> Iterator[Found]:
    """What `work` gives for each module that has factors, in their order, with a progress bar.

    The matrices are too small for several threads to share one, so each thread takes a module of its own.
    """
    family = family_of(lora)

    def one(module: Module) -> Found | None:
        found = factors(module, torch.float64, device, family)
        return None if found is None else work(module, found)

    threads, done = torch.get_num_threads(), 0
    workers = threads if device is None or device.type == "cpu" else 1
    with ThreadPoolExecutor(workers, initializer=partial(torch.set_num_threads, 1)) as pool:
        try:
            for found in track(pool.map(one, lora.modules.values()), doing, len(lora.modules)):
                if found is not None:
                    done += 1
                    yield found
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)
    if not done:
        wrong = "none of its modules is a product of small factors"
        raise UserError.single(str(lora.path), wrong, "give a LoRA, LoCon, LoHa or LoKr file")


def _others(module: Module) -> Mapping[str, Tensor]:
    """What isn't a factor, such as magnitudes of a DoRA."""
    return {leaf: tensor for leaf, tensor in module.leaves.items() if not leaf.startswith(_FACTOR_LEAVES)}


def _metadata(
    metadata: Mapping[str, str],
    modules: Mapping[str, Module],
    criterion: Criterion,
    limits: Limits,
    changes: Sequence[Change],
    alpha: float,
) -> dict[str, str]:
    """What a file says of itself after resizing: its alpha, and the rank, `Dynamic` where modules differ."""
    before = metadata.get("ss_network_dim") or shared({str(change.old) for change in changes})
    linear = [change for change in changes if len(change.shape) == 2] or changes
    fixed = criterion.method == "static"
    dim = shared({str(change.new) for change in linear}) if fixed else DYNAMIC
    how = "" if fixed else f" by {criterion}"
    top = "" if limits.linear is None else f" {'to' if fixed else 'up to'} {limits.linear}"
    conv = "" if limits.conv in (None, limits.linear) else f", convolutions {limits.conv}"
    comment = f"resized{how} from rank {before}{top}{conv}"
    found = plain_metadata(amended(metadata, dim=dim, comment=comment), modules.values())
    convs = {str(change.new) for change in changes if prod(change.shape[2:]) > 1}
    return telling(found, alpha, (shared(convs) if fixed else DYNAMIC) if convs else None)


def rows(changes: Sequence[Change]) -> Iterator[tuple[str, str, str, str, str]]:
    """For each block, and last for the whole file: its name, modules, old and new ranks, and the share of the Frobenius
    norm that was kept."""
    blocks: dict[str, list[Change]] = {}
    for change in changes:
        blocks.setdefault(block_of(change.name), []).append(change)
    for block in sorted(blocks, key=block_order):
        yield block, *_row(blocks[block])
    yield "all", *_row(changes)


def _row(changes: Sequence[Change]) -> tuple[str, str, str, str]:
    whole = sum(float(change.values.square().sum()) for change in changes)
    kept = sum(float(change.values[: change.new].square().sum()) for change in changes)
    share = sqrt(kept / whole) if whole else 1.0
    old, new = ([getattr(change, name) for change in changes] for name in ("old", "new"))
    return f"{len(changes):,}", _span(old), _span(new), f"{share:.2%}"


def _span(ranks: Sequence[int]) -> str:
    least, most = min(ranks), max(ranks)
    return str(least) if least == most else f"{least}-{most}, mean {fmean(ranks):.1f}"


def module_rows(changes: Sequence[Change]) -> Iterator[tuple[str, str, str, str, str, str]]:
    """For each module: name, old and new rank, kept shares of the sum and of the Frobenius norm, and the ratio of the
    greatest singular value to the least that was kept."""
    for one in changes:
        total, kept = float(one.values.sum()), one.values[: one.new]
        share = float(kept.sum()) / total if total else 1.0
        ratio = f"{float(kept[0] / kept[-1]):.4g}" if float(kept[-1]) else "-"
        norm = retained(one.values, one.new)
        yield one.name, str(one.old), str(one.new), f"{share:.2%}", f"{norm:.2%}", ratio
