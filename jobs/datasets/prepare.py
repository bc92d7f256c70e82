"""`moray prepare`: text in, a dataset out.

Stages of tasks, each of which leaves its result in a folder of its own (`data.preparation.tasks`): parts of the sources
are read into runs of documents sorted by digest; ranges of hashes are searched for near-duplicates; buckets of digests
are sorted, which is the shuffle; shards are encoded out of buckets. All of it happens in `OUT.moray-unfinished`, in
which the same command goes on after a kill; OUT appears whole.
"""

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from moray import UserError
from moray.data.chat.templates import chat_template_of
from moray.data.dataset import Dataset
from moray.data.index import Kind
from moray.data.preparation.ledger import Ledger
from moray.data.preparation.profile import Profile
from moray.data.preparation.tasks import Done
from moray.data.preparation.winners import name_winners
from moray.data.reading.account import Account
from moray.data.reading.documents import found_kind, tried
from moray.data.reading.sources import find
from moray.data.tokenizer import load_tokenizer
from moray.jobs.datasets.assembly import Assembly
from moray.jobs.datasets.config import PrepareConfig
from moray.jobs.datasets.curation import curation_of, selection_of, settings_of, versions
from moray.jobs.datasets.drops import check_drops, write_drops
from moray.jobs.datasets.engine import Doer, Engine, most_tasks, processes_for
from moray.jobs.datasets.plan import PLAN, SCRATCH, planned_folder
from moray.jobs.datasets.progress import stage_bars
from moray.jobs.datasets.report import lines_of, reasons_of, write_reports
from moray.jobs.datasets.stages import Stages
from moray.jobs.datasets.upload import Goal

WORTH_PROCESSES = 32 << 20
"""Bytes of sources below which processes take longer to start than they save."""

NAMES: Mapping[Kind, str] = {
    "text": "documents",
    "chat": "dialogues",
    "preference": "dialogues, two a pair",
    "prompts": "prompts",
}


@dataclass(frozen=True)
class Summary:
    """What was prepared, and what was left out on the way."""

    dataset: Dataset
    vocab_size: int  # of the tokenizer
    ledger: Ledger
    account: Account  # of what was read
    n_bytes: int  # of text in the shards, UTF-8
    seconds: float
    profile: Profile | None = None  # of dialogues and pairs

    @property
    def bytes_per_token(self) -> float:
        return self.n_bytes / sum(split.n_tokens for split in self.dataset.splits.values())

    @property
    def n_duplicates(self) -> int:
        """Exact ones."""
        return self.ledger.total("exact duplicates")[0]

    def __str__(self) -> str:
        what = NAMES[self.dataset.kind]
        lines = [
            f"{name:<10} {split.n_documents:,} {what}, {split.n_tokens:,} tokens, {len(split)} shard(s)"
            for name, split in self.dataset.splits.items()
        ]
        # Of other kinds the bytes are those of JSON.
        per_token = f", {self.bytes_per_token:.2f} bytes a token" if self.dataset.kind == "text" else ""
        lines.append(f"{'tokenizer':<10} {self.vocab_size:,} entries{per_token}")
        if self.profile:
            lengths = [split.all_lengths for split in self.dataset.splits.values() if split.all_lengths is not None]
            lines += self.profile.lines(np.concatenate(lengths))
        lines += lines_of(self.ledger)
        lines += self.account.lines()
        lines.append(f"{'where':<10} {self.dataset.folder} ({self.seconds:.1f} s)")
        lines.append(f"{'identity':<10} {self.dataset.fingerprint}")
        return "\n".join(lines)


def prepare(config: PrepareConfig, console: Console | None = None) -> Summary:
    """Prepares the sources (see `data.reading`) as a dataset in the folder `out`, or at a URL: then, in `scratch`.

    The same documents and settings give the same bytes, whoever reads them in whatever order, and after any kill.
    Memory, whatever the sources: see docs/datasets.md; disk: twice the text.
    Raises UserError for a bad setting, source or folder, a damaged source, an interrupted preparation with other
    settings, a full disk, and a node that is not fit; WorkerError where a Ray is lost.
    """
    started = time.monotonic()
    # What can be wrong is found out before the reading, not after it.
    if not config.out:
        raise UserError("out is missing: the folder to make, or its fsspec URL; for example --out data")
    kind = found_kind(config.sources, config.reading) if config.kind == "auto" else config.kind
    config = config.model_copy(update={"kind": kind})
    config.check_kind()
    drops, own = config.drops, config.tokenizer and config.tokenizer.absolute()
    if drops is not None:
        check_drops(drops, Path(config.out), overwrite=config.overwrite)
    if own:
        _ = chat_template_of(own) if kind != "text" else load_tokenizer(own)
    most_tasks(config.workers, config.memory_mb)
    goal = Goal.of(config.out, config.scratch)
    goal.check(overwrite=config.overwrite)
    console = console or Console(stderr=True)
    account = Account(config.reading)
    found = [tried(source, account) for source in find(config.sources)]
    if drops is not None and str(drops.resolve()) in {str(file.path) for each in found for file in each.files}:
        raise UserError(f"drops={drops} is one of the sources; choose another name")
    settings = settings_of(config)
    # What tasks list is theirs alone, and no matter of the dataset.
    plan = {**settings, "drops": drops is not None, "made with": versions()}
    with planned_folder(goal.folder, plan, overwrite=config.overwrite) as folder:
        _clear_all_but_scratch(folder)
        curation = curation_of(config, folder / SCRATCH)
        size = sum(file.size for source in found for file in source.files)
        with _engine(config, folder / SCRATCH, size) as doer, stage_bars(console) as bars:
            story = Stages(folder / SCRATCH, doer, bars, found, account, drops is not None)
            read, scores = story.read(config.seed, curation, config.keeps_equal)
            runs = read
            buckets = story.sort(runs, selection_of(config.quality, scores), config.keeps_equal)
            if config.duplicates.paragraphs:
                buckets, runs = story.cut_repeats(buckets, runs)
            limit = story.limit(buckets, config.validation)
            made = story.make_tokenizer(buckets, runs, limit, config.vocab_size, own)
            shards = story.encode(buckets, runs, limit, made.folder)
        _assemble(folder, story, made, shards, own)
        story.ledger.check()
        name_winners(story.ledger, read)
        write_reports(folder, story.ledger, settings, account)
        if drops is not None:
            write_drops(drops, story.folders)
        goal.put()
    if goal.url:
        shutil.rmtree(goal.folder)
    n_bytes = story.ledger.total("kept")[1]
    profile = None if kind in ("text", "prompts") else story.profile
    seconds = time.monotonic() - started
    counted = made.found["vocab_size"], story.ledger, account, n_bytes
    summary = Summary(Dataset.open(goal.url or goal.folder), *counted, seconds, profile)
    console.print(str(summary), highlight=False, markup=False, soft_wrap=True)  # names may hold [brackets]
    return summary


def _assemble(folder: Path, story: Stages, made: Done, shards: Sequence[Done], own: Path | None) -> None:
    """Puts the dataset together in its folder. Raises UserError where a split has no document.

    own: the folder of a tokenizer that was given.
    """
    kind = story.account.rules.kind
    index = Assembly(folder, kind, made)
    splits = index.splits(shards)
    if empty := [name for name, split in splits.items() if not len(split)]:
        why = "; ".join([reasons_of(story.ledger), *story.account.lines()])
        for (stage, _), samples in story.ledger.samples.items():
            if stage == "template":
                refused = f"{samples[0].key}: {samples[0].value}"
                why += f"; the chat template of tokenizer={own} refuses {refused}; use another"
        raise UserError(f"no {NAMES[kind]} are left for the {empty[0]} split: {why}")
    index.write(splits, max(shard.found["highest_id"] for shard in shards))


@contextmanager
def _engine(config: PrepareConfig, scratch: Path, size: int) -> Iterator[Doer]:
    """size: bytes of the sources."""
    limits = config.workers, config.memory_mb
    if config.engine == "ray":
        from moray.jobs.datasets.ray_engine import ray_engine  # importing Ray takes long

        with ray_engine(scratch, most_tasks(*limits)) as doer:
            yield doer
    else:
        is_worth_it = config.workers or size > WORTH_PROCESSES
        with Engine(processes_for(*limits) if is_worth_it else 1) as doer:
            yield doer


def _clear_all_but_scratch(folder: Path) -> None:
    """What an interrupted preparation had begun to put together."""
    for path in folder.iterdir():
        if path.name not in (PLAN, SCRATCH):
            path.unlink()
