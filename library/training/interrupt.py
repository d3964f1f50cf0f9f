"""Being told to stop: SIGINT, SIGTERM, or the launcher gone. The loop asks at each step; a second signal aborts."""

import os
import signal
from types import FrameType
from typing import Self

from library.console import tell_at_once
from library.training.launcher import under_launcher

_STOPPING = "stopping: this step ends, then weights and state are saved; a second signal ends at once"


class StoppedError(BaseException):
    """Raised outside the loop, where there is nothing to save yet. `exit_code` is 130 or 143.

    Not an `Exception`: a signal raises it wherever the program stands, and no library may take it for its own error.
    """

    def __init__(self, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__(f"stopped (exit code {exit_code})")


class Interrupt:
    """What the process was told while a `with` block runs. Enter it early: its parent then is the launcher."""

    def __init__(self) -> None:
        self._signal = 0
        self._deferred = False
        self._launcher = os.getppid() if under_launcher() else None
        self._launcher_has_gone = False

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._signal:
            os._exit(128 + number)
        self._signal = number
        if not self._deferred:
            raise StoppedError(128 + number)
        tell_at_once(_STOPPING)

    def defer(self) -> None:
        """From here on the loop asks; a signal no longer raises."""
        self._deferred = True

    @property
    def exit_code(self) -> int:
        """0, or 130/143 once the process was told to stop. A launcher that has gone counts as SIGTERM."""
        if self._signal:
            return 128 + self._signal
        if self._launcher is not None and os.getppid() != self._launcher:
            self._launcher_has_gone = True
        return 128 + signal.SIGTERM if self._launcher_has_gone else 0
