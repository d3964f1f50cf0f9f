"""Runs the scripts as a user does: real processes, one thread, no network."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "train_network.py"


def environment(**extra: str) -> dict[str, str]:
    """This process's environment, with the checkout importable."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "PYTEST_"))}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **extra}


def tool(name: str) -> Callable[..., int]:
    """The `main` of a script in tools/, to be run in this process."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    main: Callable[..., int] = module.main
    return main


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


@dataclass(frozen=True)
class Around:
    """What a program is run inside of: words before its command, and variables of its environment."""

    prefix: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)


def without_network() -> Around:
    """A network of nothing but loopback: a namespace of its own where this user may have one, else a guard in Python.

    The hub's own switch for offline work is left off: nothing may depend on it.
    """
    script = 'ip link set lo up && exec "$@"'
    prefix = ("unshare", "-n", "sh", "-c", script, "sh")
    offline = {"HF_HUB_OFFLINE": "0"}
    if shutil.which("unshare") and shutil.which("ip"):
        trial = subprocess.run([*prefix, "true"], capture_output=True, check=False)
        if trial.returncode == 0:
            return Around(prefix, offline)
    guard = os.pathsep.join([str(ROOT / "tests" / "no_network"), str(ROOT)])
    return Around((), {**offline, "PYTHONPATH": guard})


def launch(
    *arguments: object, timeout: float = 240, around: Around = Around(), **extra: str
) -> subprocess.CompletedProcess[str]:
    """`accelerate launch --cpu --quiet train_network.py ...`; output is text."""
    return subprocess.run(
        [*around.prefix, *launch_command(*arguments)],
        env=environment(**extra) | dict(around.variables),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def launch_command(*arguments: object) -> list[str]:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--quiet", "--num_processes", "1"]
    return [*launcher, str(SCRIPT), *map(str, arguments)]
