"""The index of a dataset: where each sample lies, in arrays that are mapped and not parsed.

    SPLIT.shards.npy     a record a shard
    SPLIT.samples.npy    a record a sample, shard after shard
    SPLIT.lengths.npy    the tokens of each document, shard after shard, but for plain text: rows are packed by them
    index.json           the digests of these arrays, the fingerprint of the data, and what a model must know of them

Names are not stored: shard 3 of `train` is `train-00003.tar`, and its sample 5 has the key `train-00003-000005`.
A process that opens an index of any size has read a page or two of it, and shares the pages with all others.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

INDEX = "index.json"
VERSION = 3

Kind = Literal["text", "chat", "preference", "prompts"]
"""What a dataset's documents are: texts; dialogues; pairs of dialogues, the chosen one first; prompts that await an
answer. All but texts are whole to whoever reads them, and have flags.
"""

_LENGTHS = "ends_length ends_offset json_length json_offset n_documents n_tokens tokens_length tokens_offset"
SAMPLE = np.dtype([("crc32", "<u4"), *((name, "<i8") for name in _LENGTHS.split())])
FLAGGED_SAMPLE = np.dtype([*SAMPLE.descr, ("mask_length", "<i8"), ("mask_offset", "<i8")])
LENGTH = np.dtype("<u4")
SHARD = np.dtype([("size", "<i8"), ("sha256", "S64"), ("n_tokens", "<i8"), ("n_documents", "<i8"), ("end", "<i8")])
"""`end` is the number of samples in this shard and all before it."""


@dataclass(frozen=True, slots=True)
class Extent:
    """Where a member's data lies in its tar, in bytes."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Sample:
    """A block of whole documents inside a shard.

    The crc32 is of the tokens member, continued over the ends member and, if there is one, the mask member.
    """

    key: str
    n_tokens: int
    n_documents: int
    tokens: Extent
    ends: Extent
    json: Extent
    crc32: int
    mask: Extent | None = None

    @property
    def record(self) -> tuple[int, ...]:
        """What SAMPLE, or FLAGGED_SAMPLE, describes."""
        ends, names, tokens = ((part.length, part.offset) for part in (self.ends, self.json, self.tokens))
        mask = (self.mask.length, self.mask.offset) if self.mask else ()
        return (self.crc32, *ends, *names, self.n_documents, self.n_tokens, *tokens, *mask)


@dataclass(frozen=True)
class Shard:
    """One tar file: its name within the dataset's folder, its size in bytes, its digest and its samples' records."""

    name: str
    size: int
    sha256: str
    n_tokens: int
    n_documents: int
    records: np.ndarray  # SAMPLE or FLAGGED_SAMPLE [samples]

    @property
    def starts(self) -> np.ndarray:
        """Where each sample begins among the shard's tokens, and the end of the last; int64 [samples + 1]."""
        return np.concatenate([[0], np.cumsum(self.records["n_tokens"])])

    def sample(self, number: int) -> Sample:
        names = self.records.dtype.names or ()
        row = dict(zip(names, self.records[number].tolist(), strict=True))
        parts = ("tokens", "ends", "json", *(("mask",) if "mask_offset" in names else ()))
        extents = {part: Extent(row[f"{part}_offset"], row[f"{part}_length"]) for part in parts}
        key = sample_key(self.name, number)
        return Sample(key, row["n_tokens"], row["n_documents"], **extents, crc32=row["crc32"])


@dataclass(frozen=True, eq=False)
class Split:
    """The shards of `train` or `validation`, in file order; each is described when it is asked for."""

    name: str
    shards: np.ndarray  # SHARD [shards]
    samples: np.ndarray  # SAMPLE or FLAGGED_SAMPLE [samples]
    all_lengths: np.ndarray | None = None  # LENGTH [documents]; None: of plain text

    def __len__(self) -> int:
        return len(self.shards)

    def __iter__(self) -> Iterator[Shard]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, number: int) -> Shard:
        first = int(self.shards["end"][number - 1]) if number else 0
        size, sha256, n_tokens, n_documents, end = self.shards[number].tolist()
        name = shard_name(self.name, number)
        return Shard(name, size, sha256.decode(), n_tokens, n_documents, self.samples[first:end])

    def lengths(self, number: int) -> np.ndarray:
        """The tokens of each document of a shard, int64 [documents]; not of plain text, where nobody asks."""
        assert self.all_lengths is not None
        end = int(self.shards["n_documents"][: number + 1].sum())
        return self.all_lengths[end - int(self.shards["n_documents"][number]) : end].astype(np.int64)

    @property
    def n_tokens(self) -> int:
        return int(self.shards["n_tokens"].sum())

    @property
    def n_documents(self) -> int:
        return int(self.shards["n_documents"].sum())


class GrowingArray:
    """An .npy file of records that are appended; whole once it is finished. Memory: none of its own."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self._path, self._dtype, self._length = path, dtype, 0
        self._file = open(path, "wb")  # noqa: SIM115
        self._write_header()

    def __len__(self) -> int:
        return self._length

    def append(self, record: Any) -> None:
        self.extend(np.array([record], self._dtype))

    def extend(self, records: np.ndarray) -> None:
        self._file.write(records.tobytes())
        self._length += len(records)

    def finish(self) -> np.ndarray:
        """Flushes it to disk; returns it, mapped."""
        self._file.seek(0)
        self._write_header()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return np.lib.format.open_memmap(self._path, mode="r")

    def close(self) -> None:
        self._file.close()

    def _write_header(self) -> None:
        # numpy's headers have room for any length: the last one is as long as the first.
        descr = np.lib.format.dtype_to_descr(self._dtype)
        header = {"descr": descr, "fortran_order": False, "shape": (self._length,)}
        np.lib.format.write_array_header_1_0(self._file, header)


def joined(folder: Path, split: str, kind: Kind, parts: Sequence[Path]) -> Split:
    """The arrays of a split, written in `folder`, out of those that describe its shards one after another."""
    arrays = []
    for name, dtype in arrays_of(split, kind).items():
        whole = GrowingArray(folder / name, dtype)
        n_samples = 0
        for part in parts:
            records = np.array(np.load(part / name, mmap_mode="r"))
            if dtype == SHARD:
                records["end"] += n_samples
                n_samples = int(records["end"][-1]) if len(records) else n_samples
            whole.extend(records)
        arrays.append(whole.finish())
    return Split(split, *arrays)


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.tar"


def sample_key(shard: str, number: int) -> str:
    return f"{shard.removesuffix('.tar')}-{number:06d}"


def arrays_of(split: str, kind: Kind) -> dict[str, np.dtype]:
    """The files of a split's index, and what they hold: shards, samples and, but for text, lengths."""
    shards, samples, lengths = (f"{split}.{name}.npy" for name in ("shards", "samples", "lengths"))
    if kind == "text":
        return {shards: SHARD, samples: SAMPLE}
    return {shards: SHARD, samples: FLAGGED_SAMPLE, lengths: LENGTH}


def write_index(folder: Path, vocab_size: int, pad_id: int, splits: Mapping[str, Split], kind: Kind = "text") -> str:
    """Writes `index.json` atomically, beside the arrays that are there, and returns the fingerprint."""
    tokenizer_sha256 = _sha256(folder / "tokenizer.json")
    fingerprint = fingerprint_of(vocab_size, pad_id, tokenizer_sha256, splits)
    index = {
        "version": VERSION,
        "kind": kind,
        "fingerprint": fingerprint,
        "vocab_size": vocab_size,
        "pad_id": pad_id,
        "tokenizer_sha256": tokenizer_sha256,
        "splits": list(splits),
        "arrays": {name: _sha256(folder / name) for split in splits for name in arrays_of(split, kind)},
    }
    partial = folder / (INDEX + ".partial")
    with open(partial, "w") as file:
        json.dump({**index, "digest": digest_of(index)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / INDEX)
    return fingerprint


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(index: Mapping[str, Any]) -> str:
    """sha256 of an index without its `digest`: through the arrays' digests it covers all of the index."""
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def fingerprint_of(vocab_size: int, pad_id: int, tokenizer_sha256: str, splits: Mapping[str, Split]) -> str:
    """What tells datasets apart: through the shards' digests it covers every byte of the data, wherever it lies.

    It is the sha256 of the index as version 1 wrote it, whichever version holds it: runs remember it. Masks are in the
    shards' digests.
    """
    sha256 = hashlib.sha256(f'{{"pad_id":{pad_id},"splits":{{'.encode())
    for count, name in enumerate(sorted(splits)):
        sha256.update(f'{"," if count else ""}"{name}":['.encode())
        for number, shard in enumerate(splits[name]):
            sha256.update((("," if number else "") + _as_version_1(shard)).encode())
        sha256.update(b"]")
    end = f'}},"tokenizer_sha256":"{tokenizer_sha256}","version":1,"vocab_size":{vocab_size}}}'
    sha256.update(end.encode())
    return sha256.hexdigest()


_SAMPLE_AS_VERSION_1 = (
    '{{"crc32":{},"ends":{{"length":{},"offset":{}}},"json":{{"length":{},"offset":{}}},"key":"{key}",'
    '"n_documents":{},"n_tokens":{},"tokens":{{"length":{},"offset":{}}}}}'
)


def _as_version_1(shard: Shard) -> str:
    records = enumerate(shard.records[list(SAMPLE.names or ())].tolist())
    samples = ",".join(
        _SAMPLE_AS_VERSION_1.format(*record, key=sample_key(shard.name, number)) for number, record in records
    )
    return (
        f'{{"n_documents":{shard.n_documents},"n_tokens":{shard.n_tokens},"name":"{shard.name}",'
        f'"samples":[{samples}],"sha256":"{shard.sha256}","size":{shard.size}}}'
    )
