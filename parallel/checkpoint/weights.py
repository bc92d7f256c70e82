"""Commits of weights alone: any part of any weight read from one, and one written a piece at a time."""

import math
import secrets
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moray.model.tensors import Box, Read
from moray.parallel.checkpoint.commits import ChunkReader, Commit, clean, commit_name, publish
from moray.parallel.checkpoint.manifest import Manifest, StoredFile, StoredTensor
from moray.parallel.checkpoint.tensor_file import dtype_name, write_tensors
from moray.parallel.chunks import Chunk, Grid

FILE_BYTES = 1 << 28
PREFIX = "model."
EXPERTS = ".experts."
"""In the names of stacked weights, behind that of their layer."""


class CommitWeights:
    """The weights and routing biases of a commit, by the names that the decoder has for them.

    No digest is checked: `verify` does, once for all that is read after it.
    """

    def __init__(self, commit: Commit) -> None:
        self._tensors, self._reader = commit.manifest.tensors, ChunkReader(commit)
        self._placement: dict[str, list[int]] = commit.manifest.metadata.get("placement", {})

    def read(self, name: str, box: Box) -> Tensor:
        """A part of a tensor, whatever layout wrote it, and wherever that has put experts."""
        shape = self._tensors[PREFIX + name].shape
        (start, end), *others = [part.indices(size)[:2] for part, size in zip(box, shape, strict=True)]
        layer, is_of_experts, _ = name.partition(EXPERTS)
        slots = self._placement.get(layer) if is_of_experts else None
        runs = [(start, end)] if slots is None else [(slot, slot + 1) for slot in slots[start:end]]
        parts = [self._read(name, [run, *others]) for run in runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _read(self, name: str, bounds: list[tuple[int, int]]) -> Tensor:
        return self._reader.read(
            PREFIX + name, (tuple(start for start, _ in bounds), tuple(end - start for start, end in bounds))
        )


def write_weights(
    folder: Path, step: int, metadata: dict[str, Any], shapes: Mapping[str, torch.Size], read: Read
) -> None:
    """Commits weights that `read` gives, for a run to start from; `step` and `metadata` as of any commit.

    One process does it. In memory are about FILE_BYTES, or a row of a tensor (an expert of stacked ones) if that is
    more. Raises OSError for a full disk.
    """
    clean(folder)
    staging = folder / f".staging-{commit_name(step)}-{secrets.token_hex(4)}"
    staging.mkdir()
    files: dict[str, StoredFile] = {}
    chunks: dict[str, list[Chunk]] = {name: [] for name in shapes}
    holders: dict[str, list[str]] = {name: [] for name in shapes}
    dtypes: dict[str, str] = {}
    batch: dict[str, Tensor] = {}

    def flush() -> None:
        nonlocal batch
        if batch:
            file = f"weights-{len(files):05d}.safetensors"
            for name in batch:
                holders[name.removeprefix(PREFIX)].append(file)
            files[file], batch = write_tensors(staging / file, batch), {}

    for name, box in _pieces(shapes):
        piece = read(name, box).contiguous()
        # A file holds one chunk of a tensor, under the tensor's name.
        if PREFIX + name in batch or sum(tensor.nbytes for tensor in batch.values()) >= FILE_BYTES:
            flush()
        batch[PREFIX + name] = piece
        chunks[name].append((tuple(part.start for part in box), tuple(piece.shape)))
        dtypes[name] = dtype_name(name, piece.dtype)
    flush()
    tensors = {
        PREFIX + name: StoredTensor(tuple(shape), dtypes[name], Grid(tuple(chunks[name])), tuple(holders[name]))
        for name, shape in shapes.items()
    }
    created = datetime.now(UTC).isoformat(timespec="seconds")
    publish(staging, folder / commit_name(step), Manifest(step, created, metadata, files, tensors))


def _pieces(shapes: Mapping[str, torch.Size]) -> Iterator[tuple[str, Box]]:
    """Boxes of whole rows that fit a file (one row at least), tensor after tensor."""
    for name, (height, *rest) in shapes.items():
        rows = max(1, FILE_BYTES // (torch.float32.itemsize * math.prod(rest)))
        everything = tuple(slice(0, size) for size in rest)
        for row in range(0, height, rows):
            yield name, (slice(row, min(row + rows, height)), *everything)
