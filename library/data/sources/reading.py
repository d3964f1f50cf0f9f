"""Reads many small files: one after another while the disk answers at once, by threads as soon as it makes us wait.

Threads would only hinder each other where files come from memory: the work between two system calls is too short.
"""

import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from library import console
from library.data.ahead import ahead

if TYPE_CHECKING:
    from tqdm import tqdm

Item = TypeVar("Item")
Result = TypeVar("Result")
_CHUNK = 64
_PATIENCE = 2.0


class LateBar:
    """A progress bar that comes only when the work takes longer than two seconds. Close it in the end."""

    def __init__(self, description: str, total: int) -> None:
        self._description, self._total = description, total
        self._done, self._start = 0, time.monotonic()
        self._bar: tqdm[None] | None = None

    def add(self, count: int) -> None:
        """`count` more are done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._done < self._total and time.monotonic() - self._start > _PATIENCE:
            self._bar = console.bar(self._description, self._total, self._done)

    def close(self) -> None:
        """The work is over."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def default_threads() -> int:
    """Threads that read small files: file systems with latency want a few more than there are cores."""
    return min(16, (os.cpu_count() or 1) + 2)


def read_all(
    read: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    threads: int,
    progress: LateBar | None = None,
    always: bool = False,
) -> list[Result]:
    """`read` of every item, in order. At most `threads` threads work, and none while the disk answers at once.

    With `always` they work from the start: for long work that lets other threads run, such as decoding.
    """
    results: list[Result] = []
    chunks = [items[start : start + _CHUNK] for start in range(0, len(items), _CHUNK)]

    def read_chunk(chunk: Sequence[Item]) -> list[Result]:
        return [read(item) for item in chunk]

    def take(done: list[Result]) -> None:
        results.extend(done)
        if progress is not None:
            progress.add(len(done))

    position, waiting = 0, always
    while position < len(chunks) and not waiting:
        before = _waits()
        take(read_chunk(chunks[position]))
        position += 1
        waiting = threads > 1 and (before is None or (_waits() or 0) - before > _CHUNK // 2)
    for done in ahead(read_chunk, chunks[position:], threads=threads, depth=2 * threads):
        take(done)
    return results


def _waits() -> int | None:
    """How often this thread has waited for something so far; None where the system doesn't count that."""
    try:
        import resource

        return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
    except (ImportError, AttributeError):
        return None
