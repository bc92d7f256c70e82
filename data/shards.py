"""Writes documents as WebDataset shards whose bytes depend on their content alone (no times, no owners).

A sample is a block of whole documents of about 64K tokens, in three members of a plain tar:

    KEY.tokens.npy  uint16 or uint32 [tokens]     the documents' tokens, one after another
    KEY.ends.npy    int64 [documents]             where each ends (exclusive) within the block
    KEY.json        {"documents": [key, ...]}     which they are
    KEY.mask.npy    uint8 [tokens]                but for plain text: TRAINED and USER_TURN of each token

Beside the keys of prompts stand their `references`, any JSON.
"""

import hashlib
import io
import json
import os
import tarfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from moray.data.index import Extent, GrowingArray, Kind, Sample, Split, arrays_of, sample_key, shard_name

BLOCK_TOKENS = 1 << 16
SHARD_TOKENS = 16 << 20

TRAINED = 1
"""Flag of a token that is a target: of an answer, or its end."""
USER_TURN = 2
"""Flag of the first token of a user's turn, where a dialogue that is too long may begin."""


class ShardFile:
    """A tar file written front to back by webdataset's own writer, hashed on the way."""

    def __init__(self, path: Path) -> None:
        from webdataset.writer import TarWriter  # which imports torch: not for those who only read what was written

        self._file = _HashedFile(path)
        # Fixed times and owners: the bytes depend on the content alone.
        self._tar = TarWriter(self._file, user="", group="", mtime=0, compress=False, encoder=False)

    @property
    def size(self) -> int:
        return self._file.size

    def add(self, key: str, members: dict[str, bytes]) -> dict[str, Extent]:
        """Appends a sample; returns where each member's data lies."""
        extents, offset = {}, self._tar.tarstream.offset
        for name in sorted(members):  # the order in which TarWriter writes them
            extents[name] = Extent(offset + tarfile.BLOCKSIZE, len(members[name]))
            n_blocks = 1 + -(-len(members[name]) // tarfile.BLOCKSIZE)
            offset += n_blocks * tarfile.BLOCKSIZE
        self._tar.write({"__key__": key, **members})
        return extents

    def finish(self) -> str:
        """Ends the archive and flushes it to disk; returns its sha256."""
        self._tar.close()
        return self._file.finish()

    def close(self) -> None:
        """Gives the file up where it stands."""
        with suppress(OSError):  # a full disk is why it is given up: it cannot take the archive's end either
            self._tar.close()
        self._file.close()


class _HashedFile:
    """A file that knows the digest of what was written to it."""

    def __init__(self, path: Path) -> None:
        self.size = 0
        self._file = open(path, "wb")  # noqa: SIM115
        self._sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self._file.write(data)
        self._sha256.update(data)
        self.size += len(data)
        return len(data)

    def finish(self) -> str:
        self._file.flush()
        os.fsync(self._file.fileno())
        self.close()
        return self._sha256.hexdigest()

    def close(self) -> None:
        self._file.close()


class SplitWriter:
    """Writes the documents of one split, in the order they come, into `folder/SPLIT-00000.tar` and so on.

    A block holds at most `block_tokens` and a shard at most `shard_tokens`, unless a single document is longer.
    first: the number of its first shard, where others write those before it. Memory: one block.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        block_tokens: int = BLOCK_TOKENS,
        shard_tokens: int = SHARD_TOKENS,
        kind: Kind = "text",
        first: int = 0,
    ) -> None:
        self._folder, self._split, self._first = folder, split, first
        self._block_tokens, self._shard_tokens = block_tokens, shard_tokens
        self._shard: ShardFile | None = None
        self._keys: list[str] = []
        self._block: list[np.ndarray] = []
        self._flags: list[np.ndarray] = []
        self._references: list[Any] = []
        self._n_block = 0
        arrays = [GrowingArray(folder / name, dtype) for name, dtype in arrays_of(split, kind).items()]
        self._shards, self._samples = arrays[:2]
        self._lengths = None if kind == "text" else arrays[2]
        self._has_references = kind == "prompts"
        self._n_tokens = self._n_documents = self._n_samples = 0  # of the shard
        self.highest_id = 0  # of all tokens so far

    def add(
        self,
        key: str,
        tokens: np.ndarray,
        flags: np.ndarray | None = None,
        *,
        reference: Any = None,
        together: bool = False,
    ) -> None:
        """Appends a document, start and end included, in the dtype to be stored.

        flags (uint8, [tokens]): of all kinds but text. reference: what a prompt's answer is compared with.
        together: in the block of the document before it.
        """
        self.highest_id = max(self.highest_id, int(tokens.max()))
        if self._block and not together and self._n_block + len(tokens) > self._block_tokens:
            self._end_block()
        self._n_block += len(tokens)
        self._keys.append(key)
        self._block.append(tokens)
        if flags is not None:
            self._flags.append(flags)
        if self._has_references:
            self._references.append(reference)
        if self._lengths is not None:
            self._lengths.append(len(tokens))

    def finish(self) -> Split:
        """Writes what is left and describes all of it."""
        if self._block:
            self._end_block()
        if self._shard:
            self._end_shard(self._shard)
        lengths = self._lengths.finish() if self._lengths is not None else None
        return Split(self._split, self._shards.finish(), self._samples.finish(), lengths)

    def close(self) -> None:
        """Lets go of the open files, if writing was given up."""
        for file in (self._shard, self._shards, self._samples, self._lengths):
            if file is not None:  # an array without a record counts as false
                file.close()

    def _end_block(self) -> None:
        tokens = np.concatenate(self._block)
        ends = np.cumsum([len(document) for document in self._block], dtype=np.int64)
        if self._shard and self._n_tokens + len(tokens) > self._shard_tokens:
            self._end_shard(self._shard)
        name = shard_name(self._split, self._first + len(self._shards))
        if self._shard is None:
            self._shard = ShardFile(self._folder / name)
        tokens_npy, ends_npy = _npy(tokens), _npy(ends)
        mask_npy = _npy(np.concatenate(self._flags)) if self._flags else b""
        names = {"documents": self._keys} | ({"references": self._references} if self._has_references else {})
        members = {"tokens.npy": tokens_npy, "ends.npy": ends_npy, "json": json.dumps(names).encode()}
        members |= {"mask.npy": mask_npy} if mask_npy else {}
        key = sample_key(name, self._n_samples)
        extents = self._shard.add(key, members)
        sample = Sample(
            key=key,
            n_tokens=len(tokens),
            n_documents=len(ends),
            tokens=extents["tokens.npy"],
            ends=extents["ends.npy"],
            json=extents["json"],
            crc32=zlib.crc32(mask_npy, zlib.crc32(ends_npy, zlib.crc32(tokens_npy))),
            mask=extents.get("mask.npy"),
        )
        self._samples.append(sample.record)
        self._n_tokens, self._n_documents = self._n_tokens + len(tokens), self._n_documents + len(ends)
        self._n_samples += 1
        self._keys, self._block, self._flags, self._references, self._n_block = [], [], [], [], 0

    def _end_shard(self, shard: ShardFile) -> None:
        sha256 = shard.finish().encode()
        self._shards.append((shard.size, sha256, self._n_tokens, self._n_documents, len(self._samples)))
        self._shard, self._n_tokens, self._n_documents, self._n_samples = None, 0, 0, 0


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()
