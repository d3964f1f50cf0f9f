"""How long each part of a run took, and how much memory it needed: said while it goes and summed up at the end."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from library.console import say


class Phases:
    """Times of named phases, in seconds of wall clock. A phase within a phase stops the outer one's clock."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._running: list[str] = []
        self._since = time.perf_counter()

    def _turn(self) -> None:
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

    @contextmanager
    def phase(self, name: str, announce: str = "") -> Iterator[None]:
        """Time the body under `name`; `announce` is said first, so that a long phase is never silent."""
        if announce:
            say(announce)
        self._turn()
        self.seconds.setdefault(name, 0.0)
        self._running.append(name)
        try:
            yield
        finally:
            self._turn()
            self._running.pop()

    def summary(self, updates: int) -> str:
        """One line: the phases in order, seconds per step, and the peak of resident memory."""
        parts = [f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items()]
        if updates and "steps" in self.seconds:
            parts.append(f"{self.seconds['steps'] / updates:.2f} s a step")
        return f"time: {', '.join(parts)}; peak memory {peak_memory() / 2**30:.2f} GiB"


def peak_memory() -> int:
    """The highest resident set of this process so far, in bytes (pages of mapped files counted in)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
