"""Reading from storage that many nodes share: an error there often passes."""

import time
from collections.abc import Callable
from typing import TypeVar

PAUSES_S = (0.1, 0.4, 1.0)

T = TypeVar("T")


def patiently(read: Callable[[], T]) -> T:
    """read(), tried again after each OSError; raises the last one.

    A network file system says ESTALE of a file that was replaced, EIO of a server that is starting again, and even
    ENOENT, on a node that asked for it too early, of a file that was renamed into place a moment ago.
    """
    for pause_s in PAUSES_S:
        try:
            return read()
        except OSError:
            time.sleep(pause_s)
    return read()
