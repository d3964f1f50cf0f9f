"""A LoRA out of the difference of two checkpoints: which modules it has, their factors, and what each leaves out.

Modules are worked on by a few threads, each with one weight of both models in memory. Reading checkpoints is done in
`difference`, the decomposition in `library.weights.loras.randomized`.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from library.console import bar
from library.models.lora_targets import LoraTarget, ranked
from library.models.tensors import Reader
from library.weights.checkpoints.difference import Difference, weight_shape
from library.weights.loras.forms import Factors, as_leaves
from library.weights.loras.lora import Module
from library.weights.loras.randomized import clamped, cut, error_of
from library.weights.loras.ranks import Criterion, chosen

_MOST_WORKERS = 4


@dataclass(frozen=True)
class Extraction:
    """How a difference becomes a LoRA.

    Attributes:
        dim, conv_dim: ranks of Linear and 1x1 modules, and of 3x3 convolutions, without which only LoRA-LierLa's
            modules are taken; with a dynamic criterion the highest ones.
        clamp_quantile: where the values of both factors are cut off; 1 leaves them.
        dtype: of the factors.
        exact: decompose whole matrices.
    """

    dim: int
    conv_dim: int | None = None
    criterion: Criterion = field(default_factory=Criterion)
    clamp_quantile: float = 1.0
    dtype: torch.dtype = torch.float32
    exact: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Extracted:
    """One module.

    Attributes:
        module: None where the models don't differ.
        norm: Frobenius norm of the difference.
        error: that of the difference - up @ down, of the factors as they are stored.
        unclamped: the same if their values weren't cut off.
        passes: as `randomized.Cut` has it.
    """

    target: LoraTarget
    module: Module | None
    norm: float = 0.0
    error: float = 0.0
    unclamped: float = 0.0
    passes: int = 0

    @property
    def rank(self) -> int:
        """The rank of its factors; 0 without."""
        return 0 if self.module is None else int(self.module.leaves["lora_down.weight"].shape[0])


def wanted(targets: Iterable[LoraTarget], plan: Extraction) -> Iterator[tuple[LoraTarget, int]]:
    """The modules of a LoRA of these ranks, each with its rank, or the highest that it may have."""
    for target, rank in ranked(targets, plan.dim, plan.conv_dim):
        out, *rest = weight_shape(target)
        yield target, min(rank, out, torch.Size(rest).numel())


def text_differs(difference: Difference, least: float, device: torch.device) -> bool:
    """Whether any weight of a text encoder differs by more than `least` somewhere; reading ends at the first."""
    encoders = [target for target in difference.targets if target.part == "text_encoder"]
    if not encoders:
        return False
    with Reader() as reader, bar("comparing text encoders", len(encoders)) as progress:
        for target in encoders:
            low, high = torch.aminmax(difference.of(target, reader, device))
            if not max(-float(low), float(high)) <= least:
                return True
            progress.update()
    return False


def extracted(
    difference: Difference, chosen_modules: Sequence[tuple[LoraTarget, int]], plan: Extraction, device: torch.device
) -> Iterator[Extracted]:
    """Each module with its factors, in order.

    Raises:
        UserError: a weight holds numbers that are not finite.
    """
    threads = torch.get_num_threads()
    workers = 1 if device.type != "cpu" else max(2, min(_MOST_WORKERS, threads))
    share = partial(torch.set_num_threads, max(1, threads // workers))
    try:
        with Reader() as reader, ThreadPoolExecutor(workers, initializer=share) as pool:
            waiting = iter(chosen_modules)
            work = partial(_one, difference, reader, plan, device)
            begun: deque[Future[Extracted]] = deque(pool.submit(work, *each) for each in islice(waiting, workers))
            try:
                while begun:
                    yield begun.popleft().result()
                    begun.extend(pool.submit(work, *each) for each in islice(waiting, 1))
            finally:
                pool.shutdown(cancel_futures=True)
    finally:
        torch.set_num_threads(threads)


def _one(
    difference: Difference, reader: Reader, plan: Extraction, device: torch.device, target: LoraTarget, limit: int
) -> Extracted:
    change = difference.of(target, reader, device)
    matrix = change.flatten(1)
    if not bool(matrix.any()):
        return Extracted(target, None)
    whole = plan.exact or plan.criterion.method == "sv_cumulative"
    found = cut(matrix, limit, name=target.name, seed=plan.seed, exact=whole)
    values = found.svd.s if plan.criterion.method == "sv_ratio" else found.values
    rank = chosen(values, plan.criterion, limit)
    up, down = found.svd.u[:, :rank] * found.svd.s[:rank], found.svd.vh[:rank]
    unclamped = _error(matrix, up, down, plan.dtype)
    kept = clamped(up, down, plan.clamp_quantile)
    error = unclamped if kept[0] is up else _error(matrix, *kept, plan.dtype)
    leaves = as_leaves(Factors(*kept, tuple(change.shape)), plan.dtype)
    return Extracted(target, Module(target.name, leaves, float(rank)), found.norm, error, unclamped, found.passes)


def _error(matrix: Tensor, up: Tensor, down: Tensor, dtype: torch.dtype) -> float:
    """Of factors as a file of this dtype gives them back."""
    return error_of(matrix, up.to(dtype).to(matrix.dtype), down.to(dtype).to(matrix.dtype))
