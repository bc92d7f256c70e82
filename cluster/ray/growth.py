"""When a generation stops for one with more workers: once there are slots for them, and a restart is worth it."""

import time

from moray.cluster.ray.nodes import Gang

LOOK_EVERY_S = 2.0
WORTH = 10.0
"""How many times as long as it took to start, a generation must have been at work before it stops for a larger one."""


class Growth:
    """Looks for slots while a generation is at work; their agents start meanwhile."""

    def __init__(self, gang: Gang) -> None:
        self._gang = gang
        self._workers = 0
        self._began = self._looked = 0.0
        self._starting_s: float | None = None
        self.is_wanted = False

    def begin(self, workers: int) -> None:
        """A generation of so many workers begins."""
        self._workers, self._began, self._starting_s, self.is_wanted = workers, time.monotonic(), None, False

    def is_due(self) -> bool:
        """Whether the generation shall stop; to be asked often, from when all are at work."""
        now = time.monotonic()
        if self._starting_s is None:
            self._starting_s = now - self._began
        if self._gang.is_elastic and now - self._looked >= LOOK_EVERY_S:
            self._looked = now
            self._gang.grow()
            arrangement, is_worth_it = self._gang.arrangement, now - self._began >= WORTH * self._starting_s
            self.is_wanted = bool(is_worth_it and arrangement and arrangement.world_size > self._workers)
        return self.is_wanted
