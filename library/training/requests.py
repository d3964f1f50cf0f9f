"""Wishes that a user leaves as files beside the results: `touch <output_dir>/save_now` or `stop`. Imports no torch.

Signals are elsewhere (training.interrupt). Only one process looks; what it finds it tells to the others itself.
"""

import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from library.console import say, warn

Wish = Literal["save", "stop"]

FILES: dict[str, Wish] = {"stop": "stop", "save_now": "save"}
"""The names of the files, in the order in which they count."""


class Requests:
    """Looks for the files at most every `interval` seconds; a file is taken away when it is found.

    Files that lie there when this is made are from before the run: they are taken away and do nothing.
    """

    def __init__(self, output_dir: Path, interval: float = 0.5, clock: Callable[[], float] = time.monotonic) -> None:
        self._output_dir, self._interval, self._clock = output_dir, interval, clock
        self._ignored: set[str] = set()
        self._next = clock()
        for name in FILES:
            if self._take(name):
                say(f"{output_dir / name} is from before this run and was removed")

    def poll(self) -> Wish | None:
        """What was asked for since the last call. `stop`, which saves too, counts before `save`."""
        now = self._clock()
        if now < self._next:
            return None
        self._next = now + self._interval
        found = [wish for name, wish in FILES.items() if self._take(name)]
        return found[0] if found else None

    def _take(self, name: str) -> bool:
        """Whether the file is there; it is removed. One that can't be removed counts once."""
        path = self._output_dir / name
        try:
            if name in self._ignored or not stat.S_ISREG(path.stat().st_mode):
                return False
        except OSError:
            return False
        try:
            path.unlink()
        except FileNotFoundError:
            return False
        except OSError as fault:
            self._ignored.add(name)
            warn(f"{path} can't be removed ({fault.strerror}); from here on it is not looked at")
        return True
