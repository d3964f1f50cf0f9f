"""Writing whole base models tensor by tensor: each is made when its turn comes, so that files of gigabytes need memory
for a few tensors only."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from library.console import bar
from library.errors import UserError
from library.weights.files import atomic_write, header_of, tensor_bytes


@dataclass(frozen=True)
class Planned:
    """A tensor of a file to come.

    Attributes:
        values: makes it; called once, in the file's order. What it gives has this dtype and shape.
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


def write_stream(planned: Sequence[Planned], path: Path, metadata: Mapping[str, str], what: str) -> None:
    """Write a `.safetensors` file, whole or not at all, with a progress bar in bytes.

    Args:
        what: names the work beside the bar.

    Raises:
        UserError: the disk has no room for it.
    """
    with atomic_write(path) as file, bar(what, sum(one.size for one in planned)) as progress:
        file.write(header_of(((one.name, one.dtype, one.shape) for one in planned), metadata))
        for one in planned:
            tensor = one.values()
            if tensor.dtype != one.dtype or tuple(tensor.shape) != one.shape:
                raise ValueError(f"{one.name} is {tensor.dtype} {tuple(tensor.shape)}, not {one.dtype} {one.shape}")
            file.write(tensor_bytes(tensor))
            progress.update(one.size)


def check_ending(path: Path, flag: str) -> None:
    """Refuse names that are no `.safetensors` file.

    Raises:
        UserError: so.
    """
    if path.suffix != ".safetensors":
        wrong = f"ends in {path.suffix}" if path.suffix else "has no ending"
        raise UserError.single(f"{flag} {path}", wrong, "checkpoints are written as .safetensors")
