"""manifest.json: what a checkpoint consists of. It is written last, and a reader believes nothing else.

{"sha256": digest of the rest, "format": 3, "step": 100, "generation": 1, "parent": sha256 of the manifest before,
 "created": "2026-01-31T12:00:00+00:00", "metadata": {...},
 "files":   {"rank-00000.safetensors": {"size": 4096, "sha256": "..."}},
 "grids":   [[[[0], [384]], [[384], [384]]]],      chunks that make up a tensor: offsets and sizes of each
 "holders": [[0, 1]],                              and which file, in the order of their names, holds each of them
 "tensors": {"norm.weight": {"shape": [768], "dtype": "F32", "grid": 0, "holders": 0}}}

Thousands of tensors are cut alike and written by the same ranks: what they share stands there once. In a file, a chunk
has the name of its tensor. Formats 1 and 2 repeated chunk and file for every tensor, under a key that each chunk named.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

from moray import UserError
from moray.parallel.chunks import Chunk, Grid

FORMAT = 3
Shared = TypeVar("Shared")


class DamagedError(UserError):
    """A commit that is not as it was written; what could not be read at all is an OSError, and may pass."""


@dataclass(frozen=True)
class StoredFile:
    """Size in bytes and sha256 of a file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class StoredTensor:
    """Global shape, dtype (by safetensors' name), the chunks that make up a tensor, and the file that holds each.

    `keys` are the names that the chunks have in their files, where that is not the tensor's.
    """

    shape: tuple[int, ...]
    dtype: str
    grid: Grid
    files: tuple[str, ...]
    keys: tuple[str, ...] | None = None


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
        place = {name: i for i, name in enumerate(sorted(self.files))}
        grids, holders = _Once[Grid](), _Once[tuple[str, ...]]()
        tensors = {
            name: {
                "shape": stored.shape,
                "dtype": stored.dtype,
                "grid": grids.index(stored.grid),
                "holders": holders.index(stored.files),
            }
            for name, stored in self.tensors.items()
        }
        body = {
            "format": FORMAT,
            "step": self.step,
            "created": self.created,
            "metadata": self.metadata,
            "generation": self.generation,
            "parent": self.parent,
            "files": {name: vars(file) for name, file in self.files.items()},
            "grids": [grid.chunks for grid in grids.values],
            "holders": [[place[name] for name in files] for files in holders.values],
            "tensors": tensors,
        }
        # Tuples, and any keys that are not strings: a round trip makes the digest one of what is read.
        return json.loads(json.dumps(body, allow_nan=False))

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
        version = body.pop("format", None)
        if not isinstance(version, int) or not 1 <= version <= FORMAT:
            raise DamagedError(f"of format {version}, not {FORMAT}: a newer version wrote it")
        try:
            files = {name: StoredFile(**entry) for name, entry in body.pop("files").items()}
            # Format 1 had no generations and no parents.
            tensors = _tensors(body, sorted(files)) if version == FORMAT else _older_tensors(body)
            manifest = cls(**body, files=files, tensors=tensors)
        except (KeyError, AttributeError, TypeError, ValueError, IndexError) as error:
            raise DamagedError(f"not a manifest of format {version} ({error!r})") from error
        named = {*files, *(file for stored in tensors.values() for file in stored.files)}
        if elsewhere := sorted(name for name in named if "/" in name or name in ("", ".", "..")):
            raise DamagedError(f"names {elsewhere[0]!r}, which is no file of its own folder")
        vars(manifest)["digest"] = claimed  # under which others know it, in whichever format it was written
        return manifest


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


class _Once(Generic[Shared]):
    """Objects that many share, in the order in which they came."""

    def __init__(self) -> None:
        self.values: list[Shared] = []
        self._index: dict[int, int] = {}

    def index(self, value: Shared) -> int:
        # By identity: to hash a grid of thousands of chunks for each of thousands of tensors would take seconds.
        if id(value) not in self._index:
            self._index[id(value)] = len(self.values)
            self.values.append(value)
        return self._index[id(value)]


def _tensors(body: dict[str, Any], files: Sequence[str]) -> dict[str, StoredTensor]:
    grids = [Grid(tuple(map(_chunk, chunks))) for chunks in body.pop("grids")]
    holders = [tuple(files[i] for i in places) for places in body.pop("holders")]
    found = {}
    for name, entry in body.pop("tensors").items():
        grid, its_files = grids[entry["grid"]], holders[entry["holders"]]
        if len(grid.chunks) != len(its_files):
            raise ValueError(f"tensor {name!r} has {len(grid.chunks)} chunks in {len(its_files)} files")
        found[name] = StoredTensor(tuple(entry["shape"]), entry["dtype"], grid, its_files)
    return found


def _older_tensors(body: dict[str, Any]) -> dict[str, StoredTensor]:
    found = {}
    for name, entry in body.pop("tensors").items():
        chunks = entry["chunks"]
        grid = Grid(tuple(_chunk((chunk["offsets"], chunk["sizes"])) for chunk in chunks))
        files, keys = tuple(chunk["file"] for chunk in chunks), tuple(chunk["key"] for chunk in chunks)
        found[name] = StoredTensor(tuple(entry["shape"]), entry["dtype"], grid, files, keys)
    return found


def _chunk(entry: Any) -> Chunk:
    offsets, sizes = entry
    return tuple(map(int, offsets)), tuple(map(int, sizes))
