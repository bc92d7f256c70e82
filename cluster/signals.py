"""SIGTERM, SIGUSR1 and Ctrl-C ask a run to stop; they do not cut it off."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Becomes true at the first signal; where `impatient`, a second Ctrl-C raises KeyboardInterrupt at once."""

    def __init__(self, impatient: bool) -> None:
        self._impatient = impatient
        self._requested = False

    def __call__(self) -> bool:
        return self._requested

    def handle(self, number: int, frame: FrameType | None) -> None:
        # Only Ctrl-C escalates: schedulers repeat SIGTERM, and a repeated one asks for nothing new.
        if self._requested and self._impatient and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._requested = True


def hold_sigterm() -> None:
    """Lets SIGTERM wait for stop_on_signals: during imports it is a stop like any other, not a death.

    One that comes after that is ignored: a run that has ended ends with its own code.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def leave_on_sigterm(code: int) -> None:
    """Has SIGTERM, one that was held included, end this process at once and without a word, with this exit code."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


@contextmanager
def stop_on_signals(impatient: bool) -> Iterator[StopRequest]:
    """Turns SIGTERM, one that was held included, SIGINT and SIGUSR1 into a StopRequest until the block ends.

    SIGUSR1 is what schedulers are often asked to send some time before they end a job.

    Outside the main thread Python allows no handlers: the request then never comes.
    """
    request = StopRequest(impatient)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.signal(number, request.handle) for number in numbers}
    held = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    try:
        yield request
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        for number, handler in before.items():
            # The threads that began in the block hold nothing back, and Python's own handlers end before they do.
            signal.signal(number, signal.SIG_IGN if number in held else handler)
