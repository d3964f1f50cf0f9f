"""Tensors out of `.safetensors` files into modules that were built on `meta`: no second copy, no mapped pages.

Each tensor is read by file offset straight into its own memory, or through one buffer per thread where it is cast,
laid out anew or moved, so beyond the model at most a few tensors exist at once. Reading runs in threads.
"""

import math
import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from library.errors import UserError
from library.models.headers import Entry

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_THREADS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class Source:
    """Where a module's tensor comes from: `target` in the module, `entry` of `path`."""

    target: str
    path: Path
    entry: Entry


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
        if math.prod(source.entry.shape) != math.prod(shape):
            wrong = f"its tensor {name} has the shape {source.entry.shape}, not {shape}"
            raise UserError.single(what, wrong, "the file is of another family")
        if source.entry.dtype not in _DTYPES:
            wrong = f"its tensor {name} is of type {source.entry.dtype}"
            raise UserError.single(what, wrong, "use a file in fp32, fp16 or bf16")
        layout = torch.channels_last if channels_last and len(shape) == 4 else torch.contiguous_format
        final = torch.empty(shape, dtype=dtype, device=device, memory_format=layout)
        stored = _DTYPES[source.entry.dtype]
        as_is = stored == dtype and device.type == "cpu" and final.is_contiguous()
        raw = final.view(-1).view(torch.uint8) if as_is else scratch.take(source.entry.end - source.entry.start)
        _read(files[source.path], source, raw, what)
        return name, final if as_is else final.copy_(raw.view(stored).view(shape))

    try:
        with ThreadPoolExecutor(_THREADS) as pool:
            state = dict(pool.map(load, wanted))
    finally:
        for descriptor in files.values():
            os.close(descriptor)
    module.load_state_dict(state, strict=True, assign=True)
    module.requires_grad_(False).eval()


class _Scratch(threading.local):
    """Per thread, one buffer that grows: memory that was written before is several times faster to read into."""

    def __init__(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.uint8)

    def take(self, size: int) -> torch.Tensor:
        """`size` bytes, valid until the next call in this thread."""
        if self.buffer.numel() < size:
            self.buffer = torch.empty(size, dtype=torch.uint8)
        return self.buffer[:size]


def _read(descriptor: int, source: Source, raw: torch.Tensor, what: str) -> None:
    """Fill the bytes `raw` with a tensor of a file."""
    view = memoryview(raw.numpy())
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], source.entry.start + done)
        if count == 0:
            raise UserError.single(what, f"{source.path} became shorter while it was read", "copy it again")
        done += count
