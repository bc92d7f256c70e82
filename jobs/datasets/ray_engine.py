"""Tasks on the nodes of a Ray: of the cluster of RAY_ADDRESS or, where there is none, of one of this machine's own.

Ray's tasks alone, and not Ray Data (2.60, measured): its exchanges are not ours to build on, since two runs of a hash
shuffle gave different bytes; its readers let broken text pass as good and lose whole blocks without a count; its
checkpoint saved nothing, and said nothing, of a pipeline with an exchange in it. What each does for a preparation, the
tasks do themselves: an exchange is a slice of sorted runs, and whatever is done lies on storage.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import ray
from ray.exceptions import RayError, RayTaskError

from moray import UserError
from moray.cluster.ray.connection import Connection, RayLostError, connected
from moray.cluster.worker import WorkerError
from moray.data.preparation.tasks import Done, Task
from moray.jobs.datasets.engine import POLL_S, WORKER_MB
from moray.jobs.datasets.ray_task import Home, heard, home_in, perform_at

AHEAD = 2
"""Tasks under way for each slot: the next one is there when one ends."""
LOSSES = 3
"""So often may a task be lost with its process or node and be done again."""


@contextmanager
def ray_engine(scratch: Path, most: int | None) -> Iterator["RayEngine"]:
    """Connects to a Ray. scratch: a folder on storage that all nodes share. most: tasks at a time; None: all that fit.

    Raises UserError and WorkerError as `connected` does.
    """
    with home_in(scratch) as home, connected(1) as connection:
        yield RayEngine(connection, home, most)


class RayEngine:
    """Does tasks on all nodes, each with a CPU and its share of memory set aside."""

    def __init__(self, connection: Connection, home: Home, most: int | None) -> None:
        self._connection, self._home, self._most = connection, home, most
        # Lost tasks are counted and done again here: Ray would do one that memory is too small for without end.
        self._remote = ray.remote(num_cpus=1, memory=WORKER_MB << 20, max_retries=0)(perform_at)

    def do(self, tasks: Sequence[Task], on_tick: Callable[[int], None]) -> Iterator[tuple[int, Done]]:
        """As `Engine.do`; on_tick hears what tasks tell each second.

        Raises UserError where a node is not fit or a task was lost too often, and WorkerError where Ray itself is lost.
        """
        waiting, losses, told = deque(range(len(tasks))), Counter[int](), dict[str, int]()
        running: dict[ray.ObjectRef, int] = {}
        slots = self._slots()
        most = self._most or AHEAD * slots
        try:
            while waiting or running:
                while waiting and len(running) < most:
                    number = waiting.popleft()
                    running[self._remote.remote(self._home, tasks[number])] = number
                done, _ = ray.wait(list(running), timeout=POLL_S)
                self._connection.check()
                on_tick(heard(self._home.token, told))
                for ref in done:
                    number = running.pop(ref)
                    try:
                        found = ray.get(ref)
                    except RayTaskError as error:
                        raise error.cause from None
                    except RayError as error:
                        losses[number] += 1
                        if losses[number] > LOSSES:
                            raise UserError(_lost(tasks[number], error)) from None
                        waiting.appendleft(number)
                    else:
                        yield number, found
        except RayLostError as error:
            running.clear()  # nobody is there to be told
            raise WorkerError(f"{error}; the same command goes on from what is done") from None
        finally:
            for ref in running:
                ray.cancel(ref, force=True)

    def _slots(self) -> int:
        """How many tasks run at a time. Raises UserError where none ever would."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        slots = sum(int(min(node.get("CPU", 0), node.get("memory", 0) / (WORKER_MB << 20))) for node in nodes)
        if not slots:
            raise UserError(
                f"no node of the Ray at {self._connection.address} has a CPU and {WORKER_MB} MB of memory for a task; "
                "start nodes with more, or leave --engine ray out"
            )
        return slots


def _lost(task: Task, error: RayError) -> str:
    why = " ".join(str(error).split())[:300]
    return (
        f"a process of the preparation was lost {1 + LOSSES} times over {task.out.parent.name}/{task.out.name}, "
        f"perhaps because memory ran out; the same command goes on from what is done. Ray says: {why}"
    )
