"""What a run says while it works: lines and progress bars on stderr. Tables that a user asked for go to stdout.

With `write_to`, lines go to a file instead, each with its time; errors go to both, bars stay on stderr.
"""

import contextlib
import io
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from library.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from tqdm import tqdm

Item = TypeVar("Item")
_WIDTH = 100


@lru_cache(maxsize=1)
def stderr() -> "Console":
    """The console of messages. Lines are never cut to the width of a terminal that isn't one."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_quiet_below = LEVELS.index("INFO")


def set_level(name: str) -> None:
    """Leave out what is less important than `name`, one of `LEVELS`; progress bars count as INFO."""
    global _quiet_below
    _quiet_below = LEVELS.index(name)


_path: Path | None = None
"""The file that lines go to. It is made anew with its first line, its folder too."""
_file: int | None = None
"""Its descriptor, once it is open. It is written without buffers or locks, even from a signal handler."""


def write_to(path: Path | None) -> None:
    """Have lines written to a file, which is made anew for the first of them, instead of stderr; None goes back to it.

    Raises:
        UserError: the file is there and can't be written.
    """
    global _file, _path
    if _file is not None:
        os.close(_file)
    _file, _path = None, None
    if path is None:
        return
    try:
        if path.exists():
            os.close(os.open(path, os.O_WRONLY))
    except OSError as fault:
        raise UserError.single("--console_log_file", f"{path} can't be written: {fault}") from fault
    _path = path


def _to_file(line: str) -> bool:
    """Whether the line went to the file. Where that is full or can't be made, stderr is told instead."""
    global _file
    if _path is None:
        return False
    data = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n".encode(errors="replace")
    try:
        if _file is None:
            _path.parent.mkdir(parents=True, exist_ok=True)
            _file = os.open(_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o666)
        while data:
            data = data[os.write(_file, data) :]
    except OSError:
        return False
    return True


def _shown(level: str) -> bool:
    return LEVELS.index(level) >= _quiet_below


class _Lasting:
    """A stream whose reader may go away: what can't be written any more is dropped.

    Attributes:
        fault: why something was lost, unless the reader had gone.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.fault: OSError | None = None

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, work: Callable[[], object]) -> None:
        try:
            work()
        except OSError as fault:
            if not isinstance(fault, BrokenPipeError):
                self.fault = fault
        except ValueError:
            pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def prepare_streams() -> None:
    """Make sure that writing a message can't end a run: closed streams go nowhere, what can't be encoded becomes ?.

    bitsandbytes, which diffusers imports wherever it is installed, warns on CPUs of what nobody here needs.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, io.StringIO())
        elif not isinstance(stream, _Lasting):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
            setattr(sys, name, _Lasting(stream))


def lost_output() -> str | None:
    """Why something that was written to stdout didn't arrive, such as a full disk; None if all did, or nobody reads."""
    stream = sys.stdout
    if not isinstance(stream, _Lasting):
        return None
    stream.flush()
    return None if stream.fault is None else stream.fault.strerror or str(stream.fault)


def tell_at_once(line: str) -> None:
    """A line from within a signal handler, where neither locks may be waited for nor errors raised."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if _shown("INFO") and not _to_file(line) and sys.stderr.fileno() == 2:
            os.write(2, f"\n{line}\n".encode())


def _print(line: str, style: str | None = None) -> None:
    """A line of its own, also while a progress bar stands on the last one."""
    if "tqdm" not in sys.modules:
        stderr().print(line, style=style, markup=False)
        return
    from tqdm import tqdm

    with tqdm.external_write_mode(file=sys.stderr):
        stderr().print(line, style=style, markup=False)


def say(line: str) -> None:
    """One line of information."""
    if _shown("INFO") and not _to_file(line):
        _print(line)


def warn(line: str) -> None:
    """One line that a user should read: the run goes on."""
    if _shown("WARNING") and not _to_file(f"warning: {line}"):
        _print(f"warning: {line}", "yellow")


def error(line: str) -> None:
    """One line that ends the run."""
    _to_file(f"error: {line}")
    _print(f"error: {line}", "red")


def complain(fault: UserError) -> int:
    """Say what a user did that can't be done, each thing once, with the lines that were to be shown anyway.

    Returns exit code 2.
    """
    for line in fault.notices:
        say(line)
    for line in dict.fromkeys(map(str, fault.problems)):
        error(line)
    return 2


def bar(description: str, total: int, done: int = 0) -> "tqdm[None]":
    """A progress bar with count, rate and time left; into a file it writes a line every two seconds."""
    from tqdm import tqdm

    interval = 0.2 if sys.stderr.isatty() else 2.0
    more: dict[str, Any] = {"mininterval": interval, "disable": not _shown("INFO")}
    if _has_width():
        more["dynamic_ncols"] = True
    else:
        more["ncols"] = _WIDTH
    return tqdm(desc=description, total=total, initial=done, **more)


def _has_width() -> bool:
    """Whether stderr knows how wide it is. Terminals without a size say 0, on which no bar would fit."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError, AttributeError):
        return not sys.stderr.isatty()


def track(items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
    """`items`, with a progress bar beside them."""
    with bar(description, total) as progress:
        for item in items:
            yield item
            progress.update()
