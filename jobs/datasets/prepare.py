"""`moray prepare`: text in, a dataset out. Read and scatter, shuffle, make the tokenizer, encode into shards, commit.

All of it happens in `OUT.moray-unfinished`, which a killed run leaves and the next one clears; OUT appears whole.
"""

import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import tee
from pathlib import Path
from typing import Literal, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from moray import UserError
from moray.data.chat.jinja_template import CHAT_TEMPLATE
from moray.data.chat.templates import chat_template_of
from moray.data.dataset import Dataset
from moray.data.index import Kind, write_index
from moray.data.reading.account import Account
from moray.data.reading.documents import read_documents
from moray.data.reading.rules import Rules
from moray.data.shards import SplitWriter
from moray.data.shuffle import Record, ShuffledCorpus, scatter, sort
from moray.data.special_tokens import add_stop
from moray.data.staging import staged_folder
from moray.data.tokenizer import Tokenizer, check_vocab_size, copy_tokenizer, load_tokenizer, train_tokenizer
from moray.jobs.datasets.dialogues import texts, write_dialogues
from moray.jobs.datasets.profile import Profile

# The first documents of the shuffled training split are a random sample; more text than this moves few merges.
TOKENIZER_SAMPLE_BYTES = 16 << 20

T = TypeVar("T")
Dedup = Literal["auto", "exact", "none"]
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
    n_duplicates: int
    account: Account  # of what was read
    n_bytes: int  # of distinct text, UTF-8
    seconds: float
    profile: Profile | None = None  # of dialogues and pairs

    @property
    def bytes_per_token(self) -> float:
        return self.n_bytes / sum(split.n_tokens for split in self.dataset.splits.values())

    def __str__(self) -> str:
        what = NAMES[self.dataset.kind]
        lines = [
            f"{name:<10} {split.n_documents:,} {what}, {split.n_tokens:,} tokens, {len(split)} shard(s)"
            for name, split in self.dataset.splits.items()
        ]
        # Of other kinds the bytes are those of JSON.
        per_token = f", {self.bytes_per_token:.2f} bytes a token" if self.dataset.kind == "text" else ""
        lines.append(f"{'tokenizer':<10} {self.vocab_size:,} entries{per_token}")
        lines += self.profile.lines() if self.profile else []
        lines.append(f"{'dropped':<10} {self.n_duplicates:,} exact duplicates")
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
    console: Console | None = None,
) -> Summary:
    """Prepares the sources (see `data.reading`) as a dataset in the folder `out`.

    A tokenizer of `vocab_size` entries is trained on the training split, or taken from the folder `tokenizer`.
    `validation` is the share of documents held out, by hash of their key and text; of dialogues, by hash of the first
    thing that a user says. `dedup`: equal documents are kept once (exact) or all (none); auto: once, of text alone.
    The same documents, seed and settings give the same bytes. Memory, whatever the sources: see docs/datasets.md; disk:
    twice the text.
    Raises UserError for a bad setting, source or folder, a damaged source, and a full disk.
    """
    started = time.monotonic()
    if not 0 < validation < 1:
        raise UserError(f"validation={validation} must lie between 0 and 1, for example 0.01")
    own = None if tokenizer is None else Path(tokenizer)
    # What can be wrong is found out before the reading, not after it.
    reading = reading or Rules()
    if own:
        _ = chat_template_of(own) if reading.kind != "text" else load_tokenizer(own)
    else:
        check_vocab_size(vocab_size)
    console = console or Console(stderr=True)
    account = Account(reading)
    profile = None if reading.kind in ("text", "prompts") else Profile()
    documents = read_documents(sources, account)
    keep_equal = dedup == "none" or (dedup == "auto" and reading.kind != "text")
    with staged_folder(Path(out), overwrite=overwrite) as folder:
        with _progress(console) as progress:
            scratch = folder / "scratch"
            with _phase(progress, "reading", documents) as documents:
                scatter(documents, scratch, seed)
            with _phase(progress, "shuffling", sort(scratch, keep_equal=keep_equal), unit="buckets") as sorting:
                corpus = _last(sorting, account)
            limit = corpus.validation_limit(validation)
            with _phase(progress, "tokenizer", _tokenizer_sample(corpus, limit, reading.kind)) as sample:
                words = train_tokenizer(sample, folder, vocab_size) if own is None else copy_tokenizer(own, folder)
            with _phase(progress, "encoding", corpus, corpus.n_documents) as records:
                _encode(records, words, folder, limit, account, profile)
        shutil.rmtree(scratch)
    seconds = time.monotonic() - started
    counted = words.vocab_size, corpus.n_duplicates, account, corpus.n_bytes
    summary = Summary(Dataset.open(out), *counted, seconds, profile)
    console.print(str(summary), highlight=False, markup=False, soft_wrap=True)  # names may hold [brackets]
    return summary


def _last(sorting: Iterator[ShuffledCorpus], account: Account) -> ShuffledCorpus:
    last = deque(sorting, maxlen=1)
    if not last:
        left_out = ", ".join(
            f"{count:,} {reason}: {account.named[reason][0]}" for reason, count in account.counts.items()
        )
        raise UserError(f"the sources hold no usable document; left out: {left_out}")
    return last[0]


def _tokenizer_sample(corpus: ShuffledCorpus, limit: int, kind: Kind) -> Iterator[str]:
    n_bytes = 0
    for record in corpus:
        if n_bytes >= TOKENIZER_SAMPLE_BYTES:
            return
        if record.side >= limit:
            n_bytes += len(record.text)
            yield from [record.text.decode()] if kind == "text" else texts(record)


def _encode(
    records: Iterable[Record],
    tokenizer: Tokenizer,
    folder: Path,
    limit: int,
    account: Account,
    profile: Profile | None,
) -> None:
    """Writes the shards of both splits and, last, the index."""
    kind = account.rules.kind
    train, validation = (SplitWriter(folder, name, kind=kind) for name in ("train", "validation"))
    with closing(train), closing(validation):

        def writer_of(record: Record) -> SplitWriter:
            return validation if record.side < limit else train

        if kind == "text":
            _encode_texts(records, tokenizer, writer_of)
        else:
            template = chat_template_of(folder)
            (folder / CHAT_TEMPLATE).write_text(template.jinja)
            if template.turn_end is not None:  # a base model's folder names the end of its documents alone
                add_stop(folder, tokenizer.stop_ids, template.turn_end)
            write_dialogues(records, kind, template, writer_of, profile or Profile(), account)
        splits = {"train": train.finish(), "validation": validation.finish()}
    if empty := [name for name, split in splits.items() if not len(split)]:
        raise UserError(f"no {NAMES[kind]} are left for the {empty[0]} split: " + "; ".join(account.lines()))
    # An embedding needs a row for what the data holds, whatever else the tokenizer knows; any token can pad.
    vocab_size = 1 + max(train.highest_id, validation.highest_id)
    pad_id = tokenizer.pad_id if tokenizer.pad_id < vocab_size else tokenizer.eos_id
    write_index(folder, vocab_size, pad_id, splits, kind)


def _encode_texts(records: Iterable[Record], tokenizer: Tokenizer, writer_of: Callable[[Record], SplitWriter]) -> None:
    records, again = tee(records)  # one of them is ahead by what is encoded at a time
    for record, tokens in zip(records, tokenizer.encode_documents(r.text.decode() for r in again), strict=True):
        writer_of(record).add(record.key.decode(), tokens)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<10}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} {task.fields[unit]}"),
        TimeElapsedColumn(),
        console=console,
    )


@contextmanager
def _phase(
    progress: Progress, name: str, items: Iterable[T], total: int | None = None, unit: str = "documents"
) -> Iterator[Iterator[T]]:
    """A line of progress that counts the items taken and stands still when the block ends."""
    task = progress.add_task(name, total=total, unit=unit)
    yield iter(progress.track(items, total=total, task_id=task))
    done = progress.tasks[task].completed
    progress.update(task, total=done, completed=done)
