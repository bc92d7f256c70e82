"""A process that does not outlive the one that started it, and lets itself be looked at by it."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h
PR_SET_PTRACER = 0x59616D61


def die_with_parent(parent: int | None = None) -> None:
    """Has the kernel kill this process when its parent ends, however that ends and whatever this one is stuck in.

    parent: its process id, where that may have ended before this is called.
    """
    if sys.platform == "linux":
        parent = parent or os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def be_seen_by_parent() -> None:
    """Lets the process that started this one, and its children, read this one's memory, where Yama restricts that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PTRACER, os.getppid(), 0, 0, 0)
