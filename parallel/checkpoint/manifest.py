"""manifest.json: what a checkpoint consists of. It is written last, and a reader believes nothing else.

{"sha256": digest of the rest, "format": 2, "step": 100, "generation": 1, "parent": sha256 of the manifest before,
 "created": "2026-01-31T12:00:00+00:00", "metadata": {...},
 "files":   {"rank-00000.safetensors": {"size": 4096, "sha256": "..."}},
 "tensors": {"norm.weight": {"shape": [768], "dtype": "F32", "chunks": [
                {"file": "rank-00000.safetensors", "key": "norm.weight", "offsets": [0], "sizes": [768]}]}}}
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from moray import UserError

FORMAT = 2


class DamagedError(UserError):
    """A commit that is not as it was written; what could not be read at all is an OSError, and may pass."""


@dataclass(frozen=True)
class StoredFile:
    """Size in bytes and sha256 of a file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor: which file holds it under which key, where it begins in the tensor, how long it is."""

    file: str
    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class StoredTensor:
    """Global shape, dtype (by safetensors' name) and the boxes that make up a tensor."""

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Manifest:
    """One checkpoint; `metadata` is the caller's JSON object, `created` an ISO 8601 time in UTC.

    `generation` is the attempt that made it, 0 where no run did; `parent` is the digest of the commit that it goes on
    from, None where there is none: the commits of a history are a chain.
    """

    step: int
    created: str
    metadata: dict[str, Any]
    files: dict[str, StoredFile]
    tensors: dict[str, StoredTensor]
    generation: int = 0
    parent: str | None = None

    def to_json(self) -> str:
        return json.dumps({"sha256": self.digest, **self._body})

    @cached_property
    def digest(self) -> str:
        """The sha256 that names this commit."""
        return _digest(self._body)

    @cached_property
    def _body(self) -> dict[str, Any]:
        # asdict leaves tuples and any keys that are not strings; a round trip makes the digest one of what is read.
        return json.loads(json.dumps({"format": FORMAT, **asdict(self)}, allow_nan=False))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Manifest":
        """Raises DamagedError saying what is wrong with `text`."""
        try:
            body = json.loads(text)
            claimed = body.pop("sha256")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise DamagedError(f"not a manifest ({error!r})") from error
        if claimed != _digest(body):
            raise DamagedError(f"altered since it was written: its sha256 is {_digest(body)}, it claims {claimed}")
        if (version := body.pop("format")) not in (1, FORMAT):  # format 1 had no generations and no parents
            raise DamagedError(f"of format {version}, not {FORMAT}: a newer version wrote it")
        try:
            files = {name: StoredFile(**entry) for name, entry in body.pop("files").items()}
            tensors = {name: _stored_tensor(entry) for name, entry in body.pop("tensors").items()}
            manifest = cls(**body, files=files, tensors=tensors)
        except (KeyError, AttributeError, TypeError) as error:
            raise DamagedError(f"not a manifest of format {FORMAT} ({error!r})") from error
        named = {*files, *(chunk.file for stored in tensors.values() for chunk in stored.chunks)}
        if elsewhere := sorted(name for name in named if "/" in name or name in ("", ".", "..")):
            raise DamagedError(f"names {elsewhere[0]!r}, which is no file of its own folder")
        return manifest


def coverage_problem(shape: Sequence[int], boxes: Iterable[tuple[Sequence[int], Sequence[int]]]) -> str | None:
    """Says where `boxes` (offsets, sizes) leave a gap in a tensor of `shape`, overlap or stick out; None if exact.

    The edges of all boxes cut the tensor into a grid of cells, and each must lie in exactly one box: exact for any
    number of dimensions, and as cheap as the grid that shards form anyway.
    """
    boxes = [(tuple(offsets), tuple(sizes)) for offsets, sizes in boxes]
    for offsets, sizes in boxes:
        fits = len(offsets) == len(sizes) == len(shape)
        if not fits or any(o < 0 or s < 0 or o + s > n for o, s, n in zip(offsets, sizes, shape, strict=True)):
            return f"the chunk at {offsets} of size {sizes} sticks out of shape {tuple(shape)}"
    edges = [
        sorted({0, n} | {offsets[d] for offsets, _ in boxes} | {offsets[d] + sizes[d] for offsets, sizes in boxes})
        for d, n in enumerate(shape)
    ]
    cell = [{edge: i for i, edge in enumerate(edges_of_dim)} for edges_of_dim in edges]
    count = np.zeros([len(edges_of_dim) - 1 for edges_of_dim in edges], dtype=np.int32)
    for offsets, sizes in boxes:
        count[
            tuple(slice(cell[d][o], cell[d][o + s]) for d, (o, s) in enumerate(zip(offsets, sizes, strict=True)))
        ] += 1
    wrong = np.argwhere(count != 1)
    if not len(wrong):
        return None
    where = tuple(int(i) for i in wrong[0])
    element = tuple(edges[d][i] for d, i in enumerate(where))
    return f"element {element} of shape {tuple(shape)} lies in {count[where]} chunks instead of one"


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _stored_tensor(entry: dict[str, Any]) -> StoredTensor:
    chunks = tuple(
        Chunk(file=chunk["file"], key=chunk["key"], offsets=tuple(chunk["offsets"]), sizes=tuple(chunk["sizes"]))
        for chunk in entry["chunks"]
    )
    return StoredTensor(shape=tuple(entry["shape"]), dtype=entry["dtype"], chunks=chunks)
