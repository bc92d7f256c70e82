"""Writes a Hugging Face folder's weights one tensor after another, so that memory does not grow with the model."""

import json
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from moray import UserError
from moray.model.config.architecture import ModelConfig
from moray.model.hf.choice import family_for
from moray.model.hf.places import Piece, Place, inverse, is_bias, places, their_shape
from moray.model.hf.reader import FLOATS, INDEX, SINGLE
from moray.model.tensors import Read, whole

_NAMES = {dtype: name for name, dtype in FLOATS.items()}


class _Entry(NamedTuple):
    """One of their tensors, and what it is made of."""

    shape: torch.Size
    dtype: torch.dtype
    pieces: list[Piece]

    @property
    def n_bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


def write_pretrained(
    folder: Path | str,
    config: ModelConfig,
    read: Read,
    dtype: torch.dtype = torch.float32,
    max_shard_size: int = 5_000_000_000,
) -> None:
    """Writes config.json and safetensors (with an index if they are several) that transformers reads.

    The family is the first that computes what `config` does. In memory is one of their tensors and what it is made of.
    Weights that the folder held before are replaced at the end. max_shard_size: bytes of a file, except one that holds
    a single larger tensor. Raises UserError saying what no family can express.
    """
    family = family_for(config)
    found, homeless = places(config, family.table(config))
    for name, shape in homeless.items():
        if is_bias(name) and read(name, whole(shape)).any():
            raise UserError(f"{name} is not zero, and {family.model_type} has no routing bias")
    entries = {
        name: _Entry(their_shape(pieces, found), _dtype(pieces, dtype), pieces)
        for name, pieces in inverse(found).items()
    }
    files = _divide(entries, max_shard_size)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".weights-") as staged:
        for file, names in files.items():
            _write_file(Path(staged) / file, {name: entries[name] for name in names}, found, read)
        for old in [*folder.glob("model*.safetensors"), folder / INDEX]:
            old.unlink(missing_ok=True)
        for file in files:
            (Path(staged) / file).rename(folder / file)
    if len(files) > 1:
        weight_map = {name: file for file, names in files.items() for name in names}
        total = sum(entry.n_bytes for entry in entries.values())
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    _write_json(folder / "config.json", family.write(config) | {"dtype": str(dtype).removeprefix("torch.")})


def _dtype(pieces: list[Piece], dtype: torch.dtype) -> torch.dtype:
    # A routing bias moves in steps that bf16 would round away.
    return torch.float32 if is_bias(pieces[0].name) else dtype


def _divide(entries: Mapping[str, _Entry], max_bytes: int) -> dict[str, list[str]]:
    """Which tensors go into which file, in their order."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, entry in entries.items():
        if shards[-1] and size + entry.n_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += entry.n_bytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": names for i, names in enumerate(shards, 1)}


def _write_file(path: Path, entries: Mapping[str, _Entry], found: Mapping[str, Place], read: Read) -> None:
    """Eight bytes of header length (little-endian), a JSON header, then the data: safetensors' format."""
    # Widest elements first, so that every tensor begins at a multiple of its element size.
    ordered = sorted(entries.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, entry in ordered:
        end = start + entry.n_bytes
        header[name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, entry in ordered:
            tensor = _assemble(entry.pieces, found, read).to(entry.dtype).contiguous()
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _assemble(pieces: list[Piece], found: Mapping[str, Place], read: Read) -> Tensor:
    """One of their tensors out of ours."""
    parts = [(source, _own(name, expert, found[name], read)) for name, expert, source in pieces]
    source, first = parts[0]
    if source.rows is not None:
        height = max(run.stop for source, _ in parts for run in source.rows or ())
        joined = first.new_empty(height, *first.shape[1:])
        for source, part in parts:
            lengths = [run.stop - run.start for run in source.rows or ()]
            for run, rows in zip(source.rows or (), part.split(lengths), strict=True):
                joined[run] = rows
        first = joined
    return first.t() if source.transposed else first


def _own(name: str, expert: int | None, place: Place, read: Read) -> Tensor:
    if expert is None:
        return read(name, whole(place.shape))
    return read(name, (slice(expert, expert + 1), *whole(place.shape[1:])))[0]


def _write_json(path: Path, values: Mapping[str, object]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
