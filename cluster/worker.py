"""What a worker function sees of its cluster: the same under Ray, torchrun and alone."""

import os
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


class WorkerError(RuntimeError):
    """The group failed and is not started again.

    The message's first line says what failed and why there is no other try; the failed worker's traceback follows.
    """


class WrongResultError(RuntimeError):
    """Hardware has computed wrongly: that of these ranks, or of one of them. Every rank may raise it."""

    def __init__(self, message: str, ranks: tuple[int, ...]) -> None:
        super().__init__(message)
        self.ranks = ranks


@dataclass(frozen=True)
class Memory:
    """Memory of this node that outlives its workers: what one leaves there, those of later generations find.

    `files` are descriptors of files in memory, by rank: two for each rank that this node has or had, and for each rank
    of the node before it, for which it stands in. `ranks` are those of each node, of which this is the `node`-th.
    """

    files: Mapping[int, Sequence[int]]
    ranks: Sequence[range]
    node: int


@dataclass(frozen=True)
class WorkerContext:
    """One worker's place in its group. Ranks count from 0; the generation grows with every restart."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    generation: int
    device: torch.device
    open_store: Callable[[], dist.Store] = field(repr=False)
    report: Callable[[int, dict[str, Any]], None] = field(repr=False)
    should_stop: Callable[[], bool] = field(repr=False)
    """True once the driver or a signal asked to stop. Ranks may see it at different steps: agree before acting."""
    notes: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """What workers of this node noted in the generations before."""
    note: Callable[[str, Any], None] = field(default=lambda name, value: None, repr=False)
    memory: Memory | None = field(default=None, repr=False)
    """None where nothing outlives the workers, as under torchrun."""
    enter_phase: Callable[[str, bool], None] = field(default=lambda name, is_long: None, repr=False)

    def heartbeat(self, step: int, **status: Any) -> None:
        """Says that `step` is done; to be called after every step, and within long work between steps.

        `status` holds small JSON-able values that the driver shows; rank 0 fills it.
        """
        self.report(step, status)

    def enter(self, phase: str, *, is_long: bool = True) -> None:
        """Tells whoever watches what this worker does from now on, in a word; to be called where that changes.

        Within a phase that is not long it counts as hung where it is silent for much longer than its steps take.
        """
        self.enter_phase(phase, is_long)

    def once(self, name: str, find: Callable[[], Any]) -> Any:
        """What `find` finds out about this node; under Ray, the workers of later generations need not find it again."""
        if name not in self.notes:
            value = find()
            self.note(name, value)
            return value
        return self.notes[name]

    @contextmanager
    def process_group(self, timeout: timedelta = timedelta(minutes=30)) -> Iterator[None]:
        """The default process group over all workers: gloo on CPU, gloo and NCCL on CUDA.

        Collectives may wait `timeout`; a peer that dies or hangs is noticed by the supervisor long before.
        A rank is connected with those that its collectives have met: it is not, once a group, with all others.
        """
        self.enter("joining", is_long=False)
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
        # Rank 0 alone has a connection from each: for the store.
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(self.device)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=dist.PrefixStore(f"generation-{self.generation}", self.open_store()),
            rank=self.rank,
            world_size=self.world_size,
            timeout=timeout,
            device_id=self.device if on_gpu else None,
        )
        try:
            yield
        except BaseException:
            # Peers must not see a closed connection before the supervisor has heard the reason, and destroying a
            # group whose peers are gone can hang. The process ends with this exception anyway, unless it is alone.
            if self.world_size == 1:
                dist.destroy_process_group()
            raise
        dist.destroy_process_group()


TakeGeneration = Callable[[int | None], int]
"""take_generation(previous): the number of a generation that begins now, and that nobody else has.

`previous` is the last one of the same attempt, None at its beginning. What it raises ends the attempt.
"""


CheckGeneration = Callable[[int], None]
"""check_generation(number): raises, and thereby ends the attempt, where another one has taken a generation since."""


def count_up(previous: int | None) -> int:
    """Generations of a group that nobody else could start, too."""
    return (previous or 0) + 1


WorkerFunction = Callable[[WorkerContext, Any], int | None]
"""Runs on every rank with the same argument; returns an exit code of `exit_codes`, or None: done."""
