"""Processes that wait for each other: sums, one that is gone, launchers that start fewer than they were told to."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from library.training import distributed
from library.training.distributed import Processes
from tests.programs import ROOT, environment

SUMS = """
import os, sys, torch
from library.training.distributed import join_processes
processes = join_processes(5)
assert processes.timeout_minutes == 5
rank = processes.rank
a, b, c = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
a.grad, b.grad = torch.ones(2) * (rank + 1), torch.ones(2, dtype=torch.float32)
numbers = processes.sum_gradients([a, b, c], [torch.tensor(1.0 + rank), float(rank == 1)])
assert [float(number) for number in numbers] == [3.0, 1.0], numbers
assert a.grad.tolist() == [3, 3] and b.grad.tolist() == [2, 2] and c.grad is None
a.grad, b.grad = (None, None) if rank else (torch.ones(2), torch.ones(2) * 4)
processes.sum_gradients([a, b, c], [0.0], has_samples=not rank)
assert a.grad.tolist() == [1, 1] and b.grad.tolist() == [4, 4] and c.grad is None
assert processes.exchange(("from", rank)) == [("from", 0), ("from", 1)]
processes.wait()
print("fine", rank)
"""

LOST = """
import os, signal, sys, time, torch
from library.training.distributed import LostProcessError, join_processes
processes = join_processes(1)
processes.wait()
if processes.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
parameter = torch.nn.Parameter(torch.zeros(2))
parameter.grad = torch.ones(2)
try:
    WAIT
except LostProcessError as fault:
    print("told:", fault, parameter.grad.tolist(), flush=True)
    sys.exit(7)
"""


def two(tmp_path: Path, code: str, timeout: float = 90) -> subprocess.CompletedProcess[str]:
    """Two real processes, as torchrun starts them."""
    script = tmp_path / "script.py"
    script.write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    variables = environment(ACCELERATE_USE_CPU="true")
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=timeout, check=False)


def test_sums_and_exchanges(tmp_path: Path) -> None:
    done = two(tmp_path, SUMS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("fine") == 2


class NothingMadeThere(TorchFunctionMode):
    """Numbers that torch itself puts on a device stall a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.tensor, torch.as_tensor) or "device" not in (kwargs or {}), func
        return func(*args, **(kwargs or {}))


def test_what_is_summed_goes_to_the_device_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the sum over two processes that have the same."""
    copies: list[int] = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flat: flat.mul_(2))

    def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        copies.append(len(tensor))
        return tensor

    monkeypatch.setattr(distributed, "to_device", to_device)
    one, other = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(3))
    one.grad = torch.tensor([1.0, 2.0])
    with NothingMadeThere():
        numbers = Processes(0, 2, torch.device("cpu")).sum_gradients([one, other], [torch.tensor(1.5), 0.0, 1.0])
    assert [float(number) for number in numbers] == [3, 0, 2]
    assert one.grad.tolist() == [2, 4] and other.grad is None
    assert copies == [5], "two numbers and a place for the loss, and for each parameter whether it has a gradient"


@pytest.mark.parametrize("wait", ["processes.sum_gradients([parameter], [1.0])", "processes.wait()"])
def test_a_process_that_is_gone_is_told_at_once(tmp_path: Path, wait: str) -> None:
    begin = time.monotonic()
    done = two(tmp_path, LOST.replace("WAIT", wait))
    assert done.returncode != 0
    assert time.monotonic() - begin < 60
    told = done.stdout.split("told: ")[1]
    assert told.startswith("process 0 of 2 lost another one, which has ended or has not answered for 1 minutes")
    assert told.strip().endswith("[1.0, 1.0]")


@pytest.mark.slow
def test_a_process_that_hangs_is_given_up_after_the_timeout(tmp_path: Path) -> None:
    hanging = LOST.replace("os.kill(os.getpid(), signal.SIGKILL)", "time.sleep(200)").replace(
        "WAIT", "processes.wait()"
    )
    begin = time.monotonic()
    done = two(tmp_path, hanging, timeout=190)
    assert done.returncode != 0
    assert 55 < time.monotonic() - begin < 150
    assert "has not answered for 1 minutes (--ddp_timeout)" in done.stdout


PROBE = """
import sys
sys.path.insert(0, sys.argv[1])
from library.training.launcher import missing_processes
sys.stdout.write(f"told: {missing_processes()}\\n")
"""


@pytest.mark.parametrize(
    ("words", "config", "asked"),
    [
        (["--num_processes", "2"], None, 2),
        (["--num_processes=3"], None, 3),
        ([], "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_processes: 4\nuse_cpu: true\n", 4),
        (["--num_processes", "1"], "num_processes: 4\nuse_cpu: true\n", None),
        ([], None, None),
    ],
)
def test_accelerate_on_the_cpu_starts_one_process_and_the_user_is_told(
    tmp_path: Path, words: list[str], config: str | None, asked: int | None
) -> None:
    script = tmp_path / "probe.py"
    script.write_text(PROBE)
    variables = {"HF_HOME": str(tmp_path / "home")}
    if config is not None:
        (tmp_path / "home/accelerate").mkdir(parents=True)
        (tmp_path / "home/accelerate/default_config.yaml").write_text(config)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--quiet", *words]
    command = [*launcher, str(script), str(ROOT), "--num_processes", "9"]
    done = subprocess.run(
        command, env=environment(**variables), capture_output=True, text=True, timeout=120, check=True
    )
    told = done.stdout.split("told: ")[1].strip()
    if asked is None:
        assert told == "None"
    else:
        assert told.startswith(f"accelerate was asked for {asked} processes, but it has started one")
        assert f"ACCELERATE_USE_CPU=true torchrun --nproc_per_node {asked} probe.py" in told


def test_nobody_else_is_told(tmp_path: Path) -> None:
    script = tmp_path / "probe.py"
    script.write_text(PROBE)
    alone = [sys.executable, str(script), str(ROOT), "--num_processes", "9"]
    done = subprocess.run(alone, env=environment(), capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "told: None"
    both = two(tmp_path, PROBE.replace("sys.argv[1]", repr(str(ROOT))))
    assert both.stdout.count("told: None") == 2, both.stderr
