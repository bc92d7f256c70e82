"""Where processes are, seen from outside by py-spy, which comes with Ray: they need not take part, and may hang."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

UNSEEN = "no stack"
INNERMOST = 8
"""Frames that are kept of a stack."""


def stacks(pids: Mapping[int, int], within_s: float) -> dict[int, str]:
    """The main thread's stack of each process, by rank, innermost call first, on one line.

    Takes at most about `within_s` seconds. Where nothing can be seen, for want of rights or time, it says so.
    """
    until = time.monotonic() + within_s
    return {rank: _stack(pid, max(until - time.monotonic(), 0.01)) for rank, pid in pids.items()}


def _stack(pid: int, within_s: float) -> str:
    tool = shutil.which("py-spy") or str(Path(sys.executable).with_name("py-spy"))
    # It must neither wait for a process nor have it wait: one may be suspended.
    command = [tool, "dump", "--nonblocking", "--json", "--pid", str(pid)]
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=within_s, check=True).stdout
    except subprocess.CalledProcessError as error:
        return f"{UNSEEN}: {' '.join(error.stderr.split())[:200]}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{UNSEEN}: {error}"
    frames = [frame for thread in json.loads(out) if thread["os_thread_id"] == pid for frame in thread["frames"]]
    return " < ".join(f"{frame['name']} ({frame['short_filename']}:{frame['line']})" for frame in frames[:INNERMOST])


def waits_for_peers(stack: str) -> bool:
    """Whether a process is in a collective; torch's wrappers around a model are further out."""
    return any("torch/distributed/" in frame for frame in stack.split(" < ")[:3])
