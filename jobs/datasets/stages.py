"""The stages of a preparation: which tasks there are, out of what the stage before has found."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np

from moray import UserError
from moray.data.preparation import bucket, near
from moray.data.preparation.bucket import SortBucket
from moray.data.preparation.curate import Curation
from moray.data.preparation.encode import EncodeShard
from moray.data.preparation.ledger import Ledger
from moray.data.preparation.near import FindNear
from moray.data.preparation.paragraphs import FILTER_HASHES, CutRepeats, FindRepeats, HashParagraphs
from moray.data.preparation.profile import Profile
from moray.data.preparation.read import ReadPart, account_of_json, parts_of
from moray.data.preparation.runs import BAND, RECORD_BYTES, RUN_BYTES, Run, buckets_for, runs_in
from moray.data.preparation.selection import SCORES, Selection
from moray.data.preparation.tasks import Done, Task
from moray.data.preparation.vocabulary import MakeTokenizer
from moray.data.reading.account import Account
from moray.data.reading.documents import check_any
from moray.data.reading.sources import Source, SourceFile
from moray.jobs.datasets.assembly import SPLITS
from moray.jobs.datasets.engine import Doer, Engine
from moray.jobs.datasets.plan import name_of
from moray.jobs.datasets.progress import StageBar
from moray.jobs.datasets.report import reasons_of

T = TypeVar("T", bound=Task)


@dataclass
class Stages:
    """What the stages have found so far. keep_drops: tasks list what they drop."""

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

    def read(self, seed: int, curation: Curation, keep_equal: bool) -> tuple[tuple[Run, ...], np.ndarray]:
        """The runs, and how many documents have each score."""
        tasks, numbers, digest = [], [], cache(SourceFile.digest)
        for number, source in enumerate(self.sources):
            for pieces in parts_of(source):
                # What a file holds is taken to be the same while its size and time, or its tag, are; where a storage
                # says neither, its digest is. And what bears damage reads more.
                unknown = [digest(piece.file) for piece in pieces if not piece.file.version]
                out = self.scratch / "parts" / name_of(pieces, source.label, self.account.rules.on_damage, unknown)
                how = self.account.rules, curation, seed, RUN_BYTES, self.keep_drops, keep_equal
                tasks.append(ReadPart(out, pieces, source.label, *how))
                numbers.append(number)
        done = self._do("reading", tasks)
        n_records = Counter[int]()
        for number, part in zip(numbers, done, strict=True):
            found = account_of_json(part.found["account"], self.account.rules)
            n_records[number] += found.n_records
            self.account.add(found)
        for number, source in enumerate(self.sources):
            check_any(source, n_records[number], self.account)
        self._n_bytes = sum(part.found["n_bytes"] + RECORD_BYTES * part.found["n_documents"] for part in done)
        self._n_bands = sum(part.found["n_bands"] for part in done)
        if not any(part.found["n_documents"] for part in done):
            counts = self.account.counts.items()
            left_out = [f"{count:,} {reason}: {self.account.named[reason][0]}" for reason, count in counts]
            why = "; ".join([*left_out, reasons_of(self.ledger)])
            raise UserError(f"the sources hold no usable document; left out: {why}")
        scores = np.zeros(SCORES, np.int64)
        for part in done if curation.classifier else ():
            each, counts_of = np.load(part.folder / "scores.npy")
            scores[each] += counts_of
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
        # What is one shard for the most part is encoded here: the tokenizer uses all cores of one process.
        alone = 2 * max(task.size for task in tasks) > sum(task.size for task in tasks)
        done = self._do("encoding", tasks, alone=alone)
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
