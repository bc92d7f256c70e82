"""A prepared folder, opened: a dataset's splits, and whether it is as it was written.

    folder/index.json               written last; without it the folder is not a dataset
    folder/train.shards.npy, train.samples.npy, validation. ...     the index's arrays
    folder/tokenizer.json, tokenizer_config.json, chat_template.jinja
    folder/train-00000.tar, validation-00000.tar, ...

A sample is a block of whole documents; the tokens of a shard are those of its samples, one after another.
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from moray import UserError
from moray.data.index import (
    INDEX,
    SAMPLE,
    SHARD,
    VERSION,
    Extent,
    Kind,
    Sample,
    Split,
    arrays_of,
    digest_of,
    fingerprint_of,
    shard_name,
)
from moray.data.reading.urls import file_system

STAGING_SUFFIX = ".moray-unfinished"


@dataclass(frozen=True)
class Dataset:
    """A finished dataset. The fingerprint is a digest of its content, the same wherever and whenever prepared.

    vocab_size: all tokens, and pad_id, lie below it. arrays: the digests of the files of its index. called: the
    setting that names the folder.
    """

    folder: str
    fingerprint: str
    vocab_size: int
    pad_id: int
    splits: Mapping[str, Split]
    arrays: Mapping[str, str]
    tokenizer_sha256: str
    kind: Kind = "text"
    called: str = "data.path"

    @classmethod
    def open(cls, folder: str | Path, called: str = "data.path") -> "Dataset":
        """Opens a folder (or fsspec URL) that `moray prepare` finished: in no time, and no memory, whatever its size.

        An index of version 1 is read whole, and checked by that. Raises UserError for a folder that is missing,
        unfinished, of a newer version, or whose index is damaged; whether all the rest is whole, `verify` tells.
        """
        folder = str(folder).rstrip("/")
        fs, root = file_system(folder)
        if not fs.exists(f"{root}/{INDEX}"):
            raise UserError(_why_missing(called, folder, fs.exists(root), fs.exists(root + STAGING_SUFFIX)))
        try:
            index = json.loads(fs.cat_file(f"{root}/{INDEX}"))
            version, names = index["version"], list(index["splits"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder}/{INDEX} is damaged ({error}); {_REMEDY}") from None
        if version not in range(1, VERSION + 1):
            raise UserError(
                f"{folder}/{INDEX} has version {version}, this moray reads versions up to {VERSION}; "
                "use the moray that prepared it, or run `moray prepare` again"
            )
        if odd := [name for name in names if not re.fullmatch(r"[\w-]+", name)]:
            raise UserError(f"{folder}/{INDEX} names {odd[0]!r}, which is no file of its own folder")
        try:
            splits = _parse_version_1(folder, index) if version == 1 else _open_arrays(folder, fs, root, index)
            identity = index["fingerprint"], index["vocab_size"], index["pad_id"]
            made_of = index.get("arrays", {}), index["tokenizer_sha256"]
            return cls(folder, *identity, splits, *made_of, index.get("kind", "text"), called)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder}/{INDEX} is no index of version {version} ({error!r}); {_REMEDY}") from None

    def verify(self) -> None:
        """Raises UserError where an array of the index or the size of a shard is not as it was written.

        Reads the index whole: once a start, in one process. The tokens are checked as they are read.
        """
        fs, root = url_to_fs(self.folder)
        for name, sha256 in self.arrays.items():
            with fs.open(f"{root}/{name}", "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    raise UserError(f"{self.folder}/{name} is damaged: its content does not match {INDEX}; {_REMEDY}")
        files = {os.path.basename(file["name"]): file for file in fs.ls(root, detail=True)}
        for split in self.splits.values():
            for number, expected in enumerate(split.shards["size"].tolist()):
                name = shard_name(split.name, number)
                self._check_shard(name, files.get(name), expected)

    def _check_shard(self, name: str, file: Mapping[str, Any] | None, expected: int) -> None:
        if file is None:
            raise UserError(f"{self.folder}/{name} is missing; {_REMEDY}")
        if file.get("islink"):
            _check_link(Path(self.folder, name))
        if file["size"] < expected:
            raise UserError(f"{self.folder}/{name} ends at byte {file['size']} of {expected}; {_REMEDY}")
        if file["size"] > expected:
            raise UserError(f"{self.folder}/{name} goes on after its end, byte {expected}; {_REMEDY}")

    def file(self, name: str) -> bytes | None:
        """What a file beside the index holds; None where there is none of that name."""
        fs, root = url_to_fs(self.folder)
        return fs.cat_file(f"{root}/{name}") if fs.exists(f"{root}/{name}") else None

    def check_vocabulary(self, model_vocab_size: int) -> None:
        """Raises UserError if some token of this dataset has no row in the model's embedding."""
        if self.vocab_size > model_vocab_size:
            raise UserError(
                f"{self.called}={self.folder} holds token {self.vocab_size - 1}, beyond the model's "
                f"vocab_size={model_vocab_size}; set model.vocab_size={self.vocab_size}, or prepare the data with a "
                f"tokenizer of at most {model_vocab_size} entries"
            )

    def check_fingerprint(self, expected: str) -> None:
        """Raises UserError, naming both fingerprints, if a run was trained on other data than this."""
        if self.fingerprint != expected:
            raise UserError(
                f"{self.called}={self.folder} has fingerprint {self.fingerprint}, but this run was trained on "
                f"{expected}; point {self.called} at that data or start a new run"
            )


_REMEDY = "restore it from a copy, or run `moray prepare` again"


def _why_missing(called: str, folder: str, exists: bool, has_staging: bool) -> str:
    if has_staging:
        return f"{called}={folder} is unfinished: its preparation was interrupted; run `moray prepare` again"
    if exists:
        return f"{called}={folder} has no {INDEX}: it is not a finished dataset; run `moray prepare` again"
    return f"{called}={folder} does not exist; make it with `moray prepare SOURCE --out {folder}`"


def _check_link(path: Path) -> None:
    if path.resolve().parent != path.parent.resolve():
        raise UserError(f"{path} is a link out of its folder, to {path.readlink()}; put the file itself there")


def _open_arrays(folder: str, fs: AbstractFileSystem, root: str, index: dict[str, Any]) -> dict[str, Split]:
    digest = index.pop("digest")
    if digest != digest_of(index):
        raise UserError(f"{folder}/{INDEX} is damaged: its content does not match its digest; {_REMEDY}")
    splits = {}
    for name in index["splits"]:
        files = arrays_of(name, index.get("kind", "text"))
        arrays = [_array(f"{folder}/{file}", fs, f"{root}/{file}", dtype) for file, dtype in files.items()]
        shards, *others = arrays
        there = shards["end"][-1] if len(shards) else 0, shards["n_documents"].sum()
        for file, array, expected in zip(list(files)[1:], others, there, strict=False):
            if len(array) != expected:
                raise UserError(f"{folder}/{file} is damaged: it has {len(array)} records; {_REMEDY}")
        splits[name] = Split(name, *arrays)
    return splits


def _array(name: str, fs: AbstractFileSystem, path: str, dtype: np.dtype) -> np.ndarray:
    """Mapped where it is a file of this machine, else read."""
    try:
        if isinstance(fs, LocalFileSystem):
            _check_link(Path(path))
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            array = np.load(io.BytesIO(fs.cat_file(path)), allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{name} is missing; {_REMEDY}") from None
    except (ValueError, EOFError) as error:
        raise UserError(f"{name} is damaged ({error}); {_REMEDY}") from None
    if array.dtype != dtype or array.ndim != 1:
        raise UserError(f"{name} is damaged: it holds {array.dtype} {array.shape}; {_REMEDY}")
    return array


def _parse_version_1(folder: str, index: dict[str, Any]) -> dict[str, Split]:
    splits = {}
    for name, entries in index["splits"].items():
        for number, entry in enumerate(entries):
            if entry["name"] != shard_name(name, number):
                raise UserError(f"{folder}/{INDEX} names {entry['name']!r}, which is no file of its own folder")
        samples = [np.array([_sample(part).record for part in entry["samples"]], SAMPLE) for entry in entries]
        shards = np.zeros(len(entries), SHARD)
        for field in ("size", "sha256", "n_tokens", "n_documents"):
            shards[field] = [entry[field] for entry in entries]
        shards["end"] = np.cumsum([len(part) for part in samples])
        splits[name] = Split(name, shards, np.concatenate([np.zeros(0, SAMPLE), *samples]))
    identity = index["vocab_size"], index["pad_id"], index["tokenizer_sha256"]
    if index["fingerprint"] != fingerprint_of(*identity, splits):
        raise UserError(f"{folder}/{INDEX} is damaged: its content does not match its fingerprint; {_REMEDY}")
    return splits


def _sample(entry: dict[str, Any]) -> Sample:
    extents = {part: Extent(**entry[part]) for part in ("tokens", "ends", "json")}
    return Sample(**{**entry, **extents})
