"""`accelerate launch` pins its process to one thread; a user who chose nothing gets every core."""

import subprocess
import sys
from pathlib import Path

import pytest

from library.training.launcher import available_cores
from tests.programs import environment

PROBE = """
import os
from library.training.launcher import prepare_cpu_threads
prepare_cpu_threads()
print("threads", os.environ.get("OMP_NUM_THREADS"), os.environ["OMP_WAIT_POLICY"])
"""


@pytest.mark.parametrize(
    ("words", "variables", "threads"),
    [
        ([], {}, available_cores()),
        (["--num_cpu_threads_per_process", "1"], {}, 1),
        ([], {"OMP_NUM_THREADS": "1"}, 1),
    ],
)
def test_threads_under_accelerate(tmp_path: Path, words: list[str], variables: dict[str, str], threads: int) -> None:
    script = tmp_path / "probe.py"
    script.write_text(PROBE)
    env = {key: value for key, value in environment().items() if key != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--quiet", *words, str(script)]
    result = subprocess.run(command, env=env | variables, capture_output=True, text=True, timeout=120, check=True)
    assert f"threads {threads} PASSIVE" in result.stdout
