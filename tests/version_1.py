"""Datasets as other tools see them: the samples of a shard, and an index of version 1, made from the tars alone."""

import hashlib
import io
import json
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from moray.data.index import Sample, Shard


def samples_of(shard: Shard) -> list[Sample]:
    return [shard.sample(number) for number in range(len(shard.records))]


def make_version_1(folder: Path) -> dict[str, Any]:
    """Puts an index of version 1 into the place of the newer one; returns it."""
    newer = json.loads((folder / "index.json").read_text())
    index = {
        "version": 1,
        "vocab_size": newer["vocab_size"],
        "pad_id": newer["pad_id"],
        "tokenizer_sha256": hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest(),
        "splits": {
            split: [_shard(path) for path in sorted(folder.glob(f"{split}-*.tar"))] for split in ("train", "validation")
        },
    }
    for path in folder.glob("*.s*s.npy"):
        path.unlink()
    return write_version_1(folder, index)


def write_version_1(folder: Path, index: dict[str, Any]) -> dict[str, Any]:
    """Writes it with the fingerprint that fits."""
    index.pop("fingerprint", None)
    canonical = json.dumps(index, sort_keys=True, separators=(",", ":"))
    index["fingerprint"] = hashlib.sha256(canonical.encode()).hexdigest()
    (folder / "index.json").write_text(json.dumps(index))
    return index


def _shard(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    samples: dict[str, dict[str, Any]] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            key, _, part = member.name.partition(".")
            samples.setdefault(key, {"key": key})[part.removesuffix(".npy")] = {
                "offset": member.offset_data,
                "length": member.size,
            }
    for sample in samples.values():
        tokens, ends = (data[sample[part]["offset"] :][: sample[part]["length"]] for part in ("tokens", "ends"))
        n_tokens, n_documents = (len(np.load(io.BytesIO(npy))) for npy in (tokens, ends))
        sample.update(n_tokens=n_tokens, n_documents=n_documents, crc32=zlib.crc32(tokens + ends))
    return {
        "name": path.name,
        "size": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "n_tokens": sum(sample["n_tokens"] for sample in samples.values()),
        "n_documents": sum(sample["n_documents"] for sample in samples.values()),
        "samples": list(samples.values()),
    }
