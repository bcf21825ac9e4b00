from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from exvideo_train.training.interruption import Interruption


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_request_and_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Interruption() as interruption:
        assert not interruption.requested
        os.kill(os.getpid(), number)
        assert interruption.requested
        assert interruption.reason == number.name
        # Ctrl-C reaches a rank from the terminal and again from the launcher: one request.
        os.kill(os.getpid(), number)
        assert interruption.requested
    assert signal.getsignal(number) == before


def test_time_limit() -> None:
    with Interruption(time_limit_minutes=0.05 / 60) as interruption:
        assert not interruption.requested
        time.sleep(0.06)
        assert interruption.requested
        assert interruption.reason == "time limit"


SECOND_SIGNAL = """
import os, signal, time
from exvideo_train.training import interruption
interruption.SAME_REQUEST_SECONDS = 0.05
with interruption.Interruption():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here")
"""


def test_a_second_signal_exits_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", SECOND_SIGNAL], capture_output=True, text=True, timeout=60)
    assert done.returncode == 128 + signal.SIGTERM
    assert "still here" not in done.stdout
    assert "finishing the step" in done.stderr
    assert "exiting at once" in done.stderr
