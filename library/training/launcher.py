"""What the program that started this one did to it. Standard library only: it must run before torch is imported."""

import os
import re
import sys
from collections.abc import Sequence
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


def missing_processes() -> str | None:
    """A line for a user who asked `accelerate launch` for several processes and got this one alone, or None.

    On a CPU it starts one process whatever `--num_processes` or its config file say, without a word.
    """
    if not under_launcher() or os.environ.get("WORLD_SIZE", "1") != "1" or "TORCHELASTIC_RUN_ID" in os.environ:
        return None
    try:
        given = (Path("/proc") / str(os.getppid()) / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    asked = _asked_processes(given)
    if asked < 2:
        return None
    script = Path(sys.argv[0]).name
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        better = f"on the CPU, start ACCELERATE_USE_CPU=true torchrun --nproc_per_node {asked} {script} ..."
    else:
        better = f"start accelerate launch --multi_gpu --num_processes {asked} {script} ..."
    return f"accelerate was asked for {asked} processes, but it has started one, and this run trains alone; {better}"


def _asked_processes(words: Sequence[str]) -> int:
    """The number of processes on a launcher's command line, or else in accelerate's config file; 1 if in neither."""
    if not any("accelerate" in word for word in words[:4]):
        return 1
    own = list(words)
    if sys.argv[0] in own:
        own = own[: own.index(sys.argv[0])]
    settings = {}
    for place, word in enumerate(own):
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            settings[name[2:].replace("-", "_")] = value if equals else (own[place + 1 : place + 2] or [""])[0]
    asked = settings.get("num_processes") or _configured_processes(settings.get("config_file"))
    return int(asked) if asked.isdigit() else 1


def _configured_processes(config_file: str | None) -> str:
    """What accelerate's config file says of the number of processes."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = Path(os.environ.get("HF_HOME") or f"{caches}/huggingface").expanduser()
    path = Path(config_file) if config_file else home / "accelerate" / "default_config.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
    found = re.search(r"""^["']?num_processes["']?\s*:\s*["']?(\d+)""", text, re.MULTILINE)
    return found.group(1) if found else ""
