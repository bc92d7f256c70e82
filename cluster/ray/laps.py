"""Where the time between a fault and the next step goes: what driver and workers did, one after the other."""

import time
from collections.abc import Mapping, Sequence


class Laps:
    """Seconds by what they were spent on, in order, from a time.monotonic() on; together they are all of the time."""

    def __init__(self, began: float) -> None:
        self._began = self._last = began
        self._laps: dict[str, float] = {}

    @property
    def seconds(self) -> float:
        return self._last - self._began

    @property
    def rounded(self) -> dict[str, float]:
        return {name: round(seconds, 3) for name, seconds in self._laps.items()}

    def lap(self, name: str, at: float | None = None) -> None:
        """What was done since the last lap is called `name`."""
        at = time.monotonic() if at is None else max(at, self._last)
        self._laps[name] = self._laps.get(name, 0.0) + at - self._last
        self._last = at

    def split(self, entered: Sequence[Mapping[str, float]]) -> None:
        """Splits what was done since the last lap, the workers' start, by the phases that each of them entered.

        A phase ends with the last worker's; `entered` has each worker's phases, in seconds after its start.
        """
        started = self._last
        phases: dict[str, float] = {}
        for of_worker in entered:
            for phase, seconds in of_worker.items():
                phases[phase] = max(phases.get(phase, 0.0), seconds)
        before = "starting"
        for phase, seconds in sorted(phases.items(), key=lambda item: item[1]):
            self.lap(before, started + seconds)
            before = phase
        self.lap(before)
