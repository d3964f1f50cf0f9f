"""What the scripts in tools/ share: how they end, and the flags that several of them have. Imports no torch."""

import argparse
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING

from library.console import complain, error, lost_output, prepare_streams
from library.errors import UserError

if TYPE_CHECKING:
    import torch

INTERRUPTED = 130
PRECISIONS = {"float": "float32", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""How flags call dtypes -> torch's names."""


def run(work: Callable[[], object]) -> int:
    """Do a tool's work. Returns the exit code: 0; 2 after one line for each thing that is wrong with the input, or for
    what the system refuses, such as a full disk; 130 after Ctrl-C. What `work` returns doesn't count."""
    prepare_streams()
    try:
        work()
    except UserError as fault:
        return complain(fault)
    except shutil.Error as fault:
        error(_first_reason(fault))
        return 2
    except OSError as fault:
        error(f"{fault.filename}: {fault.strerror}" if fault.filename and fault.strerror else str(fault))
        return 2
    except KeyboardInterrupt:
        error("interrupted; nothing half-written is left")
        return INTERRUPTED
    if lost := lost_output():
        error(f"stdout: {lost}")
        return 2
    return 0


def _first_reason(fault: shutil.Error) -> str:
    """A line for a folder that couldn't be copied: its first file that wasn't, and why."""
    entries = fault.args[0] if fault.args else None
    if not isinstance(entries, list) or not entries or len(entries[0]) != 3:
        return str(fault)
    _, target, why = entries[0]
    reason = str(why).partition("] ")[2] or str(why)
    return f"{target}: {reason.partition(': ')[0]}"


def add_precision(parser: argparse.ArgumentParser, flag: str, meaning: str, default: str | None = None) -> None:
    """A flag that names a dtype, one of `PRECISIONS`."""
    parser.add_argument(flag, choices=tuple(PRECISIONS), default=default, help=meaning)


def dtype_of(precision: str | None) -> "torch.dtype | None":
    """The dtype that a flag names; None where it wasn't given."""
    import torch

    return None if precision is None else getattr(torch, PRECISIONS[precision])


def device_of(name: str | None) -> "torch.device":
    """The device that `--device` names, the CPU unless told.

    Raises:
        UserError: there is no such device here.
    """
    import torch

    try:
        device = torch.device(name or "cpu")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as fault:
        reason = str(fault).partition("\n")[0]
        raise UserError.single("--device", f"{name} can't be used here ({reason})", "use cpu") from fault
    return device
