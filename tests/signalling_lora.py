"""networks.lora as a third-party module that sends a signal in the middle of a chosen micro-step of its process.

LORASMITH_TEST_SIGNAL is `TERM@9`: SIGTERM in the ninth micro-step; `launcher:TERM@9` sends it to the parent process,
`rank1:TERM@3` sends it to itself in the process of rank 1 only.
"""

import os
import signal
from typing import Any

from networks import lora


def create_network(*arguments: Any, **options: Any) -> Any:
    network = lora.create_network(*arguments, **options)
    target, _, order = os.environ.get("LORASMITH_TEST_SIGNAL", "").rpartition(":")
    if order and target in ("self", "launcher", f"rank{os.environ.get('RANK', '0')}"):
        name, _, at = order.partition("@")
        _send_at(network, os.getppid() if target == "launcher" else os.getpid(), f"SIG{name}", int(at))
    return network


def _send_at(network: Any, process: int, name: str, at: int) -> None:
    count, on_step_start = 0, network.on_step_start

    def signalling(*arguments: Any) -> None:
        nonlocal count
        count += 1
        if count == at:
            os.kill(process, getattr(signal, name))
        on_step_start(*arguments)

    network.on_step_start = signalling
