"""Reads any part of any of our tensors from a Hugging Face folder, and no more of its files than that part."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moray import UserError
from moray.model.config.architecture import ModelConfig
from moray.model.hf.families import family_of
from moray.model.hf.fields import json_object
from moray.model.hf.places import Source, inverse, is_optional, look_up, places, runs, their_shape
from moray.model.tensors import Box, whole

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""safetensors' names of what weights may be."""


class HFWeights:
    """The weights of a Hugging Face folder under our names.

    Raises UserError listing at once all that are missing, unknown or of a wrong shape or dtype, for files that are not
    whole, and for an output head that differs from the embedding it should be tied to.
    """

    def __init__(self, folder: Path | str, config: ModelConfig) -> None:
        self.folder = Path(folder)
        family = family_of(self.folder)
        table = family.table(config)
        self.places, self.homeless = places(config, table)
        self._slices = _open(self.folder, family.prefix)
        tied_head = look_up("head.weight", table)[0] if config.has_tied_head else None
        expected = {name: their_shape(pieces, self.places) for name, pieces in inverse(self.places).items()}
        if tied_head and tied_head.name in self._slices:
            expected[tied_head.name] = self.places["embedding.weight"].shape
        self._check(expected, lambda name: family.ignores(name, config))
        if tied_head and tied_head.name in self._slices:
            self._check_tied(tied_head)

    def read(self, name: str, box: Box | None = None) -> Tensor:
        """A part of our tensor `name`, in the file's dtype; by default all of it.

        A routing bias, or a router's noise, that the family does not have is 0.
        """
        if name in self.homeless:
            return torch.zeros(self.homeless[name])[box or whole(self.homeless[name])]
        place = self.places[name]
        box = tuple(
            slice(*part.indices(size)) for part, size in zip(box or whole(place.shape), place.shape, strict=True)
        )
        sizes = [max(part.stop - part.start, 0) for part in box]
        if 0 in sizes:
            return torch.empty(sizes)
        if not place.stacked:
            return self._part(place.sources[0], box)
        return torch.stack([self._part(source, box[1:]) for source in place.sources[box[0]]])

    def _part(self, source: Source, box: Box) -> Tensor:
        theirs = self._slices[source.name]()
        if source.transposed and len(box) == 2:
            parts = [theirs[box[1], rows].t() for rows in runs(source, box[0])]
        else:
            parts = [theirs[(rows, *box[1:])] for rows in runs(source, box[0])]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _check(self, expected: dict[str, torch.Size], ignores: Callable[[str], bool]) -> None:
        wrong = [f"{name} has no place in this model_type" for name in self.homeless if not is_optional(name)]
        wrong += [f"{name} is missing" for name in expected if name not in self._slices]
        for name, open_slice in self._slices.items():
            if name not in expected:
                wrong += [] if ignores(name) else [f"{name} is unknown"]
            elif (shape := open_slice().get_shape()) != list(expected[name]):
                wrong.append(f"{name} is {shape} and must be {list(expected[name])}")
            elif (dtype := open_slice().get_dtype()) not in FLOATS:
                wrong.append(f"{name} is of dtype {dtype} and must be F64, F32, F16 or BF16")
        if wrong:
            raise UserError(f"{self.folder}: config.json describes other weights:\n  " + "\n  ".join(wrong))

    def _check_tied(self, head: Source, rows: int = 4096) -> None:
        vocabulary = self.places["embedding.weight"].shape[0]
        for start in range(0, vocabulary, rows):
            part = (slice(start, min(start + rows, vocabulary)), slice(None))
            if not torch.equal(self._part(head, part), self.read("embedding.weight", part)):
                raise UserError(
                    f"{self.folder}: tie_word_embeddings=true, but {head.name} differs from the embedding; "
                    "set it to false in config.json"
                )


def _open(folder: Path, prefix: str) -> dict[str, Callable[[], Any]]:
    """What opens each tensor's slice; names of a model without its head get their prefix. Headers alone are read."""
    names = weight_files(folder)
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise UserError(f"{folder} lacks files that {INDEX} names: {', '.join(absent)}")
    files = [_open_file(folder / name) for name in names]
    slices = {name: partial(file.get_slice, name) for file in files for name in file.keys()}  # noqa: SIM118
    is_bare = not any(name.startswith(prefix) for name in slices)
    return {prefix + name if is_bare else name: open_slice for name, open_slice in slices.items()}


def weight_files(folder: Path) -> list[str]:
    """The names of the files; like transformers, a single one before an index."""
    if (folder / SINGLE).is_file():
        return [SINGLE]
    if not (folder / INDEX).is_file():
        raise UserError(f"{folder} holds neither {SINGLE} nor {INDEX}; other formats must be converted to safetensors")
    shards = json_object(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise UserError(f"{folder / INDEX} must hold a weight_map, which names each tensor's file")
    names = sorted(set(shards.values()))
    if elsewhere := [name for name in names if "/" in name or name in ("", ".", "..")]:
        raise UserError(f"{folder / INDEX} names {elsewhere[0]!r}, which is no file of its own folder")
    return names


def _open_file(path: Path) -> Any:
    try:
        path.open("rb").close()  # of a file that may not be read, safe_open says that it does not exist
        return safe_open(path, framework="pt")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); fetch or write it again") from None
