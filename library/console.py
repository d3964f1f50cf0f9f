"""What a run says while it works: lines and progress bars on stderr. Tables that a user asked for go to stdout."""

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from tqdm import tqdm

Item = TypeVar("Item")


@lru_cache(maxsize=1)
def stderr() -> "Console":
    """The console of messages. Lines are never cut to the width of a terminal that isn't one."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def say(line: str) -> None:
    """One line of information."""
    stderr().print(line, markup=False)


def warn(line: str) -> None:
    """One line that a user should read: the run goes on."""
    stderr().print(f"warning: {line}", style="yellow", markup=False)


def error(line: str) -> None:
    """One line that ends the run."""
    stderr().print(f"error: {line}", style="red", markup=False)


def bar(description: str, total: int, done: int = 0) -> "tqdm[None]":
    """A progress bar with count, rate and time left; into a file it writes a line every two seconds."""
    import sys

    from tqdm import tqdm

    interval = 0.2 if sys.stderr.isatty() else 2.0
    return tqdm(desc=description, total=total, initial=done, mininterval=interval, dynamic_ncols=True, smoothing=0.1)


def track(items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
    """`items`, with a progress bar beside them."""
    with bar(description, total) as progress:
        for item in items:
            yield item
            progress.update()
