"""How far a task is, told to whoever listens: bytes that it has gone through."""

from collections.abc import Callable

_listeners: list[Callable[[int], None]] = []


def tick(n_bytes: int) -> None:
    """Says that so many bytes more are done."""
    for listener in _listeners:
        listener(n_bytes)


def listen(listener: Callable[[int], None]) -> Callable[[], None]:
    """Calls the listener at every tick in this process; returns what ends that."""
    _listeners.append(listener)
    return lambda: _listeners.remove(listener)
