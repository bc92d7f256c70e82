"""How long a driver waits for workers and nodes that say nothing."""

from dataclasses import dataclass

USUAL_STEPS = 10
SLOWEST_STEPS = 3
FLOOR_S = 15.0
"""A disk, a network or a busy machine may hold up any worker for so long."""
SUSPENDED_S = 5.0
LEASES = 1.5


@dataclass(frozen=True)
class Patience:
    """Limits of silence in seconds; the fields are the settings cluster.*_timeout_s of the same names."""

    startup_s: float
    heartbeat_s: float
    lease_s: float

    def with_worker(self, usual_s: float | None, longest_s: float | None, is_long: bool = False) -> float:
        """For a worker that is usually silent for `usual_s`, and was once for `longest_s`; None before its steps began.

        It follows the run's own steps: what means a hang where they take a tenth of a second is nothing where they
        take minutes. `heartbeat_s` is the most, unless steps are nearly as long as that, and holds for what `is_long`.
        """
        if usual_s is None or longest_s is None:
            return self.startup_s
        of_steps = self.heartbeat_s if is_long else max(USUAL_STEPS * usual_s, FLOOR_S)
        return max(min(of_steps, self.heartbeat_s), SLOWEST_STEPS * longest_s)

    def why(self, usual_s: float | None, longest_s: float | None, is_long: bool = False) -> str:
        """What a worker that exceeded it has exceeded, in words."""
        if usual_s is None or longest_s is None:
            return f"longer than cluster.startup_timeout_s={self.startup_s:g}"
        limit_s = self.with_worker(usual_s, longest_s, is_long)
        if limit_s == self.heartbeat_s:
            return f"longer than cluster.heartbeat_timeout_s={self.heartbeat_s:g}"
        return f"longer than the {limit_s:.3g} s that steps of {usual_s:.2g} s, the slowest of {longest_s:.2g} s, allow"

    @property
    def with_suspended(self) -> float:
        """For a process that is suspended, and so cannot speak."""
        return min(SUSPENDED_S, self.heartbeat_s)

    @property
    def with_node(self) -> float:
        """For an agent, which answers every few seconds at the latest, whatever its workers do.

        Longer than the lease: where a node is cut off, its workers have ended before others start elsewhere.
        """
        return LEASES * self.lease_s
