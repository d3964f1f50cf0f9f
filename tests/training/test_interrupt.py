"""Signals: the first is remembered or ends the set-up, the second aborts, handlers are put back."""

import os
import signal
import subprocess
import sys

import pytest

from library.training.interrupt import Interrupt, StoppedError
from tests.programs import environment


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_loop_is_told_and_the_set_up_is_ended(number: signal.Signals, code: int) -> None:
    before = signal.getsignal(number)
    with Interrupt() as interrupt:
        interrupt.defer()
        assert interrupt.exit_code == 0
        os.kill(os.getpid(), number)
        assert interrupt.exit_code == code
    assert signal.getsignal(number) is before
    with pytest.raises(StoppedError) as caught, Interrupt():
        os.kill(os.getpid(), number)
        signal.pause()
    assert caught.value.exit_code == code


def test_a_second_signal_aborts() -> None:
    code = """
import os, signal, time
from library.training.interrupt import Interrupt
with Interrupt() as interrupt:
    interrupt.defer()
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here", interrupt.exit_code, flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
    print("not reached")
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 130
    assert result.stdout == "still here 143\n"
