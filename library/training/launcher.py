"""What the program that started this one did to it. Standard library only: it must run before torch is imported."""

import os
from pathlib import Path


def under_launcher() -> bool:
    """Whether `accelerate launch` or `torchrun` started this process."""
    return any(name.startswith("ACCELERATE_") or name == "TORCHELASTIC_RUN_ID" for name in os.environ)


def prepare_cpu_threads() -> None:
    """Let torch use every core that this process may use, unless somebody chose a number of threads.

    `accelerate launch` sets OMP_NUM_THREADS to 1 for its only process, whatever the machine; it counts as chosen if it
    stood in the launcher's own environment or on its command line. Waiting threads sleep instead of spinning: on busy
    cores spinning makes a step a hundred times as long.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    if os.environ.get("OMP_NUM_THREADS") == "1" and alone and under_launcher() and not _threads_were_chosen():
        os.environ["OMP_NUM_THREADS"] = str(available_cores())


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _threads_were_chosen() -> bool:
    """Whether the launcher was told a number of threads; where that can't be seen, it counts as told."""
    launcher = Path("/proc") / str(os.getppid())
    try:
        variables = (launcher / "environ").read_bytes().split(b"\0")
        words = (launcher / "cmdline").read_bytes()
    except OSError:
        return True
    return b"num_cpu_threads_per_process" in words or any(v.startswith(b"OMP_NUM_THREADS=") for v in variables)
