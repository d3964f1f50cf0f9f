"""Runs the scripts as a user does: real processes, one thread, no network."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "train_network.py"


def environment(**extra: str) -> dict[str, str]:
    """This process's environment, with the checkout importable."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "PYTEST_"))}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **extra}


def run_script(*arguments: object, timeout: float = 240, **extra: str) -> subprocess.CompletedProcess[str]:
    """`python train_network.py ...`; output is text."""
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def launch(*arguments: object, timeout: float = 240, **extra: str) -> subprocess.CompletedProcess[str]:
    """`accelerate launch --cpu --quiet train_network.py ...`; output is text."""
    return subprocess.run(
        launch_command(*arguments),
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def launch_command(*arguments: object) -> list[str]:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--quiet", "--num_processes", "1"]
    return [*launcher, str(SCRIPT), *map(str, arguments)]
