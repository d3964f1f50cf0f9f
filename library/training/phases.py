"""How long each part of a run took, and how much memory it needed: said while it goes and summed up at the end."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from library.console import say
from library.training.memory_plan import Prediction


class Phases:
    """Times of named phases, in seconds of wall clock. A phase within a phase stops the outer one's clock.

    Attributes:
        failed: the innermost phase that the last error came out of; "" without one.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.failed = ""
        self._running: list[str] = []
        self._since = time.perf_counter()
        self._peaks: dict[str, int] = {}
        self._highest = 0
        self._fault: BaseException | None = None

    def _turn(self) -> None:
        now, highest = time.perf_counter(), peak_memory()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
            if highest > self._highest:
                self._peaks[self._running[-1]] = highest
        self._since, self._highest = now, highest

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
        except BaseException as fault:
            if fault is not self._fault:
                self.failed, self._fault = name, fault
            raise
        finally:
            self._turn()
            self._running.pop()

    @property
    def peak_phase(self) -> str:
        """The phase in which memory was at its peak so far; "" where none made it grow."""
        return max(self._peaks, key=lambda name: self._peaks[name], default="")

    def summary(self, updates: int, prediction: Prediction | None = None) -> str:
        """One line: the phases in order, seconds per step, and the peak of memory with what was predicted."""
        parts = [f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items()]
        if updates and "steps" in self.seconds:
            parts.append(f"{self.seconds['steps'] / updates:.2f} s a step")
        return f"time: {', '.join(parts)}; {self._memory(prediction)}"

    def _memory(self, prediction: Prediction | None) -> str:
        on_device, here = device_peak(), peak_memory()
        where = f" ({self.peak_phase})" if self.peak_phase else ""
        told = f", predicted {prediction.total / 2**30:.2f} GiB" if prediction else ""
        if on_device is None or (prediction is not None and prediction.device == "cpu"):
            return f"peak memory {here / 2**30:.2f} GiB{where}{told}"
        return f"peak memory of the GPU {on_device / 2**30:.2f} GiB{told}, main memory {here / 2**30:.2f} GiB{where}"


def peak_memory() -> int:
    """The highest resident set of this process so far, in bytes (pages of mapped files counted in).

    Linux's own figure for the program that runs now: that of getrusage also knows what the launcher held before it.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_peak() -> int | None:
    """The most that torch held of the GPU's memory, in bytes; None without a GPU in use."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return int(torch.cuda.max_memory_reserved())
