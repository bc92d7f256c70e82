"""Who writes which chunk of a state: of the ranks that hold the same one, one.

Each rank says once what it holds (`describe`); rank 0 decides for all (`assign`). For thousands of ranks and tensors
that is cheap because tensors are cut in few ways: a rank names each distinct chunk once, and per tensor which of them.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moray import UserError
from moray.model.sharded import local
from moray.parallel.checkpoint.manifest import StoredTensor
from moray.parallel.checkpoint.tensor_file import dtype_name
from moray.parallel.chunks import Chunk, Grid, coverage_problem
from moray.parallel.held import held_chunks


@dataclass(frozen=True)
class Held:
    """What a rank holds: its distinct chunks, and for each tensor of the state which one; -1: nothing.

    `digest` is of the tensors' names, shapes and dtypes, which are the same on all ranks; `which` is int32 [tensors].
    """

    digest: str
    chunks: tuple[Chunk, ...]
    which: np.ndarray


@dataclass(frozen=True)
class Plan:
    """`writes` is bool [ranks, tensors]; `tensors` are those of the manifest."""

    writes: np.ndarray
    tensors: dict[str, StoredTensor]


def describe(state: Mapping[str, Tensor]) -> Held:
    """Raises UserError for what is no tensor, of a dtype that has no name, or not where its placements say."""
    if strange := [name for name, tensor in state.items() if not isinstance(tensor, Tensor)]:
        raise UserError(f"state {strange[0]!r} is not a tensor; put it into the metadata")
    chunks: dict[Chunk, int] = {}
    which = np.full(len(state), -1, np.int32)
    heading = []
    for i, (name, chunk) in enumerate(held_chunks(state).items()):
        tensor = state[name]
        heading.append((name, tuple(tensor.shape), dtype_name(name, tensor.dtype)))
        if (found := tuple(local(tensor).shape)) != chunk[1]:
            # FSDP2 splits each of several unequal tensor-parallel shards, which _StridedShard does not describe.
            raise UserError(
                f"tensor {name!r} of shape {tuple(tensor.shape)} holds a shard of shape {found} where its placements "
                f"mean {chunk[1]}; choose degrees that divide its sharded dimension"
            )
        if local(tensor).numel() or not tensor.numel():
            which[i] = chunks.setdefault(chunk, len(chunks))
    return Held(hashlib.sha256(repr(heading).encode()).hexdigest(), tuple(chunks), which)


def assign(held: Sequence[Held], state: Mapping[str, Tensor]) -> Plan:
    """Shares the chunks of `state` out over the ranks that hold them, by bytes; one `held` a rank.

    Raises UserError where the ranks hold different states, or together not all of a tensor.
    """
    if odd := [rank for rank, of_rank in enumerate(held) if of_rank.digest != held[0].digest]:
        raise UserError(f"ranks {odd[:8]} hold tensors of other names, shapes or dtypes than rank 0")
    known: dict[Chunk, int] = {}
    columns = np.stack([_renumbered(of_rank, known) for of_rank in held], axis=1)  # [tensors, ranks]
    chunks = list(known)
    load = np.zeros(len(held))
    writes = np.zeros((len(held), len(state)), bool)
    cuts: dict[tuple[bytes, torch.Size], _Cut] = {}
    files: dict[bytes, tuple[str, ...]] = {}
    tensors = {}
    for i, (name, tensor) in enumerate(state.items()):
        key = (columns[i].tobytes(), tensor.shape)
        if key not in cuts:
            cuts[key] = _Cut.of(columns[i], chunks)
            if problem := coverage_problem(tensor.shape, cuts[key].grid.chunks):
                raise UserError(f"tensor {name!r}: {problem}")
        cut = cuts[key]
        writers = np.array([ranks[0] if len(ranks) == 1 else ranks[load[ranks].argmin()] for ranks in cut.holders], int)
        np.add.at(load, writers, cut.elements * tensor.element_size())
        writes[writers, i] = True
        if writers.tobytes() not in files:
            files[writers.tobytes()] = tuple(map(file_name, writers))
        tensors[name] = StoredTensor(
            tuple(tensor.shape), dtype_name(name, tensor.dtype), cut.grid, files[writers.tobytes()]
        )
    return Plan(writes, tensors)


def file_name(rank: int) -> str:
    """The file in which a rank writes its chunks."""
    return f"rank-{rank:05d}.safetensors"


def _renumbered(held: Held, known: dict[Chunk, int]) -> np.ndarray:
    """Its `which` in the numbers that the distinct chunks of all ranks have."""
    numbers = np.array([known.setdefault(chunk, len(known)) for chunk in held.chunks] + [-1], np.int32)
    return numbers[held.which]


@dataclass(frozen=True)
class _Cut:
    """How a tensor is cut: its distinct chunks, the elements of each, and the ranks that hold it."""

    grid: Grid
    elements: np.ndarray
    holders: list[np.ndarray]

    @classmethod
    def of(cls, column: np.ndarray, chunks: Sequence[Chunk]) -> "_Cut":
        """`column` has the number of each rank's chunk in `chunks`; -1: it holds nothing."""
        distinct, place = np.unique(column, return_inverse=True)
        ranks = np.split(np.argsort(place, kind="stable"), np.cumsum(np.bincount(place))[:-1])
        held = [(chunks[i], of_chunk) for i, of_chunk in zip(distinct, ranks, strict=True) if i >= 0]
        elements = np.array([math.prod(sizes) for (_, sizes), _ in held])
        return cls(Grid(tuple(chunk for chunk, _ in held)), elements, [ranks for _, ranks in held])
