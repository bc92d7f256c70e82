"""When a generation stops for another one: for more workers, or before a node leaves that has said so."""

import math
import threading
import time
from contextlib import suppress

from ray.exceptions import RayError

from moray.cluster.events import OnEvent
from moray.cluster.ray.nodes import Gang, Node, Slots

LOOK_EVERY_S = 2.0
WORTH = 10.0
"""How many times as long as it took to start, a generation must have been at work before it stops for a larger one."""


class Resizing:
    """Looks at the cluster while a generation is at work: for slots, whose agents start meanwhile, and for farewells.

    `why` the generation shall stop for another one; None: it shall not. `must_end`: no other one would have room.
    `left_s`: what its workers expect to need until the end, which more of them must make shorter than another start.
    """

    def __init__(self, gang: Gang, on_event: OnEvent) -> None:
        self._gang, self._on_event = gang, on_event
        self._seen: Slots | None = None
        self._is_closed = threading.Event()
        self.must_end = False
        self.begin(0)
        if gang.is_elastic or not gang.is_local:
            # A head that is slow must not keep from their work those who watch the workers.
            threading.Thread(target=self._look, name="slots", daemon=True).start()

    def _look(self) -> None:
        while not self._is_closed.wait(LOOK_EVERY_S):
            # Ray's client ends this process a minute after it has asked a head that is gone.
            if self._gang.is_within_reach():
                with suppress(RayError):
                    self._seen = self._gang.look()

    def close(self) -> None:
        self._is_closed.set()

    def begin(self, workers: int) -> None:
        """A generation of so many workers begins."""
        self.why: str | None = None
        self.left_s, self._seen = math.inf, None
        self._workers, self._began = workers, time.monotonic()
        self._starting_s: float | None = None

    def is_to_go_on(self) -> bool:
        """Of a generation that stopped, unasked: for another one, or as all that ran on some node was told to end."""
        if not self.why and self._gang.is_within_reach():
            seen = self._gang.look()
            if leaving := self._gang.leaving(seen):
                self._leave(leaving, seen)
        return self.why is not None

    def is_due(self) -> bool:
        """Whether the generation shall stop; to be asked often, from when all are at work."""
        now = time.monotonic()
        if self._starting_s is None:
            self._starting_s = now - self._began
        seen, self._seen = self._seen, None
        if seen and not self.why:
            if leaving := self._gang.leaving(seen):
                self._leave(leaving, seen)
            elif self._gang.is_elastic:
                self._gang.grow(seen)
                more = arrangement.world_size if (arrangement := self._gang.arrangement) else 0
                is_worth_it = self.left_s * (1 - self._workers / max(more, 1)) > self._starting_s
                if is_worth_it and now - self._began >= WORTH * self._starting_s:
                    self.why = "there are slots for more"
        return self.why is not None

    def _leave(self, leaving: list[Node], seen: Slots) -> None:
        if self.must_end:
            return
        hosts = ", ".join(node.host for node in leaving)
        self._on_event("leaving", {"node": hosts, "node_ids": [node.node_id for node in leaving]})
        if self._gang.can_do_without(leaving, seen):
            self.why = f"{hosts} is leaving"
        else:
            self.must_end = True
