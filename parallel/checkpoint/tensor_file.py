"""Writes one safetensors file as a stream: the header, then tensor by tensor, hashed on the way to the disk.

safetensors' own writer needs all bytes at once and a second reading for the digest. The format is eight bytes of header
length (little-endian), a JSON header, then the data (https://github.com/huggingface/safetensors#format).
"""

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from moray import UserError
from moray.parallel.checkpoint.manifest import StoredFile

DTYPE_OF_NAME = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
NAME_OF_DTYPE = {dtype: name for name, dtype in DTYPE_OF_NAME.items()}

# Small enough that a piece is still in the CPU's cache when it is copied to the disk's after hashing.
PIECE_BYTES = 1 << 20


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> StoredFile:
    """Writes contiguous CPU `tensors` to the new file `path`, flushes it to disk and returns its size and sha256.

    Raises OSError naming the file (a full disk), UserError for a dtype that safetensors does not know.
    """
    # Widest elements first, so that every tensor begins at a multiple of its element size.
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    digest = hashlib.sha256()
    size = 0
    try:
        with open(path, "xb") as file:
            for block in (_header(ordered), *map(_bytes_of, ordered.values())):
                for start in range(0, len(block), PIECE_BYTES):
                    piece = block[start : start + PIECE_BYTES]
                    digest.update(piece)
                    file.write(piece)
                size += len(block)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        # The system names no file when a write fails.
        raise OSError(error.errno, error.strerror, str(path)) from error
    return StoredFile(size=size, sha256=digest.hexdigest())


def flush_folder(folder: Path) -> None:
    """Makes the names in `folder` durable: a new file survives a crash only once its folder is flushed too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def dtype_name(name: str, tensor_dtype: torch.dtype) -> str:
    """safetensors' name of a dtype; UserError naming the tensor when it has none."""
    if tensor_dtype not in NAME_OF_DTYPE:
        raise UserError(f"tensor {name!r} has dtype {tensor_dtype}; safetensors stores {sorted(DTYPE_OF_NAME)}")
    return NAME_OF_DTYPE[tensor_dtype]


def _header(tensors: Mapping[str, Tensor]) -> memoryview:
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in tensors.items():
        end = start + tensor.numel() * tensor.element_size()
        dtype = dtype_name(name, tensor.dtype)
        entries[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return memoryview(struct.pack("<Q", len(text)) + text)


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data
