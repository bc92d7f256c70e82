"""A command that SIGKILL ends at a chosen instant."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import torch


def kill_when(instant: Callable[[], bool], arguments: Sequence[str], seconds: float = 50) -> None:
    """Runs `moray …` in a process of its own, with as many threads as this one has, until `instant` tells.

    Asserts that it did, before the command had ended.
    """
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "moray", *arguments]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + seconds
        while not (is_there := instant()) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        assert is_there, f"the instant did not come; exit code {process.poll()}"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
