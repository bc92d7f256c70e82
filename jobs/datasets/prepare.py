"""`moray prepare`: text in, a dataset out.

Stages of tasks, each of which leaves its result in a folder of its own (`data.preparation.tasks`): parts of the sources
are read into runs of documents sorted by digest; ranges of hashes are searched for near-duplicates; buckets of digests
are sorted, which is the shuffle; shards are encoded out of buckets. All of it happens in `OUT.moray-unfinished`, in
which the same command goes on after a kill; OUT appears whole.
"""

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from rich.console import Console

from moray import UserError
from moray.data.chat.templates import chat_template_of
from moray.data.dataset import Dataset
from moray.data.index import Kind, Split, joined, shard_name, write_index
from moray.data.preparation import bucket, near
from moray.data.preparation.bucket import SortBucket
from moray.data.preparation.curate import Curation
from moray.data.preparation.encode import EncodeShard
from moray.data.preparation.ledger import Ledger
from moray.data.preparation.near import FindNear
from moray.data.preparation.paragraphs import FILTER_HASHES, CutRepeats, FindRepeats, HashParagraphs
from moray.data.preparation.profile import Profile
from moray.data.preparation.read import ReadPart, account_of_json, parts_of
from moray.data.preparation.runs import BAND, RUN_BYTES, Run, buckets_for, runs_in
from moray.data.preparation.selection import SCORES, Selection
from moray.data.preparation.tasks import Done, Task
from moray.data.preparation.vocabulary import MakeTokenizer, put_tokenizer
from moray.data.preparation.winners import keys_of
from moray.data.reading.account import Account
from moray.data.reading.documents import check_any, tried
from moray.data.reading.rules import Rules
from moray.data.reading.sources import Source, find
from moray.data.tokenizer import check_vocab_size, load_tokenizer
from moray.jobs.datasets.curation import curation_of, selection_of, settings_of
from moray.jobs.datasets.drops import check_drops, write_drops
from moray.jobs.datasets.engine import Doer, Engine, most_tasks, processes_for
from moray.jobs.datasets.plan import PLAN, SCRATCH, name_of, planned_folder
from moray.jobs.datasets.progress import StageBar, stage_bars
from moray.jobs.datasets.recipe import Recipe
from moray.jobs.datasets.report import lines_of, reasons_of, write_reports
from moray.jobs.datasets.upload import Goal

WORTH_PROCESSES = 32 << 20
"""Bytes of sources below which processes take longer to start than they save."""

Dedup = Literal["auto", "exact", "none"]
EngineName = Literal["local", "ray"]
T = TypeVar("T", bound=Task)
NAMES: Mapping[Kind, str] = {
    "text": "documents",
    "chat": "dialogues",
    "preference": "dialogues, two a pair",
    "prompts": "prompts",
}
SPLITS = ("train", "validation")


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


def prepare(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    vocab_size: int = 6400,
    tokenizer: str | Path | None = None,
    validation: float = 0.01,
    seed: int = 0,
    overwrite: bool = False,
    reading: Rules | None = None,
    dedup: Dedup = "auto",
    recipe: Recipe | None = None,
    workers: int | None = None,
    memory_mb: int | None = None,
    drops: str | Path | None = None,
    engine: EngineName = "local",
    scratch: Path | None = None,
    console: Console | None = None,
) -> Summary:
    """Prepares the sources (see `data.reading`) as a dataset in the folder `out`, or at a URL: then, in `scratch`.

    A tokenizer of `vocab_size` entries is trained on the training split, or taken from the folder `tokenizer`.
    `validation` is the share of documents held out, by hash of their key and text; of dialogues, by hash of the first
    thing that a user says. `dedup`: equal documents are kept once (exact) or all (none); auto: once, of text alone.
    `recipe`: what else is done to texts; nothing by default.
    `workers` processes do it: as many as there are cores, and half of the free memory has room for, or `memory_mb`;
    with `engine` ray, those of a Ray's nodes, as many as fit there.
    `drops`: a .parquet file for a list of all documents that are dropped.
    The same documents, seed and settings give the same bytes, whoever reads them in whatever order, and after any kill.
    Memory, whatever the sources: see docs/datasets.md; disk: twice the text.
    Raises UserError for a bad setting, source or folder, a damaged source, an interrupted preparation with other
    settings, a full disk, and a node that is not fit; WorkerError where a Ray is lost.
    """
    started = time.monotonic()
    if not 0 < validation < 1:
        raise UserError(f"validation={validation} must lie between 0 and 1, for example 0.01")
    own = None if tokenizer is None else Path(tokenizer).absolute()
    # What can be wrong is found out before the reading, not after it.
    reading, recipe = reading or Rules(), recipe or Recipe()
    recipe.check_kind(reading.kind)
    if drops is not None:
        check_drops(Path(drops), Path(out))
    if own:
        _ = chat_template_of(own) if reading.kind != "text" else load_tokenizer(own)
    else:
        check_vocab_size(vocab_size)
    most_tasks(workers, memory_mb)
    goal = Goal.of(out, scratch)
    goal.check(overwrite=overwrite)
    console = console or Console(stderr=True)
    account = Account(reading)
    found = [tried(source, account) for source in find(sources)]
    settings = {
        "kind": reading.kind,
        "answers": reading.answers,
        "text_field": reading.text_field,
        "max_document_bytes": reading.max_document_bytes,
        "long_documents": reading.long_documents,
        "dedup": dedup,
        "seed": seed,
        "validation": validation,
        "vocab_size": None if own else vocab_size,
        "tokenizer": own and str(own),
        **settings_of(recipe),
    }
    keep_equal = dedup == "none" or (dedup == "auto" and reading.kind != "text")
    # What tasks list is theirs alone, and no matter of the dataset.
    plan = {**settings, "drops": drops is not None}
    with planned_folder(goal.folder, plan, overwrite=overwrite) as folder:
        _clear_all_but_scratch(folder)
        curation = curation_of(recipe, folder / SCRATCH)
        size = sum(file.size for source in found for file in source.files)
        with _engine(engine, folder / SCRATCH, workers, memory_mb, size) as doer, stage_bars(console) as bars:
            story = _Story(folder / SCRATCH, doer, bars, found, account, drops is not None)
            read, scores = story.read(seed, curation)
            runs = read
            buckets = story.sort(runs, selection_of(recipe.quality, scores), keep_equal)
            if recipe.duplicates.paragraphs:
                buckets, runs = story.cut_repeats(buckets, runs)
            limit = story.limit(buckets, validation)
            made = story.make_tokenizer(buckets, runs, limit, vocab_size, own)
            shards = story.encode(buckets, runs, limit, made.folder)
        index = _Index(folder, reading.kind, made)
        splits = index.splits(shards)
        if empty := [name for name, split in splits.items() if not len(split)]:
            why = "; ".join([reasons_of(story.ledger), *account.lines()])
            raise UserError(f"no {NAMES[reading.kind]} are left for the {empty[0]} split: {why}")
        index.write(splits, max(shard.found["highest_id"] for shard in shards))
        story.ledger.check()
        story.ledger.name_winners("near-duplicates", lambda digests: keys_of(digests, read))
        write_reports(folder, story.ledger, settings)
        if drops is not None:
            write_drops(Path(drops), story.folders, read)
        goal.put()
    if goal.url:
        shutil.rmtree(goal.folder)
    n_bytes = story.ledger.total("kept")[1]
    profile = None if reading.kind in ("text", "prompts") else story.profile
    seconds = time.monotonic() - started
    counted = made.found["vocab_size"], story.ledger, account, n_bytes
    summary = Summary(Dataset.open(goal.url or goal.folder), *counted, seconds, profile)
    console.print(str(summary), highlight=False, markup=False, soft_wrap=True)  # names may hold [brackets]
    return summary


@contextmanager
def _engine(name: EngineName, scratch: Path, workers: int | None, memory_mb: int | None, size: int) -> Iterator[Doer]:
    """size: bytes of the sources."""
    if name == "ray":
        from moray.jobs.datasets.ray_engine import ray_engine  # importing Ray takes long

        with ray_engine(scratch, most_tasks(workers, memory_mb)) as doer:
            yield doer
    else:
        is_worth_it = workers or size > WORTH_PROCESSES
        with Engine(processes_for(workers, memory_mb) if is_worth_it else 1) as doer:
            yield doer


@dataclass
class _Story:
    """The stages of a preparation, and what they have found so far."""

    scratch: Path
    engine: Doer
    bars: StageBar
    sources: list[Source]
    account: Account
    keep_drops: bool
    folders: list[Path] = field(default_factory=list)  # of all tasks that account for documents
    ledger: Ledger = field(default_factory=Ledger)
    profile: Profile = field(default_factory=Profile)

    def __post_init__(self) -> None:
        self.labels = tuple(source.label for source in self.sources)

    def read(self, seed: int, curation: Curation) -> tuple[tuple[Run, ...], np.ndarray]:
        """The runs, and how many documents have each score."""
        tasks, numbers = [], []
        for number, source in enumerate(self.sources):
            for pieces in parts_of(source):
                # What a file holds is taken to be the same while its size and time, or its tag, are.
                out = self.scratch / "parts" / name_of(pieces, source.label)
                how = self.account.rules, curation, seed, RUN_BYTES, self.keep_drops
                tasks.append(ReadPart(out, pieces, source.label, *how))
                numbers.append(number)
        done = self._do("reading", tasks)
        for number, source in enumerate(self.sources):
            n_records = 0
            for of, part in zip(numbers, done, strict=True):
                if of == number:
                    found = account_of_json(part.found["account"], self.account.rules)
                    n_records += found.n_records
                    self.account.add(found)
            check_any(source, n_records, self.account)
        self._n_bytes = sum(part.found["n_bytes"] for part in done)
        self._n_bands = sum(part.found["n_bands"] for part in done)
        if not any(part.found["n_documents"] for part in done):
            counts = self.account.counts.items()
            left_out = ", ".join(f"{count:,} {reason}: {self.account.named[reason][0]}" for reason, count in counts)
            raise UserError(f"the sources hold no usable document; left out: {left_out}")
        scores = sum((np.load(part.folder / "scores.npy") for part in done), np.zeros(SCORES, np.int64))
        runs = [run for number, part in zip(numbers, done, strict=True) for run in runs_in(part.folder, number)]
        return tuple(runs), scores

    def sort(self, runs: tuple[Run, ...], selection: Selection, keep_equal: bool) -> list[Done]:
        name = self._name = name_of(runs)
        n_bytes = self._n_bands * BAND.itemsize
        n = buckets_for(n_bytes, near.BUCKET_BYTES) if n_bytes else 0
        finders = [
            FindNear(self.scratch / f"near-{name}" / f"{number:05d}", runs, selection, number, n, n_bytes // n)
            for number in range(n)
        ]
        found = tuple(done.folder for done in self._do("comparing", finders))
        n = buckets_for(self._n_bytes, bucket.BUCKET_BYTES)
        sorters = [
            SortBucket(
                out, runs, self.labels, found, selection, keep_equal, number, n, self.keep_drops, self._n_bytes // n
            )
            for number in range(n)
            for out in [self.scratch / f"buckets-{name}" / f"{number:05d}"]
        ]
        return self._do("shuffling", sorters)

    def cut_repeats(self, buckets: list[Done], runs: tuple[Run, ...]) -> tuple[list[Done], tuple[Run, ...]]:
        """The buckets without paragraphs that stood before, and the runs with those that have changed."""
        size = self._n_bytes // len(buckets)
        names = [bucket.folder.name for bucket in buckets]
        hashers = [
            HashParagraphs(self.scratch / f"paragraphs-{self._name}" / name, bucket.folder, runs, size)
            for name, bucket in zip(names, buckets, strict=True)
        ]
        hashed = self._do("paragraphs", hashers)
        n = buckets_for(sum(done.found["n_paragraphs"] for done in hashed), FILTER_HASHES)
        folders = tuple(done.folder for done in hashed)
        out = self.scratch / f"repeats-{self._name}"
        repeats = self._do("repeats", [FindRepeats(out / f"{number:05d}", folders, number, n) for number in range(n)])
        cutters = [
            CutRepeats(
                self.scratch / f"cut-{self._name}" / names[number],
                bucket.folder,
                runs,
                self.labels,
                folders[number],
                tuple(done.folder for done in repeats),
                number,
                len(runs) + number,
                self.keep_drops,
                size,
            )
            for number, bucket in enumerate(buckets)
        ]
        cut = self._do("cutting", cutters)
        return cut, (*runs, *(Run(done.folder / "run-000.documents") for done in cut))

    def limit(self, buckets: Sequence[Done], fraction: float) -> int:
        """Documents whose side is below this are for validation: `fraction` of them, but at least one on each side.

        Raises UserError if there are no two documents to tell apart.
        """
        sides = [side for bucket in buckets for side in bucket.found["sides"]]
        if not sides or min(sides) == max(sides):
            n_documents = sum(bucket.found["n_documents"] for bucket in buckets)
            raise UserError(
                f"the sources hold only {n_documents} distinct document, and a validation split needs at least 2; "
                "give more, for example a .jsonl with one text a line"
            )
        return min(max(int(fraction * (1 << 64)), min(sides) + 1), max(sides))

    def make_tokenizer(
        self, buckets: Sequence[Done], runs: tuple[Run, ...], limit: int, vocab_size: int, own: Path | None
    ) -> Done:
        folders = tuple(bucket.folder for bucket in buckets)
        out = self.scratch / f"tokenizer-{self._name}" / name_of(limit)
        (made,) = self._do(
            "tokenizer",
            [MakeTokenizer(out, folders, runs, limit, self.account.rules.kind, vocab_size, own)],
            alone=True,
        )
        return made

    def encode(self, buckets: Sequence[Done], runs: tuple[Run, ...], limit: int, tokenizer: Path) -> list[Done]:
        tasks = [
            EncodeShard(
                self.scratch / f"shards-{self._name}" / f"{split}-{number:05d}",
                tuple(bucket.folder for bucket in group),
                runs,
                self.labels,
                tokenizer,
                self.account.rules.kind,
                split,
                number,
                limit,
                self.keep_drops,
                n_bytes,
            )
            for split in SPLITS
            for number, (group, n_bytes) in enumerate(_shards(buckets, split, limit))
        ]
        done = self._do("encoding", tasks)
        for shard in done:
            self.profile.add(shard.found["profile"])
        return done

    def _do(self, stage: str, tasks: Sequence[T], *, alone: bool = False) -> list[Done]:
        """What the tasks of a stage found, in their order. alone: in this process."""
        found: list[Done | None] = [None] * len(tasks)
        with self.bars.stage(stage, sum(task.size for task in tasks)) as bar:
            for number, done in (Engine(1) if alone else self.engine).do(tasks, bar.tick):
                found[number] = done
                bar.done(tasks[number].size)
                if "ledger" in done.found:
                    self.ledger.add(Ledger.of_json(done.found["ledger"]))
        whole = [done for done in found if done is not None]
        self.folders += [done.folder for done in whole if "ledger" in done.found]
        return whole


def _shards(buckets: Sequence[Done], split: str, limit: int) -> Iterator[tuple[list[Done], int]]:
    """The buckets of each shard of a split, and their bytes: a bucket or, of few bytes each, several in a row."""
    group: list[Done] = []
    size = 0
    for each in buckets:
        order = np.load(each.folder / "order.npy", mmap_mode="r")
        n_bytes = int(order["text_bytes"][(order["side"] < limit) == (split == "validation")].sum())
        if group and size + n_bytes > bucket.BUCKET_BYTES:
            yield group, size
            group, size = [], 0
        if n_bytes:
            group.append(each)
            size += n_bytes
    if group:
        yield group, size


@dataclass(frozen=True)
class _Index:
    """Puts the parts of a dataset together in its folder."""

    folder: Path
    kind: Kind
    tokenizer: Done

    def splits(self, shards: Sequence[Done]) -> dict[str, Split]:
        put_tokenizer(self.tokenizer.folder, self.folder)
        splits = {}
        for split in SPLITS:
            mine = [shard.folder for shard in shards if shard.folder.name.startswith(f"{split}-")]
            for number, shard in enumerate(mine):
                name = shard_name(split, number)
                with suppress(FileNotFoundError):  # a template may refuse all of a shard
                    _link(shard / name, self.folder / name)
            splits[split] = joined(self.folder, split, self.kind, mine)
        return splits

    def write(self, splits: Mapping[str, Split], highest_id: int) -> None:
        # An embedding needs a row for what the data holds, whatever else the tokenizer knows; any token can pad.
        vocab_size, pad_id = 1 + highest_id, self.tokenizer.found["pad_id"]
        write_index(
            self.folder,
            vocab_size,
            pad_id if pad_id < vocab_size else self.tokenizer.found["eos_id"],
            splits,
            self.kind,
        )


def _link(path: Path, name: Path) -> None:
    try:
        name.hardlink_to(path)
    except FileNotFoundError:
        raise
    except OSError:  # not every file system knows links
        shutil.copyfile(path, name)


def _clear_all_but_scratch(folder: Path) -> None:
    """What an interrupted preparation had begun to put together."""
    for path in folder.iterdir():
        if path.name not in (PLAN, SCRATCH):
            path.unlink()
