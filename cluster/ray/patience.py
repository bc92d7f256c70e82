"""How long a driver waits for workers and nodes that say nothing."""

from dataclasses import dataclass

SLOWEST_STEPS = 10
LEASES = 1.5


@dataclass(frozen=True)
class Patience:
    """Limits of silence in seconds; the fields are the settings cluster.*_timeout_s of the same names."""

    startup_s: float
    heartbeat_s: float
    lease_s: float

    def with_worker(self, longest_s: float | None) -> float:
        """For a worker whose longest silence since its steps began was `longest_s`; None before that.

        It follows the run's own steps: what means a hang where they take seconds is nothing where they take minutes.
        """
        return self.startup_s if longest_s is None else max(self.heartbeat_s, SLOWEST_STEPS * longest_s)

    def why(self, longest_s: float | None) -> str:
        """What a worker that exceeded it has exceeded, in words."""
        if longest_s is None:
            return f"longer than cluster.startup_timeout_s={self.startup_s:g}"
        return f"longer than cluster.heartbeat_timeout_s={self.heartbeat_s:g} and {SLOWEST_STEPS} of its slowest steps"

    @property
    def with_node(self) -> float:
        """For an agent, which answers every few seconds at the latest, whatever its workers do.

        Longer than the lease: where a node is cut off, its workers have ended before others start elsewhere.
        """
        return LEASES * self.lease_s
