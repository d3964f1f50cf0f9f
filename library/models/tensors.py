"""Tensors out of `.safetensors` files into modules that were built on `meta`: no second copy, no mapped pages.

Each tensor is read by file offset straight into its own memory, or through one buffer per thread where it is cast,
laid out anew or moved, so beyond the model at most a few tensors exist at once. Reading runs in threads. Values that
are no numbers end the loading.
"""

import math
import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from library.errors import UserError
from library.models.headers import Entry

WEIGHT_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_ALL_DTYPES = WEIGHT_DTYPES | {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_THREADS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class Source:
    """Where a module's tensor comes from: `target` in the module, `entry` of `path`.

    Attributes:
        name: what the file calls it.
        rows: the tensor is only these rows [first, last) of the stored one.
        transpose: the stored matrix, or those rows of it, is turned over.
    """

    target: str
    path: Path
    entry: Entry
    name: str
    rows: tuple[int, int] | None = None
    transpose: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape once it is cut and turned."""
        shape = self.entry.shape
        if self.rows is not None:
            shape = (self.rows[1] - self.rows[0], *shape[1:])
        return shape[::-1] if self.transpose else shape

    @property
    def span(self) -> tuple[int, int]:
        """The bytes [start, end) of the file that are read: those of `rows` where rows follow each other."""
        start, end = self.entry.start, self.entry.end
        if self.rows is None or self.entry.stride is not None:
            return start, end
        row = (end - start) // self.entry.shape[0]
        return start + self.rows[0] * row, start + self.rows[1] * row

    def arrange(self, values: torch.Tensor) -> torch.Tensor:
        """The flat values of `span` -> the tensor, as a view."""
        if self.entry.stride is not None:
            values = values.as_strided(self.entry.shape, self.entry.stride)
            values = values if self.rows is None else values[slice(*self.rows)]
        elif self.transpose:
            values = values.view(self.shape[::-1])
        return values.T if self.transpose else values


def fill(
    module: torch.nn.Module,
    sources: Iterable[Source],
    *,
    what: str,
    device: torch.device,
    dtype: torch.dtype,
    channels_last: bool = False,
) -> None:
    """Give a `meta` module its weights, frozen, in `dtype` on `device`.

    Sources that the module doesn't have are passed over (EMA copies, position ids).

    Args:
        what: names the model in an error.
        channels_last: lay 4-D weights out as convolutions in that format want them.

    Raises:
        UserError: a tensor is missing, has another number of values, or can't be read.
    """
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    found = {source.target: source for source in sources if source.target in wanted}
    missing = sorted(wanted.keys() - found.keys())
    if missing:
        wrong = f"lacks {len(missing)} of {len(wanted)} tensors of its {type(module).__name__}, first {missing[0]}"
        raise UserError.single(what, wrong, "the file is incomplete or of another family")
    files = {path: os.open(path, os.O_RDONLY) for path in {source.path for source in found.values()}}

    scratch = _Scratch()

    def load(name: str) -> tuple[str, torch.Tensor]:
        source, shape = found[name], wanted[name]
        if _significant(source.shape) != _significant(shape):
            wrong = f"its tensor {name} has the shape {source.shape}, not {shape}"
            raise UserError.single(what, wrong, "the file is of another family")
        if source.entry.dtype not in WEIGHT_DTYPES:
            wrong = f"its tensor {name} is of type {source.entry.dtype}"
            raise UserError.single(what, wrong, "use a file in fp32, fp16 or bf16")
        layout = torch.channels_last if channels_last and len(shape) == 4 else torch.contiguous_format
        final = torch.empty(shape, dtype=dtype, device=device, memory_format=layout)
        stored = WEIGHT_DTYPES[source.entry.dtype]
        plain = source.entry.stride is None and not source.transpose
        as_is = plain and stored == dtype and device.type == "cpu" and final.is_contiguous()
        start, end = source.span
        raw = final.view(-1).view(torch.uint8) if as_is else scratch.take(end - start)
        _read(files[source.path], start, raw, f"{what}: {source.path}")
        values = final if as_is else source.arrange(raw.view(stored))
        if not as_is:
            final.copy_(values.reshape(shape))
        _check_numbers(final, values, source.name, what)
        return name, final

    try:
        with ThreadPoolExecutor(_THREADS) as pool:
            state = dict(pool.map(load, wanted))
    finally:
        for descriptor in files.values():
            os.close(descriptor)
    module.load_state_dict(state, strict=True, assign=True)
    module.requires_grad_(False).eval()


class Reader:
    """Reads tensors of files one by one, each into memory of its own; files stay open until the `with` block ends.

    Any thread may read.
    """

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}
        self._opening = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def read(self, source: Source) -> torch.Tensor:
        """A tensor as it is stored (its own dtype), cut and turned as `source` says; contiguous. Any values pass.

        Raises:
            UserError: of a type that torch doesn't have, or the file became shorter.
        """
        stored = stored_dtype(source)
        start, end = source.span
        raw = torch.empty(end - start, dtype=torch.uint8)
        _read(self._descriptor(source.path), start, raw, str(source.path))
        return source.arrange(raw.view(stored)).reshape(source.shape).contiguous()

    def _descriptor(self, path: Path) -> int:
        with self._opening:
            if path not in self._files:
                self._files[path] = os.open(path, os.O_RDONLY)
            return self._files[path]


class WatchfulReader(Reader):
    """A reader that remembers which tensors hold values that are no finite numbers; they pass nevertheless.

    Attributes:
        broken: their names, each once; for reading when all threads are done.
    """

    def __init__(self) -> None:
        super().__init__()
        self.broken: dict[str, None] = {}

    def read(self, source: Source) -> torch.Tensor:
        """As `Reader.read`."""
        found = super().read(source)
        if not finite(found):
            self.broken[source.name] = None
        return found


def stored_dtype(source: Source) -> torch.dtype:
    """The dtype in which a tensor is stored.

    Raises:
        UserError: torch has none for it.
    """
    found = _ALL_DTYPES.get(source.entry.dtype)
    if found is None:
        wrong = f"its tensor {source.name} is of type {source.entry.dtype}"
        raise UserError.single(str(source.path), wrong, "use a file in fp32, fp16 or bf16")
    return found


class _Scratch(threading.local):
    """Per thread, one buffer that grows: memory that was written before is several times faster to read into."""

    def __init__(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.uint8)

    def take(self, size: int) -> torch.Tensor:
        """`size` bytes, valid until the next call in this thread."""
        if self.buffer.numel() < size:
            self.buffer = torch.empty(size, dtype=torch.uint8)
        return self.buffer[:size]


def _significant(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without its last ones: matrices and kernels of 1x1 are the same values."""
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _read(descriptor: int, start: int, raw: torch.Tensor, place: str) -> None:
    """Fill the bytes `raw` with those of a file from `start` on."""
    view = memoryview(raw.numpy())
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], start + done)
        if count == 0:
            raise UserError.single(place, "the file became shorter while it was read", "copy it again")
        done += count


def _check_numbers(final: torch.Tensor, stored: torch.Tensor, name: str, what: str) -> None:
    """Refuse a tensor with values that are no finite numbers, in the file or only once they are cast."""
    if finite(final):
        return
    if not finite(stored):
        wrong = f"its tensor {name} holds values that are no finite numbers"
        raise UserError.single(what, wrong, "the file is damaged, or its training diverged; use another one")
    wrong = f"its tensor {name} holds values that are too large for {str(final.dtype).removeprefix('torch.')}"
    raise UserError.single(what, wrong, "use --mixed_precision bf16 or no")


def finite(values: torch.Tensor) -> bool:
    """Are all values finite? Dense memory is walked in its own order, which is ten times faster."""
    if not values.numel() or not values.is_floating_point():
        return True
    values = values if values.dtype.itemsize > 1 else values.float()
    dense = values.permute(0, 2, 3, 1) if values.ndim == 4 else values
    return all(math.isfinite(bound) for bound in torch.stack(torch.aminmax(dense)).tolist())
