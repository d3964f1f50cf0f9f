"""Samples how much memory a program's processes hold, or this one."""

import os
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

SAMPLE_SECONDS = 0.05


@dataclass(frozen=True)
class Measured:
    """How a program ran: seconds, the largest anonymous plus shared memory of one process (bytes), and its VmHWM."""

    returncode: int
    seconds: float
    anonymous: int
    high_water: int
    stderr: str


def _status(pid: int) -> dict[str, int]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines)
    return {key: int(value.split()[0]) * 1024 for key, value in pairs if key in ("RssAnon", "RssShmem", "VmHWM")}


def _family(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return [pid]
    return [pid, *(member for child in children for member in _family(int(child)))]


def run_measured(command: list[str], environment: dict[str, str], log: Path, timeout: float = 1200) -> Measured:
    """Run `command` to its end, sampling every 50 ms; its stderr goes to `log` and is returned.

    Raises:
        TimeoutError: it took longer than `timeout` seconds.
    """
    anonymous = high_water = 0
    start = time.perf_counter()
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=environment, stderr=file)
        while process.poll() is None:
            for pid in _family(process.pid):
                status = _status(pid)
                anonymous = max(anonymous, status.get("RssAnon", 0) + status.get("RssShmem", 0))
                high_water = max(high_water, status.get("VmHWM", 0))
            if time.perf_counter() - start > timeout:
                process.kill()
                raise TimeoutError(f"{command} ran for more than {timeout} s")
            time.sleep(SAMPLE_SECONDS)
    seconds = time.perf_counter() - start
    return Measured(process.returncode, seconds, anonymous, high_water, log.read_text(errors="replace"))


def anonymous() -> int:
    """What this process holds itself: RssAnon + RssShmem, bytes."""
    status = _status(os.getpid())
    return status.get("RssAnon", 0) + status.get("RssShmem", 0)


class Peak:
    """The largest `anonymous` within a `with` block, sampled every 20 ms.

    Attributes:
        grown: bytes that were held at most beyond those at the block's start.
    """

    def __enter__(self) -> "Peak":
        self._start = self._highest = anonymous()
        self._over = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._sampler.join()
        self.grown = max(self._highest, anonymous()) - self._start

    def _sample(self) -> None:
        while not self._over.wait(0.02):
            self._highest = max(self._highest, anonymous())
