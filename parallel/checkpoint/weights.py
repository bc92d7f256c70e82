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
from moray.parallel.checkpoint.manifest import Chunk, Manifest, StoredFile, StoredTensor
from moray.parallel.checkpoint.tensor_file import DTYPE_OF_NAME, dtype_name, write_tensors

FILE_BYTES = 1 << 28
PREFIX = "model."


class CommitWeights:
    """The weights and routing biases of a commit, by the names that the decoder has for them.

    No digest is checked: `verify` does, once for all that is read after it.
    """

    def __init__(self, commit: Commit) -> None:
        self._tensors, self._reader = commit.manifest.tensors, ChunkReader(commit.path)

    def read(self, name: str, box: Box) -> Tensor:
        """A part of a tensor, whatever layout wrote it; of the files, only the pages that hold it are read."""
        stored = self._tensors[PREFIX + name]
        bounds = [part.indices(size)[:2] for part, size in zip(box, stored.shape, strict=True)]
        out = torch.empty([end - start for start, end in bounds], dtype=DTYPE_OF_NAME[stored.dtype])
        for chunk in stored.chunks:
            # Of each dimension, from where to where chunk and box overlap.
            common = [
                (max(start, offset), min(end, offset + size))
                for (start, end), offset, size in zip(bounds, chunk.offsets, chunk.sizes, strict=True)
            ]
            if all(start < end for start, end in common):
                there = tuple(slice(a - o, b - o) for (a, b), o in zip(common, chunk.offsets, strict=True))
                here = tuple(slice(a - s, b - s) for (a, b), (s, _) in zip(common, bounds, strict=True))
                out[here] = self._reader.read(chunk.file, chunk.key)[there]
        return out


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
    chunks: dict[str, list[Chunk]] = {PREFIX + name: [] for name in shapes}
    dtypes: dict[str, str] = {}
    batch: dict[str, Tensor] = {}
    for name, box, is_last in _pieces(shapes):
        piece, offsets = read(name, box).contiguous(), tuple(part.start for part in box)
        key, file = f"{PREFIX}{name}@{','.join(map(str, offsets))}", f"weights-{len(files):05d}.safetensors"
        batch[key] = piece
        chunks[PREFIX + name].append(Chunk(file, key, offsets, tuple(piece.shape)))
        dtypes[PREFIX + name] = dtype_name(name, piece.dtype)
        if is_last or sum(tensor.nbytes for tensor in batch.values()) >= FILE_BYTES:
            files[file], batch = write_tensors(staging / file, batch), {}
    tensors = {
        PREFIX + name: StoredTensor(tuple(shape), dtypes[PREFIX + name], tuple(chunks[PREFIX + name]))
        for name, shape in shapes.items()
    }
    created = datetime.now(UTC).isoformat(timespec="seconds")
    publish(staging, folder / commit_name(step), Manifest(step, created, metadata, files, tensors))


def _pieces(shapes: Mapping[str, torch.Size]) -> Iterator[tuple[str, Box, bool]]:
    """Boxes of whole rows that fit a file (one row at least), tensor after tensor; and whether it is the last."""
    boxes = []
    for name, (height, *rest) in shapes.items():
        rows = max(1, FILE_BYTES // (torch.float32.itemsize * math.prod(rest)))
        everything = tuple(slice(0, size) for size in rest)
        boxes += [(name, (slice(row, min(row + rows, height)), *everything)) for row in range(0, height, rows)]
    return ((*box, i == len(boxes)) for i, box in enumerate(boxes, 1))
