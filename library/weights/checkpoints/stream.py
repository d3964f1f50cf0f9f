"""Writing whole base models tensor by tensor: each is made when its turn comes, so that files of gigabytes need memory
for a few tensors only. The next ones are read and computed while one is written."""

import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from library.console import bar
from library.errors import UserError
from library.weights.files import atomic_write, header_of, tensor_bytes

_AHEAD = 1 << 28
_MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Planned:
    """A tensor of a file to come.

    Attributes:
        values: makes it; called once, in a thread. What it gives has this dtype and shape.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    values: Callable[[], Tensor]

    @property
    def size(self) -> int:
        """Its bytes."""
        count = self.dtype.itemsize
        for side in self.shape:
            count *= side
        return count


def write_stream(
    planned: Sequence[Planned], path: Path, metadata: Mapping[str, str], what: str, *, threads: int = 1
) -> int:
    """Write a `.safetensors` file, whole or not at all, with a progress bar in megabytes.

    Args:
        what: names the work beside the bar.
        threads: that make tensors, at most some 256 MB ahead of the writing. With one they are made in the file's
            order, one after the other; with more, `values` are called at the same time.

    Returns:
        The bytes of the tensors.

    Raises:
        UserError: the disk has no room for it.
        OSError: the system refuses to write it; names the file.
    """
    total = sum(one.size for one in planned)
    check_room(path, total)
    with atomic_write(path) as file, bar(f"{what}, MB", max(1, total // _MEGABYTE)) as progress:
        file.write(header_of(((one.name, one.dtype, one.shape) for one in planned), metadata))
        done = 0
        for one, tensor in _made(planned, threads):
            if tensor.dtype != one.dtype or tuple(tensor.shape) != one.shape:
                raise ValueError(f"{one.name} is {tensor.dtype} {tuple(tensor.shape)}, not {one.dtype} {one.shape}")
            file.write(tensor_bytes(tensor))
            done += one.size
            progress.update(done // _MEGABYTE - progress.n)
    return total


def _made(planned: Sequence[Planned], threads: int) -> Iterator[tuple[Planned, Tensor]]:
    """Every tensor in its turn, while threads make those behind it: one at least, and as many as fit."""
    waiting: deque[tuple[Planned, Future[Tensor]]] = deque()
    ahead = 0
    pool = ThreadPoolExecutor(threads)
    try:
        for one in planned:
            while waiting and ahead + one.size > _AHEAD:
                first, future = waiting.popleft()
                yield first, future.result()
                ahead -= first.size
            waiting.append((one, pool.submit(one.values)))
            ahead += one.size
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def check_room(path: Path, size: int) -> None:
    """Refuse a file that the disk has no room for.

    Raises:
        UserError: so.
    """
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if size > free:
        wrong = f"{_amount(size)} don't fit, its disk has {_amount(free)} left"
        raise UserError.single(str(path), wrong, "free some, or write elsewhere")


def _amount(size: int) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 1e3:.0f} kB"


def check_ending(path: Path, flag: str) -> None:
    """Refuse names that are no `.safetensors` file.

    Raises:
        UserError: so.
    """
    if path.suffix != ".safetensors":
        wrong = f"ends in {path.suffix}" if path.suffix else "has no ending"
        raise UserError.single(f"{flag} {path}", wrong, "checkpoints are written as .safetensors")
