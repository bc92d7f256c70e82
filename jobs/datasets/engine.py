"""Who does the tasks of a stage: this process, or several of this machine."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol

from moray import UserError
from moray.cluster.cores import usable_cores
from moray.cluster.host_memory import free_memory
from moray.cluster.parent import die_with_parent
from moray.data.preparation.progress import listen
from moray.data.preparation.tasks import Done, Task, perform

POLL_S = 0.2
WORKER_MB = 700
"""What a process holds, 550 measured: a run of documents and what the longest of 16 MiB takes, or a bucket several
times over (docs/datasets.md)."""
SLOTS = 1024


class Doer(Protocol):
    """Whoever does tasks: `Engine`, or `RayEngine`."""

    def do(self, tasks: Sequence[Task], on_tick: Callable[[int], None]) -> Iterator[tuple[int, Done]]: ...


class Engine:
    """Does tasks in `workers` processes; with one, in this one. Use it as a context: it ends its processes."""

    def __init__(self, workers: int) -> None:
        self._pool: ProcessPoolExecutor | None = None
        if workers > 1:
            # Forked children of a process with threads, as this one is, may wait for ever.
            context = multiprocessing.get_context("spawn")
            # A slot a process, and no lock: one that is killed while it holds a lock would stop all others.
            self._ticks: Any = context.RawArray("q", SLOTS)
            self._numbers = context.Value("q", 0)
            self._heard = 0
            self._pool = ProcessPoolExecutor(workers, context, _begin, (self._ticks, self._numbers, os.getpid()))

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            for process in list((self._pool._processes or {}).values()):
                process.terminate()
            self._pool.shutdown(wait=True, cancel_futures=True)

    def do(self, tasks: Sequence[Task], on_tick: Callable[[int], None]) -> Iterator[tuple[int, Done]]:
        """Each task's number and what it found, as they are done. on_tick hears of bytes that were gone through.

        Raises whatever a task raises, and UserError where a process was killed.
        """
        if self._pool is None:
            stop = listen(on_tick)
            try:
                yield from ((number, perform(task)) for number, task in enumerate(tasks))
            finally:
                stop()
            return
        futures: dict[Future[Done], int] = {self._pool.submit(perform, task): n for n, task in enumerate(tasks)}
        try:
            while futures:
                done, _ = wait(futures, timeout=POLL_S, return_when=FIRST_COMPLETED)
                ticked = sum(self._ticks)
                on_tick(ticked - self._heard)
                self._heard = ticked
                for future in done:
                    yield futures.pop(future), future.result()
        except BrokenProcessPool:
            raise UserError(
                "a process of the preparation was killed, perhaps because memory ran out; the same command goes on "
                "from what is done, and a lower --memory-mb takes less"
            ) from None
        finally:
            for future in futures:
                future.cancel()


def most_tasks(workers: int | None, memory_mb: int | None) -> int | None:
    """How many tasks may be done at a time; None where neither number says it.

    Raises UserError for numbers that cannot be.
    """
    if workers is not None and workers < 1:
        raise UserError(f"workers={workers} must be at least 1")
    if memory_mb is not None and memory_mb < WORKER_MB:
        raise UserError(f"memory_mb={memory_mb} must be at least {WORKER_MB}, which one process takes")
    if memory_mb is None:
        return workers
    fit = memory_mb // WORKER_MB
    if workers is not None and workers > fit:
        raise UserError(f"workers={workers} take {workers * WORKER_MB} MB, more than memory_mb={memory_mb}; use {fit}")
    return workers or fit


def processes_for(workers: int | None, memory_mb: int | None) -> int:
    """How many processes of this machine are to work: those asked for, or one a core that has its share of the memory.

    Raises UserError as `most_tasks` does.
    """
    most = most_tasks(workers, memory_mb)
    return workers or max(min(most or (free_memory() >> 21) // WORKER_MB, usable_cores()), 1)


def _begin(ticks: Any, numbers: Any, driver: int) -> None:
    die_with_parent(driver)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of them; the driver ends them
    with numbers.get_lock():
        slot, numbers.value = numbers.value % SLOTS, numbers.value + 1
    os.environ["RAYON_NUM_THREADS"] = "1"  # of tokenizers: there are as many processes as cores

    def count(n_bytes: int) -> None:
        ticks[slot] += n_bytes

    listen(count)
