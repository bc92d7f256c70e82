"""Writes documents as WebDataset shards whose bytes depend on their content alone (no times, no owners).

A sample is a block of whole documents of about 64K tokens, in three members of a plain tar:

    KEY.tokens.npy  uint16 or uint32 [tokens]     the documents' tokens, one after another
    KEY.ends.npy    int64 [documents]             where each ends (exclusive) within the block
    KEY.json        {"documents": [key, ...]}     which they are
"""

import hashlib
import io
import json
import os
import tarfile
import zlib
from pathlib import Path

import numpy as np

from data.dataset import Extent, Sample, Shard, Split

BLOCK_TOKENS = 1 << 16
SHARD_TOKENS = 16 << 20
_TAR_BLOCK = 512


class TarWriter:
    """A tar file written front to back, hashed on the way."""

    def __init__(self, path: Path) -> None:
        self.size = 0
        self._file = open(path, "wb")  # noqa: SIM115
        self._sha256 = hashlib.sha256()

    def add(self, name: str, data: bytes) -> Extent:
        """Appends a member; returns where its data lies."""
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._write(info.tobuf(tarfile.USTAR_FORMAT))
        extent = Extent(self.size, len(data))
        self._write(data)
        self._write(bytes(-len(data) % _TAR_BLOCK))
        return extent

    def finish(self) -> str:
        """Ends the archive and flushes it to disk; returns its sha256."""
        self._write(bytes(2 * _TAR_BLOCK))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.close()
        return self._sha256.hexdigest()

    def close(self) -> None:
        self._file.close()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self.size += len(data)


class SplitWriter:
    """Writes the documents of one split, in the order they come, into `folder/SPLIT-00000.tar` and so on.

    A block holds at most `block_tokens` and a shard at most `shard_tokens`, unless a single document is longer.
    Memory: one block.
    """

    def __init__(
        self, folder: Path, split: str, block_tokens: int = BLOCK_TOKENS, shard_tokens: int = SHARD_TOKENS
    ) -> None:
        self._folder, self._split = folder, split
        self._block_tokens, self._shard_tokens = block_tokens, shard_tokens
        self._tar: TarWriter | None = None
        self._keys: list[str] = []
        self._block: list[np.ndarray] = []
        self._n_block = 0
        self._samples: list[Sample] = []
        self._shards: list[Shard] = []

    def add(self, key: str, tokens: np.ndarray) -> None:
        """Appends a document: BOS + ids + EOS, in the dtype to be stored."""
        if self._block and self._n_block + len(tokens) > self._block_tokens:
            self._end_block()
        self._n_block += len(tokens)
        self._keys.append(key)
        self._block.append(tokens)

    def finish(self) -> Split:
        """Writes what is left and describes all of it."""
        if self._block:
            self._end_block()
        if self._tar:
            self._end_shard(self._tar)
        return Split(tuple(self._shards))

    def close(self) -> None:
        """Lets go of the open file, if writing was given up."""
        if self._tar:
            self._tar.close()

    def _end_block(self) -> None:
        tokens = np.concatenate(self._block)
        ends = np.cumsum([len(document) for document in self._block], dtype=np.int64)
        if self._tar and sum(sample.n_tokens for sample in self._samples) + len(tokens) > self._shard_tokens:
            self._end_shard(self._tar)
        if self._tar is None:
            self._tar = TarWriter(self._folder / self._shard_name)
        key = f"{self._split}-{len(self._shards):05d}-{len(self._samples):06d}"
        tokens_npy, ends_npy = _npy(tokens), _npy(ends)
        sample = Sample(
            key=key,
            n_tokens=len(tokens),
            n_documents=len(ends),
            tokens=self._tar.add(f"{key}.tokens.npy", tokens_npy),
            ends=self._tar.add(f"{key}.ends.npy", ends_npy),
            json=self._tar.add(f"{key}.json", json.dumps({"documents": self._keys}).encode()),
            crc32=zlib.crc32(ends_npy, zlib.crc32(tokens_npy)),
        )
        self._samples.append(sample)
        self._keys, self._block, self._n_block = [], [], 0

    def _end_shard(self, tar: TarWriter) -> None:
        sha256 = tar.finish()
        n_tokens, n_documents = sum(s.n_tokens for s in self._samples), sum(s.n_documents for s in self._samples)
        self._shards.append(Shard(self._shard_name, tar.size, sha256, n_tokens, n_documents, tuple(self._samples)))
        self._tar, self._samples = None, []

    @property
    def _shard_name(self) -> str:
        return f"{self._split}-{len(self._shards):05d}.tar"


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()
