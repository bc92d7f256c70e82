"""`moray inspect RUN --step N`: the text that a step was taken on, with the documents that it came from."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from moray import UserError
from moray.data.blocks import BlockReader
from moray.data.dataset import Dataset
from moray.data.mixture import Mixture
from moray.data.passages import Passage, passages
from moray.data.prompts import PromptStream
from moray.data.rows import IGNORE
from moray.data.sources import Sources
from moray.data.stream import Found, Stream
from moray.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_in
from moray.jobs.config.alignment import RLSection
from moray.jobs.config.load import read_recipe
from moray.jobs.config.sections import DataSection, Section, TrainSection
from moray.jobs.datasets.visible import line_of, named, visible
from moray.jobs.runs.positions import History
from moray.model.config.mistakes import in_one_line
from moray.parallel.checkpoint.commits import list_commits

CACHE_BYTES = 32 << 20
TRAINED_BEGINS, TRAINED_ENDS = "⟦", "⟧"


class _Read(Section):
    """What of a run's settings decides on its positions."""

    data: DataSection
    train: TrainSection
    rl: RLSection = RLSection()


@dataclass(frozen=True)
class Part:
    """A document, or the part of it that a sequence holds, and its text; of dialogues also what is trained on.

    runs: the text in pieces, each with whether its tokens are trained on; plain text is one, not marked.
    """

    passage: Passage
    runs: list[tuple[str, bool]]

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.runs)


class Lookup:
    """A run's data, opened at any position.

    Raises UserError for a folder that is no run, for data that are not where they were, or are others than those that
    the run was trained on.
    """

    def __init__(self, run: Path) -> None:
        data, train, rl, self.is_checked = _settings(run)
        self.sources = Sources.open(data.folders)
        for commit in list_commits(run / "checkpoints")[-1:]:
            self.sources.check_fingerprint(commit.manifest.metadata["data"]["fingerprint"])
        self.history = History.read(run, train.steps, train.global_batch)
        datasets = [*self.sources.datasets.values()]
        mixture = Mixture(data.mixed.phases_of(train.global_batch), train.seed) if data.mixed else None
        of_all: dict[str, Any] = {"global_batch": train.global_batch, "seed": train.seed, "lanes": range(1)}
        of_all |= {"mixture": mixture, "cache_bytes": CACHE_BYTES}
        self._stream: Stream | PromptStream
        if self.sources.kind == "prompts":
            self._stream = PromptStream(datasets, most_tokens=train.seq_len - rl.max_new_tokens, **of_all)
        else:
            long = data.long_dialogues
            self._stream = Stream(datasets, "train", seq_len=train.seq_len, long_dialogues=long, **of_all)
        self._readers = [BlockReader(dataset, "train", CACHE_BYTES) for dataset in datasets]
        with tokenizer_in(self.sources.first.folder) as folder:
            self._tokenizer = load_tokenizer(folder)

    def find(self, position: int) -> tuple[Found, str, Dataset, list[Part]]:
        """The sequence at a position, the name of its source, its dataset, and the documents in it, in order."""
        found = self._stream.find(position)
        name, dataset = [*self.sources.datasets.items()][found.source]
        shard, reader = dataset.splits["train"][found.shard], self._readers[found.source]
        is_marked, at, parts = dataset.kind in ("chat", "preference"), 0, []
        rows = found.row.reshape(4, -1, found.row.shape[-1])  # two of pairs
        is_held = rows[3] >= 0
        is_target = np.pad(rows[1, :, :-1] != IGNORE, ((0, 0), (1, 0)))
        tokens, trained = rows[0][is_held], is_target[is_held]
        for start, stop in found.spans:
            for passage in passages(reader, shard, found.shard, start, stop):
                here = slice(at, at := at + passage.stop - passage.start)
                marks = trained[here] if is_marked else np.zeros(here.stop - here.start, bool)
                parts.append(Part(passage, _runs(self._tokenizer, tokens[here], marks)))
        return found, name, dataset, parts


def show_step(run: Path, step: int, lanes: range | None, *, as_json: bool, tell: Callable[[str], None] = print) -> None:
    """Tells of a step's sequences, one after another; lanes: which of them, by default all.

    Raises UserError as `Lookup` does, and for a step or lanes that the run does not have.
    """
    lookup = Lookup(run)
    taken, batch = lookup.history.of_step(step), lookup.history.global_batch
    lanes = range(batch) if lanes is None else lanes
    if not (lanes and 0 <= lanes[0] < batch):
        raise UserError(f"--lane {lanes[0]} must lie between 0 and {batch - 1}: train.global_batch={batch}")
    if not as_json:
        loss = "" if taken.loss is None else f", loss {taken.loss:.4g}"
        tell(f"step {step} of {run}: positions {taken.first} to {taken.end}{loss}")
        if not taken.is_recorded:
            tell("metrics.jsonl does not record it: these are its positions unless batches are skipped before it")
        for first, end, why in taken.skipped:
            tell(f"before it, positions {first} to {end} were skipped: {why}; --position {first} shows the first")
        _tell_of_data(lookup, tell)
    for lane in lanes[: batch - lanes[0]]:
        _show(lookup, taken.first + lane, {"step": step, "lane": lane}, f"lane {lane}", as_json=as_json, tell=tell)


def show_position(run: Path, position: int, *, as_json: bool, tell: Callable[[str], None] = print) -> None:
    """Tells of the sequence at a position. Raises UserError as `Lookup` does, and for one beyond the run."""
    lookup = Lookup(run)
    whose = lookup.history.of_position(position)
    if not as_json:
        _tell_of_data(lookup, tell)
    _show(lookup, position, {"taken": whose}, whose, as_json=as_json, tell=tell)


def _tell_of_data(lookup: Lookup, tell: Callable[[str], None]) -> None:
    if not lookup.is_checked:
        tell("nothing is committed, so that nothing says whether the data are still those of the run")
    if lookup.sources.kind in ("chat", "preference"):
        tell(f"{TRAINED_BEGINS}…{TRAINED_ENDS} is trained on")


def _show(
    lookup: Lookup, position: int, of: Mapping[str, Any], whose: str, *, as_json: bool, tell: Callable[[str], None]
) -> None:
    found, name, dataset, parts = lookup.find(position)
    shard = dataset.splits["train"][found.shard].name
    if as_json:
        where = {"source": name, "folder": dataset.folder, "epoch": found.epoch, "shard": shard}
        told = {**of, "position": position, **where, "sequence": found.number, "tokens": found.spans}
        tell(json.dumps({**told, "documents": [_as_json(part, dataset.kind) for part in parts]}, ensure_ascii=False))
        return
    tokens = ", ".join(f"{start:,} to {stop:,}" for start, stop in found.spans)
    of_source = f"{name}: " if name else ""
    tell(
        f"\nposition {position}, {whose}: {of_source}{dataset.folder}/{shard}, sequence {found.number}, tokens {tokens}"
    )
    if found.epoch:
        tell(f"in epoch {found.epoch + 1}: it was seen before")
    for part in parts:
        of_document = part.passage
        which = f"tokens {of_document.start:,} to {of_document.stop:,} of {of_document.length:,}"
        tell(f"  {named(of_document.key)}: {which}; block {of_document.sample}, byte {of_document.byte:,}")
        text = "".join(f"{TRAINED_BEGINS}{run}{TRAINED_ENDS}" if is_trained else run for run, is_trained in part.runs)
        for line in visible(text).split("\n"):
            tell(f"    {line}".rstrip())


def _as_json(part: Part, kind: str) -> dict[str, Any]:
    passage, line = part.passage, line_of(part.passage.key)
    told = {"key": passage.key, **({"file": line[0], "line_or_id": line[1]} if line else {})}
    told |= {"tokens": [passage.start, passage.stop], "of": passage.length, "block": passage.sample}
    return {**told, "byte": passage.byte, "text": part.text, **({"runs": part.runs} if kind != "text" else {})}


def _runs(tokenizer: Tokenizer, tokens: np.ndarray, trained: np.ndarray) -> list[tuple[str, bool]]:
    """The text, cut where what is trained on begins and ends."""
    cuts = [0, *(np.flatnonzero(trained[1:] != trained[:-1]) + 1).tolist(), len(tokens)]
    return [(tokenizer.decode(tokens[start:stop].tolist()), bool(trained[start])) for start, stop in pairwise(cuts)]


def _settings(run: Path) -> tuple[DataSection, TrainSection, RLSection, bool]:
    """What a run reads, and whether anything of it is committed.

    Up to its newest commit a mixture is as that one says, whatever was asked for since.
    """
    if not (run / "config.toml").is_file():
        what = "is not a run: it has no config.toml" if run.is_dir() else "does not exist"
        raise UserError(f"{run} {what}; --step and --position are of a run's folder (run.dir)")
    recipe = read_recipe(str(run / "config.toml"))
    try:
        read = _Read.model_validate({name: _stated(recipe.get(name, {})) for name in _Read.model_fields})
    except ValidationError as error:
        raise UserError(f"{run}/config.toml: {in_one_line(error, _Read)}") from None
    data, train = read.data, read.train
    commits = list_commits(run / "checkpoints")
    for commit in commits[-1:]:
        metadata = commit.manifest.metadata
        if "train" not in metadata["config"]:
            raise UserError(f"{run} holds weights alone, which no steps of its own made")
        batch = metadata["data"]["position"] // train.global_batch
        data = data.going_on_from(metadata["config"].get("data", {}), batch)
    return data, train, read.rl, bool(commits)


def _stated(section: Mapping[str, Any]) -> dict[str, Any]:
    """A section of a file in which `none` stands for None."""
    return {name: None if value == "none" else value for name, value in section.items()}
