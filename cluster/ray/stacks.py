"""Where processes are, seen from outside by py-spy, which comes with Ray: they need not take part, and may hang."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

INNERMOST = 8
"""Frames that are kept of a stack."""


def stacks(pids: Mapping[int, int], within_s: float) -> dict[int, str]:
    """The main thread's stack of each process, by rank, innermost call first, on one line.

    Takes at most about `within_s` seconds. Where nothing can be seen, for want of rights or time, it says so.
    """
    tool = shutil.which("py-spy") or str(Path(sys.executable).with_name("py-spy"))
    deadline = time.monotonic() + within_s
    try:
        looks = {
            # It must neither wait for a process nor have it wait: one may be suspended.
            rank: subprocess.Popen(
                [tool, "dump", "--nonblocking", "--json", "--pid", str(pid)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank, pid in pids.items()
        }
    except OSError as error:
        return dict.fromkeys(pids, f"no stack: {error}")
    return {rank: _stack(look, pids[rank], deadline - time.monotonic()) for rank, look in looks.items()}


def _stack(look: subprocess.Popen[str], pid: int, within_s: float) -> str:
    try:
        out, errors = look.communicate(timeout=max(within_s, 0.01))
    except subprocess.TimeoutExpired:
        look.kill()
        look.communicate()
        return "no stack: py-spy took too long"
    if look.returncode:
        return f"no stack: {' '.join(errors.split())[:200]}"
    (frames,) = [thread["frames"] for thread in json.loads(out) if thread["os_thread_id"] == pid] or [[]]
    return " < ".join(f"{frame['name']} ({frame['short_filename']}:{frame['line']})" for frame in frames[:INNERMOST])


def waits_for_peers(stack: str) -> bool:
    """Whether a process is in a collective."""
    return "torch/distributed/" in stack
