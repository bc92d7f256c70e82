"""`moray quality train`: good and bad documents in, a classifier out, and how well it tells them apart."""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moray import UserError
from moray.data.curation.classifier import Classifier, about_of
from moray.data.curation.learning import train_classifier
from moray.data.reading.account import Account
from moray.data.reading.documents import read_documents
from moray.data.reading.rules import Rules


@dataclass(frozen=True)
class Trained:
    """A classifier, where it is, and what it was made of."""

    classifier: Classifier
    path: Path
    n_bytes: int  # of text, UTF-8
    seconds: float
    accounts: tuple[Account, Account]  # of reading the good and the bad

    def __str__(self) -> str:
        found = self.classifier
        lines = [
            f"{name:<10} {trained:,} documents learnt, {kept:,} held out"
            for name, trained, kept in zip(("good", "bad"), found.n_trained, found.n_held_out, strict=True)
        ]
        for account in self.accounts:
            lines += account.lines()
        lines.append(f"{'AUC':<10} {found.auc:.4f} of those held out (1: all told apart; 0.5: by chance)")
        speed = f"{self.n_bytes / 1e6 / self.seconds:.1f} MB/s"
        lines.append(f"{'where':<10} {self.path} ({self.n_bytes / 1e6:.1f} MB, {self.seconds:.1f} s, {speed})")
        lines.append(f"{'identity':<10} {found.fingerprint}")
        return "\n".join(lines)


def train_quality(
    good: Sequence[str | Path],
    bad: Sequence[str | Path],
    out: Path,
    *,
    held_out: float,
    seed: int,
    overwrite: bool,
    reading: Rules,
) -> Trained:
    """Trains on the documents of sources (see `data.reading`) and writes the file `out`, which appears whole.

    Memory: see `train_classifier`. Raises UserError for sources that cannot be read or hold fewer than two different
    documents, for a bad setting, and for an `out` that cannot be, is there already (unless `overwrite`) or is no
    classifier.
    """
    _check_free(out, overwrite)
    for name, sources in (("good", good), ("bad", bad)):
        if not sources:
            raise UserError(f"{name} names no source; give files or folders, for example --{name} {name}.jsonl.gz")
    started, sizes = time.monotonic(), [0]
    accounts = Account(reading), Account(reading)
    texts = [_texts(sources, account, sizes) for sources, account in zip((good, bad), accounts, strict=True)]
    classifier = train_classifier(*texts, seed=seed, held_out=held_out)
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(classifier.to_bytes())
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return Trained(classifier, out, sizes[0], time.monotonic() - started, accounts)


def _check_free(out: Path, overwrite: bool) -> None:
    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"out={out} must be a file in a folder that exists")
    if out.exists():
        about_of(out)  # anything but a classifier stays, whatever is said
        if not overwrite:
            raise UserError(f"out={out} already holds a classifier; choose another file, or replace it by --overwrite")


def _texts(sources: Sequence[str | Path], account: Account, sizes: list[int]) -> Iterator[str]:
    """The texts of the sources, whose bytes are added to the one size."""
    for document in read_documents(sources, account):
        sizes[0] += len(document.text.encode())
        yield document.text
