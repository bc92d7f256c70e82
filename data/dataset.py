"""What a prepared folder holds: frozen descriptions of shards and samples, read from its `index.json`.

    folder/index.json               written last; without it the folder is not a dataset
    folder/tokenizer.json, tokenizer_config.json
    folder/train-00000.tar, validation-00000.tar, ...

A sample is a block of whole documents; the tokens of a shard are those of its samples, one after another.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs

from moray import UserError

INDEX = "index.json"
VERSION = 1
STAGING_SUFFIX = ".moray-unfinished"


@dataclass(frozen=True, slots=True)
class Extent:
    """Where a member's data lies in its tar, in bytes."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Sample:
    """A block of whole documents inside a shard. The crc32 is of the tokens member, continued over the ends member."""

    key: str
    n_tokens: int
    n_documents: int
    tokens: Extent
    ends: Extent
    json: Extent
    crc32: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar file: its name within the dataset's folder, its size in bytes, its digest and its samples."""

    name: str
    size: int
    sha256: str
    n_tokens: int
    n_documents: int
    samples: tuple[Sample, ...]


@dataclass(frozen=True, slots=True)
class Split:
    """The shards of `train` or `validation`, in file order."""

    shards: tuple[Shard, ...]

    @property
    def n_tokens(self) -> int:
        return sum(shard.n_tokens for shard in self.shards)

    @property
    def n_documents(self) -> int:
        return sum(shard.n_documents for shard in self.shards)


@dataclass(frozen=True)
class Dataset:
    """A finished dataset. The fingerprint is a digest of its content, the same wherever and whenever prepared.

    vocab_size: all tokens, and pad_id, lie below it.
    """

    folder: str
    fingerprint: str
    vocab_size: int
    pad_id: int
    splits: Mapping[str, Split]

    @classmethod
    def open(cls, folder: str | Path) -> "Dataset":
        """Reads the index of a folder (or fsspec URL) that `moray prepare` finished.

        Raises UserError for a folder that is missing, unfinished, of another version, or whose index or shard sizes
        are not as they were written.
        """
        folder = str(folder).rstrip("/")
        fs, root = url_to_fs(folder)
        if not fs.exists(f"{root}/{INDEX}"):
            raise UserError(_why_missing(folder, fs.exists(root), fs.exists(root + STAGING_SUFFIX)))
        try:
            index = json.loads(fs.cat_file(f"{root}/{INDEX}"))
            version, fingerprint = index["version"], index.pop("fingerprint")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder}/{INDEX} is damaged ({error}); {_REMEDY}") from None
        if version != VERSION:
            raise UserError(f"{folder}/{INDEX} has version {version}, this moray reads version {VERSION}; {_REMEDY}")
        if fingerprint != fingerprint_of(index):
            raise UserError(f"{folder}/{INDEX} is damaged: its content does not match its fingerprint; {_REMEDY}")
        try:
            splits = {name: Split(tuple(map(_shard, shards))) for name, shards in index["splits"].items()}
            dataset = cls(folder, fingerprint, index["vocab_size"], index["pad_id"], splits)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder}/{INDEX} is no index of version {VERSION} ({error!r}); {_REMEDY}") from None
        dataset._check_names()
        dataset._check_sizes()
        return dataset

    def check_vocabulary(self, model_vocab_size: int) -> None:
        """Raises UserError if some token of this dataset has no row in the model's embedding."""
        if self.vocab_size > model_vocab_size:
            raise UserError(
                f"data.path={self.folder} holds token {self.vocab_size - 1}, beyond the model's "
                f"vocab_size={model_vocab_size}; set model.vocab_size={self.vocab_size}, or prepare the data with a "
                f"tokenizer of at most {model_vocab_size} entries"
            )

    def check_fingerprint(self, expected: str) -> None:
        """Raises UserError, naming both fingerprints, if a run was trained on other data than this."""
        if self.fingerprint != expected:
            raise UserError(
                f"data.path={self.folder} has fingerprint {self.fingerprint}, but this run was trained on {expected}; "
                "point data.path at that data or start a new run"
            )

    def _check_names(self) -> None:
        for shard in (shard for split in self.splits.values() for shard in split.shards):
            path = Path(self.folder, shard.name)
            if "/" in shard.name or shard.name in ("", ".", ".."):
                raise UserError(f"{self.folder}/{INDEX} names {shard.name!r}, which is no file of its own folder")
            if path.is_symlink() and path.resolve().parent != path.parent.resolve():
                raise UserError(f"{path} is a link out of its folder, to {path.readlink()}; put the file itself there")

    def _check_sizes(self) -> None:
        fs, root = url_to_fs(self.folder)
        sizes = {os.path.basename(file["name"]): file["size"] for file in fs.ls(root, detail=True)}
        for shard in (shard for split in self.splits.values() for shard in split.shards):
            size = sizes.get(shard.name)
            if size is None:
                raise UserError(f"{self.folder}/{shard.name} is missing; {_REMEDY}")
            if size < shard.size:
                raise UserError(f"{self.folder}/{shard.name} ends at byte {size} of {shard.size}; {_REMEDY}")
            if size > shard.size:
                raise UserError(f"{self.folder}/{shard.name} goes on after its end, byte {shard.size}; {_REMEDY}")


_REMEDY = "restore it from a copy, or run `moray prepare` again"


def _why_missing(folder: str, exists: bool, has_staging: bool) -> str:
    if has_staging:
        return f"data.path={folder} is unfinished: its preparation was interrupted; run `moray prepare` again"
    if exists:
        return f"data.path={folder} has no {INDEX}: it is not a finished dataset; run `moray prepare` again"
    return f"data.path={folder} does not exist; make it with `moray prepare SOURCE --out {folder}`"


def _shard(entry: dict[str, Any]) -> Shard:
    samples = (
        Sample(**{**sample, **{member: Extent(**sample[member]) for member in ("tokens", "ends", "json")}})
        for sample in entry["samples"]
    )
    return Shard(**{**entry, "samples": tuple(samples)})


def fingerprint_of(index: Mapping[str, Any]) -> str:
    """sha256 over an index without its `fingerprint`; through the shards' digests it covers every byte of the data."""
    return hashlib.sha256(json.dumps(index, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_index(folder: Path, vocab_size: int, pad_id: int, splits: Mapping[str, Split]) -> str:
    """Writes `index.json` atomically, and returns the fingerprint."""
    index = {
        "version": VERSION,
        "vocab_size": vocab_size,
        "pad_id": pad_id,
        "tokenizer_sha256": hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest(),
        "splits": {name: [asdict(shard) for shard in split.shards] for name, split in splits.items()},
    }
    fingerprint = fingerprint_of(json.loads(json.dumps(index)))
    partial = folder / (INDEX + ".partial")
    with open(partial, "w") as file:
        json.dump({**index, "fingerprint": fingerprint}, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / INDEX)
    return fingerprint
