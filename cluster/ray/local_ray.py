"""A Ray of one driver's own on this machine alone."""

from moray import UserError
from moray.cluster.cores import usable_cores
from moray.cluster.ray.own_ray import OwnRay
from moray.cluster.ray.part import Part

MAX_WORKERS_PER_CORE = 8


class LocalRay(OwnRay):
    """A Ray with so many CPU slots."""

    def __init__(self, slots: int) -> None:
        super().__init__("local Ray", Part(slots).command())


def slots_for(workers: int) -> int:
    """The CPU slots of a local Ray for so many workers: at least the cores; more where workers share them.

    Raises UserError where this machine is far too small.
    """
    cores = usable_cores()
    if workers > MAX_WORKERS_PER_CORE * cores:
        raise UserError(
            f"cluster.workers={workers} is too many for a local Ray on {cores} cores; "
            f"choose at most {MAX_WORKERS_PER_CORE * cores}, or set RAY_ADDRESS to a cluster"
        )
    return max(cores, workers)
