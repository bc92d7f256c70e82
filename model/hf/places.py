"""Where every weight of ours lies in a Hugging Face file, stated once and used both ways."""

# Shapes: E experts.

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from moray.model.config.architecture import ModelConfig
from moray.model.tensors import tensor_shapes


@dataclass(frozen=True)
class Source:
    """One of their tensors, or some of its rows.

    name: may hold {layer} and {expert}. rows: the runs of rows that ours is made of, in order; by default all.
    transposed: theirs is [inputs, outputs] (GPT-2's Conv1D); rows are counted after transposing. Of a bias, which has
    one dimension, nothing is transposed.
    """

    name: str
    rows: tuple[slice, ...] | None = None
    transposed: bool = False


Table = Mapping[str, str | Source]
"""Our module or parameter -> theirs. A module stands for its weight and bias. {layer} and {expert} are filled in; a
name with {expert} is a matrix of each expert, which we stack."""


@dataclass(frozen=True)
class Place:
    """Where one tensor of ours lies: in one source, or stacked [E, …] in one an expert."""

    shape: torch.Size
    sources: tuple[Source, ...]
    stacked: bool


class Piece(NamedTuple):
    """A part of one of their tensors: all of our tensor `name`, or one expert of it if that is stacked."""

    name: str
    expert: int | None
    source: Source


def places(config: ModelConfig, table: Table) -> tuple[dict[str, Place], dict[str, torch.Size]]:
    """Where each tensor of ours lies in theirs, and the shapes of those that have no place there."""
    found, homeless = {}, {}
    if config.head == "scalar":
        table = {**table, "head": "score"}  # in all families
    for name, shape in tensor_shapes(config).items():
        source, layer = look_up(name, table)
        if source is None:
            homeless[name] = shape
            continue
        stacked = "{expert}" in source.name
        named = [
            replace(source, name=source.name.format(layer=layer, expert=expert))
            for expert in range(shape[0] if stacked else 1)
        ]
        found[name] = Place(shape, tuple(named), stacked)
    return found, homeless


def is_bias(name: str) -> bool:
    """Whether this is a routing bias, which is 0 in models that do not use it."""
    return name.endswith("ffn.router.bias_E")


def is_optional(name: str) -> bool:
    """Whether a family may lack this tensor: a routing bias, or the router's noise, which training alone draws."""
    return is_bias(name) or name.endswith("ffn.router.noise.weight")


def look_up(name: str, table: Table) -> tuple[Source | None, str]:
    """The table's entry for the parameter itself, or for its module with the parameter's last name added."""
    layer = match[1] if (match := re.match(r"blocks\.(\d+)\.", name)) else ""
    general = re.sub(r"^blocks\.\d+\.", "blocks.{layer}.", name)
    module, _, last = general.rpartition(".")
    if general in table:
        entry = table[general]
        return (entry if isinstance(entry, Source) else Source(entry)), layer
    if module not in table:
        return None, layer
    entry = table[module]
    source = entry if isinstance(entry, Source) else Source(entry)
    return replace(source, name=f"{source.name}.{last}"), layer


def inverse(found: Mapping[str, Place]) -> dict[str, list[Piece]]:
    """Which pieces each of their tensors is made of."""
    theirs = defaultdict(list)
    for name, place in found.items():
        for expert, source in enumerate(place.sources):
            theirs[source.name].append(Piece(name, expert if place.stacked else None, source))
    return dict(theirs)


def their_shape(pieces: list[Piece], found: Mapping[str, Place]) -> torch.Size:
    """The shape of a tensor of theirs that these pieces cover."""
    name, expert, source = pieces[0]
    shape = found[name].shape if expert is None else found[name].shape[1:]
    if source.rows is not None:
        shape = torch.Size((max(run.stop for piece in pieces for run in piece.source.rows or ()), *shape[1:]))
    return torch.Size(reversed(shape)) if source.transposed else shape


def runs(source: Source, rows: slice) -> Iterator[slice]:
    """Which rows of theirs, in order, make the given rows of ours."""
    if source.rows is None:
        yield rows
        return
    before = 0
    for run in source.rows:
        length = run.stop - run.start
        start, stop = max(rows.start - before, 0), min(rows.stop - before, length)
        if start < stop:
            yield slice(run.start + start, run.start + stop)
        before += length
