"""Copies of a run's state in memory that outlives its workers: the next generation goes on from the newest whole one.

Every few steps each rank copies its part of the state into a file in memory of its node, and a thread sends it on to
the node after, which stands in for a node that is lost. There are two files a rank, written in turn, so that one is
whole at any instant. The rule is that of a commit: a snapshot is whole on all ranks, in its record and its checksums,
or it does not exist. What lies in memory is of one attempt alone, for it ends with the agents.
"""

import math
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moray.model.sharded import local
from moray.parallel.checkpoint.host_copy import copy_all
from moray.parallel.checkpoint.memory_file import MemoryFile, Record, checksum, parts_of
from moray.parallel.control_plane import ControlPlane
from moray.parallel.gradients import world_sum

COST = 0.02
"""Share of a step's time that snapshots may take where their interval is chosen here."""
FILES = 2


class Snapshots:
    """Of the ranks' state, in `files` (descriptors, two for each rank that this node holds or stands in for).

    `ranks` are those of each node, of which this is the `node`-th. `every` counts steps; None: as often as keeps the
    cost below COST. Every method, the constructor too, is collective. `on_event` hears, on rank 0, of
    `snapshot_refused` (step, problems).
    """

    def __init__(
        self,
        files: Mapping[int, Sequence[int]],
        ranks: Sequence[range],
        node: int,
        state: Mapping[str, Tensor],
        *,
        generation: int,
        every: int | None,
        on_event: Callable[[str, dict[str, Any]], None],
    ) -> None:
        """Of `state` only names, shapes and placements matter here."""
        self._files = {rank: [MemoryFile(file) for file in of_rank] for rank, of_rank in files.items()}
        self._plane = ControlPlane()
        self._rank, self._ranks, self._node = self._plane.rank, ranks, node
        self._generation, self._on_event = generation, on_event
        self._every = every
        self._parts, self._size = parts_of(state)
        cuts = self._plane.gather((self._size, zlib.crc32(repr(self._parts).encode())))
        self._sizes = [size for size, _ in cuts]
        self._layout = zlib.crc32(repr(cuts).encode())
        self._next, self._share = 0, 0.0
        self._thread: threading.Thread | None = None

    @property
    def bytes_here(self) -> int:
        """Memory that this node needs: for two snapshots of its own ranks, and of those that it stands in for."""
        return self._bytes_of(self._node)

    @property
    def most_bytes(self) -> int:
        """What the node that needs the most of all needs."""
        return max(map(self._bytes_of, range(len(self._ranks))))

    @property
    def bytes_reserved(self) -> int:
        """How much of it was there before this generation."""
        return sum(file.bytes for rank in self._held for file in self._files[rank])

    @property
    def _held(self) -> list[int]:
        return self._held_by(self._node)

    def _bytes_of(self, node: int) -> int:
        return FILES * sum(self._sizes[rank] for rank in self._held_by(node))

    def _held_by(self, node: int) -> list[int]:
        """The ranks of a node, and of the one before, for which it stands in."""
        return sorted({*self._ranks[node], *(self._ranks[node - 1] if len(self._ranks) > 1 else ())})

    @property
    def _stand_in(self) -> int | None:
        """The rank of the node after that keeps a copy of what this one has."""
        if len(self._ranks) == 1:
            return None
        after = self._ranks[(self._node + 1) % len(self._ranks)]
        return after[self._local % len(after)]

    @property
    def _stood_for(self) -> list[int]:
        """The ranks of the node before whose copies this one keeps."""
        if len(self._ranks) == 1:
            return []
        own = self._ranks[self._node]
        return [rank for i, rank in enumerate(self._ranks[self._node - 1]) if i % len(own) == self._local]

    @property
    def _local(self) -> int:
        return self._rank - self._ranks[self._node].start

    def reserve(self, check: Callable[[], None]) -> None:
        """Takes all memory now, so that none is missing later; `check` is called before any rank does.

        Raises what `check` raises, OSError where there is none.
        """
        self._let_go(of_all=False)
        check()
        self._plane.gather(None)
        for rank in (self._rank, *self._stood_for):
            for file in self._files[rank]:
                file.reserve(self._sizes[rank])

    def load(self, state: Mapping[str, Tensor], at_least: int) -> Record | None:
        """Fills `state` with the newest snapshot that is whole on all ranks and of step `at_least` or later, if any."""
        found = self._found() if self._local == 0 else {}
        offers = self._plane.gather(found)
        steps = sorted({key for offer in offers for keys in offer.values() for key in keys}, reverse=True)
        for key in steps:
            providers = {
                rank: [provider for provider, offer in enumerate(offers) if key in offer.get(rank, ())]
                for rank in range(self._plane.world_size)
            }
            if key[0] < at_least or not all(providers.values()):
                continue
            problems = self._plane.gather(self._restore(key, providers, state))
            if not any(problems):
                return self._record(self._rank, key)
            if self._rank == 0:
                told = [f"rank {rank}: {problem}" for rank, problem in enumerate(problems) if problem]
                self._on_event("snapshot_refused", {"step": key[0], "problems": told})
        return None

    def is_due(self, step: int) -> bool:
        return step >= self._next

    def take(self, step: int, state: Mapping[str, Tensor], metadata: dict[str, Any], seconds: float) -> bool:
        """Copies `state`, that of `step`, for which a snapshot is due; returns whether it did.

        `seconds` is how long a step takes. While any rank is still sending the last one on, the next must wait: what it
        would be written over may be the only whole one.
        """
        is_busy = self._thread is not None and self._thread.is_alive()
        n_busy, share = world_sum(torch.tensor([float(is_busy), self._share / seconds], dtype=torch.float64)).tolist()
        if n_busy:
            self._next = step + 1
            return False
        if self._thread:
            self.finish()
            self._let_go(of_all=True)  # elsewhere a snapshot of them is whole by now
        self._next = step + (self._every or max(1, math.ceil(share / self._plane.world_size / COST)))
        file = self._older_file(self._rank)
        data = file.open(self._size)  # the first time it is mapped, which is none of the costs of the next one
        began = time.perf_counter()
        copy_all(
            {part.name: local(state[part.name].detach()) for part in self._parts},
            {part.name: part.view(data) for part in self._parts},
        )
        self._share = time.perf_counter() - began
        self._thread = threading.Thread(
            target=self._complete, args=(file, data, step, metadata), name="snapshot", daemon=True
        )
        self._thread.start()
        return True

    def clear(self) -> None:
        """There is no snapshot any more: what comes now is another history."""
        self.finish()
        for rank in (self._rank, *self._stood_for):
            for file in self._files[rank]:
                file.open(self._sizes[rank])

    def _let_go(self, of_all: bool) -> None:
        """Gives back memory of ranks that are on other nodes now: of all, or only what is cut for another layout."""
        if self._local == 0:
            for rank in self._files.keys() - self._held:
                for file in self._files[rank]:
                    if of_all or not (record := file.record()) or record.layout != self._layout:
                        file.clear()

    def finish(self) -> None:
        """Waits until the last one has been sent on, if it still is."""
        if self._thread:
            self._thread.join()
            self._thread = None

    def _complete(self, file: MemoryFile, data: Tensor, step: int, metadata: dict[str, Any]) -> None:
        """The thread: checksum, record, and the copy on the node after."""
        began = time.thread_time()
        crc32 = checksum(data)
        file.seal(Record(step, self._generation, self._rank, self._layout, crc32, self._size, self._parts, metadata))
        stand_in = self._stand_in
        sends = [(file, stand_in)] if stand_in is not None else []
        try:
            self._exchange(sends, [(rank, rank) for rank in self._stood_for])
        except RuntimeError:
            return  # a peer is gone, and this generation with it
        self._share += time.thread_time() - began

    def _exchange(self, sends: Sequence[tuple[MemoryFile, int]], receives: Sequence[tuple[int, int]]) -> None:
        """Sends whole files to ranks, and receives those of `(rank, from)` into this node's files of that rank."""
        under_way = []
        for file, to in sends:
            record = file.record()
            assert record
            text = torch.frombuffer(bytearray(record.to_json()), dtype=torch.uint8)
            for tensor in (torch.tensor([len(text)]), text, file.data(record.size)):
                under_way.append((dist.isend(tensor, to, group=self._plane.group), tensor))
        for rank, sender in receives:
            file, length = self._older_file(rank), torch.zeros(1, dtype=torch.int64)
            data = file.open(self._sizes[rank])
            dist.recv(length, sender, group=self._plane.group)
            text = torch.zeros(int(length), dtype=torch.uint8)
            dist.recv(text, sender, group=self._plane.group)
            dist.recv(data, sender, group=self._plane.group)
            file.seal(Record.from_json(text.numpy().tobytes()))
        for work, _ in under_way:
            if work:
                work.wait()

    def _found(self) -> dict[int, list[tuple[int, int]]]:
        """(step, generation) of what this node's files hold, by rank, where cut as this state is."""
        records = {rank: [file.record() for file in files] for rank, files in self._files.items()}
        return {
            rank: [(record.step, record.generation) for record in of if record and record.layout == self._layout]
            for rank, of in records.items()
        }

    def _restore(
        self, key: tuple[int, int], providers: Mapping[int, Sequence[int]], state: Mapping[str, Tensor]
    ) -> str | None:
        """Fetches this rank's file where its node has none, and fills `state` with it; returns what is wrong there."""
        node_of = {rank: ranks for ranks in self._ranks for rank in ranks}
        # Whoever's node has none gets it from the first that has.
        moves = [(rank, of[0]) for rank, of in providers.items() if not any(p in node_of[rank] for p in of)]
        sends = [(self._file(rank, key), rank) for rank, provider in moves if provider == self._rank]
        self._exchange(
            [(file, to) for file, to in sends if file],
            [(rank, provider) for rank, provider in moves if rank == self._rank],
        )
        file, record = self._file(self._rank, key), self._record(self._rank, key)
        if not file or not record:
            return "its copy is gone"
        data = file.data(self._size)
        if checksum(data) != record.crc32:
            return "its copy has another checksum than when it was made"
        for part in self._parts:
            local(state[part.name].detach()).copy_(part.view(data))
        return None

    def _file(self, rank: int, key: tuple[int, int]) -> MemoryFile | None:
        for file in self._files.get(rank, ()):
            if (record := file.record()) and (record.step, record.generation) == key:
                return file
        return None

    def _record(self, rank: int, key: tuple[int, int]) -> Record | None:
        file = self._file(rank, key)
        return file.record() if file else None

    def _older_file(self, rank: int) -> MemoryFile:
        """The one to be written over next: nothing whole before what is, and the older before the newer."""
        return min(self._files[rank], key=lambda file: (r.step, r.generation) if (r := file.record()) else (-1, -1))
