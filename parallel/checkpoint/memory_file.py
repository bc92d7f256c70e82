"""A rank's state in a file in memory: its tensors, then a record of them, which is written last.

Without a record that is whole, nothing is there: whoever was killed while writing has left none.
"""

import json
import mmap
import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from moray.model.sharded import local
from moray.parallel.checkpoint.tensor_file import DTYPE_OF_NAME, dtype_name
from moray.parallel.chunks import Chunk
from moray.parallel.held import held_chunks

ALIGNMENT = 64
_END = struct.Struct("<8sII")  # at the end of the file: this mark, length and crc32 of the record before it
_MARK = b"moray-03"


@dataclass(frozen=True)
class Part:
    """A rank's chunk of a tensor, and at which byte it begins."""

    name: str
    dtype: str
    chunk: Chunk
    start: int

    def view(self, data: Tensor) -> Tensor:
        """Its place in the data (uint8 [bytes]), as the tensor that it is."""
        dtype = DTYPE_OF_NAME[self.dtype]
        shape = torch.Size(self.chunk[1])
        return data[self.start : self.start + shape.numel() * dtype.itemsize].view(dtype).view(shape)


@dataclass(frozen=True)
class Record:
    """What a file holds: `rank`'s state at `step`. `crc32` is of all data, `metadata` the caller's JSON object.

    `layout` is a checksum of how all ranks together have cut the state.
    """

    step: int
    generation: int
    rank: int
    layout: int
    crc32: int
    size: int
    parts: tuple[Part, ...]
    metadata: dict[str, Any]

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, text: bytes) -> "Record":
        fields = json.loads(text)
        parts = tuple(
            Part(part["name"], part["dtype"], (tuple(part["chunk"][0]), tuple(part["chunk"][1])), part["start"])
            for part in fields.pop("parts")
        )
        return cls(**fields, parts=parts)


def checksum(data: Tensor) -> int:
    """Of uint8 [bytes]."""
    return zlib.crc32(data.numpy().data)


def parts_of(state: Mapping[str, Tensor]) -> tuple[tuple[Part, ...], int]:
    """Where this rank's part of each tensor lies, if it has one; and how many bytes that takes."""
    parts, end = [], 0
    for name, chunk in held_chunks(state).items():
        if n_bytes := local(state[name]).nbytes:
            parts.append(Part(name, dtype_name(name, state[name].dtype), chunk, end))
            end += -(-n_bytes // ALIGNMENT) * ALIGNMENT
    return tuple(parts), end


class MemoryFile:
    """One file, by its descriptor."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._data: Tensor | None = None

    def record(self) -> Record | None:
        """What it holds; None: nothing whole."""
        size = os.fstat(self._descriptor).st_size
        if size < _END.size:
            return None
        mark, length, crc32 = _END.unpack(os.pread(self._descriptor, _END.size, size - _END.size))
        if mark != _MARK or length > size - _END.size:
            return None
        text = os.pread(self._descriptor, length, size - _END.size - length)
        return Record.from_json(text) if zlib.crc32(text) == crc32 else None

    def data(self, size: int) -> Tensor:
        """Its first `size` bytes, mapped: uint8 [size]. What is written there is in the file."""
        if self._data is None or len(self._data) != size:
            self.reserve(size)
            memory = mmap.mmap(self._descriptor, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
            self._data = torch.frombuffer(memory, dtype=torch.uint8)
            if torch.cuda.is_available():
                # Where the system allows it, a GPU then writes there without a copy in between.
                torch.cuda.cudart().cudaHostRegister(self._data.data_ptr(), size, 0)
        return self._data

    @property
    def bytes(self) -> int:
        """How much memory it has."""
        return os.fstat(self._descriptor).st_blocks * 512

    def reserve(self, size: int) -> None:
        """Takes the memory for `size` bytes now, and not when they are written. Raises OSError where there is none."""
        os.posix_fallocate(self._descriptor, 0, size)

    def open(self, size: int) -> Tensor:
        """Nothing whole is there any more; returns the data, to be written."""
        os.ftruncate(self._descriptor, size)
        return self.data(size)

    def seal(self, record: Record) -> None:
        """Now it is whole."""
        text = record.to_json()
        os.pwrite(self._descriptor, text + _END.pack(_MARK, len(text), zlib.crc32(text)), record.size)

    def clear(self) -> None:
        """Gives the memory back."""
        self._data = None
        os.ftruncate(self._descriptor, 0)
