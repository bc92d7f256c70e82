"""Snapshots in real memory files, which this process holds as an agent does: ranks come and go, and open them anew."""

import os
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import Pool
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from moray.parallel.checkpoint.memory_file import MemoryFile
from moray.parallel.checkpoint.snapshots import Snapshots

Paths = dict[int, list[str]]
"""A node's files by rank."""
ONE_NODE, TWO_NODES = [range(4)], [range(2), range(2, 4)]


def sharded(step: int, rows: int = 10) -> dict[str, Tensor]:
    """Uneven shards (3, 3, 3 and 1 rows), a tensor that all ranks hold, and a number; all tell the step."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight = torch.arange(rows * 8, dtype=torch.float64).reshape(rows, 8) + 1000 * step
    return {
        "w": distribute_tensor(weight, mesh, [Shard(0)]),
        "all": torch.full((5,), step, dtype=torch.bfloat16),
        "step": torch.tensor(float(step)),
    }


class Nodes:
    """The memory of each node, and what may happen to it."""

    def __init__(self, ranks: list[range]) -> None:
        self.ranks = ranks
        self.files: list[dict[int, list[int]]] = []
        for node, own in enumerate(ranks):
            others = ranks[node - 1] if len(ranks) > 1 else ()
            self.files.append({rank: self._two() for rank in sorted({*own, *others})})

    def _two(self) -> list[int]:
        return [os.memfd_create("test") for _ in range(2)]

    def lose(self, node: int) -> None:
        """Another takes its place, in whose memory nothing is."""
        for descriptors in self.files[node].values():
            for descriptor in descriptors:
                os.close(descriptor)
        self.files[node] = {rank: self._two() for rank in self.files[node]}

    def newest(self, node: int, rank: int) -> int:
        return max(self.files[node][rank], key=lambda file: r.step if (r := MemoryFile(file).record()) else -1)

    @property
    def paths(self) -> list[Paths]:
        return [
            {rank: [f"/proc/{os.getpid()}/fd/{file}" for file in files] for rank, files in of_node.items()}
            for of_node in self.files
        ]

    def close(self) -> None:
        for of_node in self.files:
            for descriptors in of_node.values():
                for descriptor in descriptors:
                    os.close(descriptor)


@pytest.fixture
def nodes(request: pytest.FixtureRequest) -> Iterator[Nodes]:
    found = Nodes(request.param)
    yield found
    found.close()


def opened(
    paths: list[Paths], ranks: list[range], state: Mapping[str, Tensor], events: list[Any], generation: int = 1
) -> Snapshots:
    node = next(i for i, own in enumerate(ranks) if dist.get_rank() in own)
    files = {rank: [os.open(path, os.O_RDWR) for path in of_rank] for rank, of_rank in paths[node].items()}
    found = Snapshots(
        files,
        ranks,
        node,
        state,
        generation=generation,
        every=1,
        on_event=lambda *event: events.append(event),
    )
    found.reserve(lambda: None)
    return found


def take_steps(paths: list[Paths], ranks: list[range], steps: list[int]) -> int:
    """Takes a snapshot of each step, and returns what it said a node needs."""
    snapshots = opened(paths, ranks, sharded(0), [])
    for step in steps:
        state = sharded(step)
        while not snapshots.take(step, state, {"data": {"position": 32 * step}}, seconds=1.0):
            pass
        for tensor in state.values():  # training goes on
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).fill_(-1)
    snapshots.finish()
    return snapshots.most_bytes


def recall(
    paths: list[Paths], ranks: list[range], at_least: int = 0, rows: int = 10
) -> tuple[int, int, list[Any]] | tuple[None, None, list[Any]]:
    """What the next generation finds: step and position, compared with the truth in every element."""
    events: list[Any] = []
    state = sharded(0, rows)
    record = opened(paths, ranks, state, events, generation=2).load(state, at_least)
    if record is None:
        return None, None, events
    for name, truth in sharded(record.step).items():
        mine, expected = (t.to_local() if isinstance(t, DTensor) else t for t in (state[name], truth))
        assert torch.equal(mine, expected), name
    return record.step, record.metadata["data"]["position"], events


@pytest.mark.parametrize("nodes", [ONE_NODE, TWO_NODES], indirect=True)
def test_the_newest_snapshot_comes_back_in_every_bit(pool: Pool, nodes: Nodes) -> None:
    assert pool.run(recall, 4, nodes.paths, nodes.ranks) == [(None, None, [])] * 4
    pool.run(take_steps, 4, nodes.paths, nodes.ranks, [5, 6, 7])
    assert pool.run(recall, 4, nodes.paths, nodes.ranks) == [(7, 224, [])] * 4
    # Not where a commit is newer; where it is as new, memory is the shorter way.
    assert pool.run(recall, 4, nodes.paths, nodes.ranks, 8) == [(None, None, [])] * 4
    assert pool.run(recall, 4, nodes.paths, nodes.ranks, 7) == [(7, 224, [])] * 4


@pytest.mark.parametrize("nodes", [TWO_NODES], indirect=True)
@pytest.mark.parametrize("lost", [0, 1])
def test_what_a_lost_node_had_comes_from_the_one_that_stands_in_for_it(pool: Pool, nodes: Nodes, lost: int) -> None:
    pool.run(take_steps, 4, nodes.paths, nodes.ranks, [5, 6])
    nodes.lose(lost)
    assert pool.run(recall, 4, nodes.paths, nodes.ranks) == [(6, 192, [])] * 4
    # It is now there, too, and the next generation finds it even where the other node goes.
    pool.run(take_steps, 4, nodes.paths, nodes.ranks, [7])
    nodes.lose(1 - lost)
    assert pool.run(recall, 4, nodes.paths, nodes.ranks) == [(7, 224, [])] * 4


@pytest.mark.parametrize("nodes", [TWO_NODES], indirect=True)
def test_what_no_node_has_any_more_is_not_there(pool: Pool, nodes: Nodes) -> None:
    pool.run(take_steps, 4, nodes.paths, nodes.ranks, [5, 6])
    nodes.lose(0)
    nodes.lose(1)
    assert pool.run(recall, 4, nodes.paths, nodes.ranks) == [(None, None, [])] * 4


@pytest.mark.parametrize("nodes", [ONE_NODE], indirect=True)
@pytest.mark.parametrize("how", ["unsealed", "cut off", "flipped in the record"])
def test_a_snapshot_that_one_rank_had_not_finished_does_not_exist(pool: Pool, nodes: Nodes, how: str) -> None:
    pool.run(take_steps, 4, nodes.paths, nodes.ranks, [5, 6])
    file = nodes.newest(0, 2)
    record, size = MemoryFile(file).record(), os.fstat(file).st_size
    assert record
    if how == "flipped in the record":
        os.pwrite(file, b"#", record.size + 3)
    else:
        os.ftruncate(file, record.size if how == "unsealed" else size - 1)
    assert pool.run(recall, 4, nodes.paths, nodes.ranks) == [(5, 160, [])] * 4


@pytest.mark.parametrize("nodes", [ONE_NODE], indirect=True)
def test_a_flipped_bit_in_memory_is_found_and_the_older_snapshot_taken(pool: Pool, nodes: Nodes) -> None:
    pool.run(take_steps, 4, nodes.paths, nodes.ranks, [5, 6])
    file = nodes.newest(0, 3)
    (byte,) = os.pread(file, 1, 9)
    os.pwrite(file, bytes([byte ^ 4]), 9)
    (step, position, events), *others = pool.run(recall, 4, nodes.paths, nodes.ranks)
    assert (step, position) == (5, 160)
    told = {"step": 6, "problems": ["rank 3: its copy has another checksum than when it was made"]}
    assert events == [("snapshot_refused", told)]
    assert others == [(5, 160, [])] * 3


@pytest.mark.parametrize("nodes", [ONE_NODE], indirect=True)
def test_another_model_does_not_take_it(pool: Pool, nodes: Nodes) -> None:
    pool.run(take_steps, 4, nodes.paths, nodes.ranks, [5])
    assert pool.run(recall, 4, nodes.paths, nodes.ranks, 0, 12) == [(None, None, [])] * 4


@pytest.mark.parametrize("nodes", [TWO_NODES], indirect=True)
def test_a_smaller_group_does_not_take_it(pool: Pool, nodes: Nodes) -> None:
    """Of each of two nodes one rank is left, and what they find is cut for four."""
    pool.run(take_steps, 4, nodes.paths, nodes.ranks, [5])
    assert pool.run(recall, 2, nodes.paths, [range(1), range(1, 2)]) == [(None, None, [])] * 2


@pytest.mark.parametrize("nodes", [TWO_NODES], indirect=True)
def test_memory_is_what_was_said(pool: Pool, nodes: Nodes) -> None:
    said = pool.run(take_steps, 4, nodes.paths, nodes.ranks, [5, 6, 7])
    used = [
        sum(record.size for files in of_node.values() for file in files if (record := MemoryFile(file).record()))
        for of_node in nodes.files
    ]
    assert set(said) == {max(used)}
    # A rank: up to 3 rows of 8 doubles, 5 bfloat16 and a float, each at a multiple of 64 bytes, twice; and 4 ranks.
    assert max(used) == 2 * (3 * (192 + 64 + 64) + (64 + 64 + 64))


@pytest.mark.parametrize("nodes", [[range(1), range(1, 2), range(2, 4)]], indirect=True)
def test_memory_of_ranks_that_moved_away_is_given_back_once_a_new_snapshot_is_whole(pool: Pool, nodes: Nodes) -> None:
    """The first node holds rank 0, stands in for ranks 2 and 3, and still has what rank 1 left there, and a rank 9."""
    pool.run(take_steps, 4, nodes.paths, nodes.ranks, [1])
    nodes.files[0] |= {1: nodes._two(), 9: nodes._two()}
    for here, there in zip(nodes.files[0][1], nodes.files[1][1], strict=True):
        os.write(here, os.pread(there, os.fstat(there).st_size, 0))
        os.write(nodes.files[0][9][0], b"of another layout")
    for steps, is_kept in (([2], True), ([3, 4], False)):
        pool.run(take_steps, 4, nodes.paths, nodes.ranks, steps)
        left = {rank: any(os.fstat(file).st_size for file in nodes.files[0][rank]) for rank in (1, 9)}
        assert left == {1: is_kept, 9: False}
    assert [found[0] for found in pool.run(recall, 4, nodes.paths, nodes.ranks)] == [4] * 4


def intervals(paths: list[Paths], ranks: list[range], seconds: float) -> list[int]:
    """After which steps snapshots are taken where they may cost 2% of a step of so many seconds."""
    snapshots = opened(paths, ranks, sharded(0), [])
    snapshots._every = None
    taken = []
    for step in range(1, 300):
        # What a copy of this size costs is not what this is about: it is said to be 10 ms on each rank.
        snapshots._share = 0.01
        if snapshots.is_due(step) and snapshots.take(step, sharded(step), {}, seconds):
            taken.append(step)
            snapshots.finish()
    return taken


@pytest.mark.parametrize("nodes", [ONE_NODE], indirect=True)
@pytest.mark.parametrize(("seconds", "every"), [(1.0, 1), (0.1, 5), (0.005, 100)])
def test_the_interval_follows_what_a_snapshot_costs(pool: Pool, nodes: Nodes, seconds: float, every: int) -> None:
    """At most COST of a step's time."""
    (taken, *others) = pool.run(intervals, 4, nodes.paths, nodes.ranks, seconds)
    assert others == [taken] * 3
    assert {after - before for before, after in pairwise(taken)} == {every}
