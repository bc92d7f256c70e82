"""What is done to each document by itself: cleaned, held against rules and benchmarks, scored, and its bands formed.

A document that breaks a rule, gives an evaluation away or is too bad is dropped before it is compared with others: the
better one of two near-duplicates must not be lost to one that goes itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from moray.data.curation.classifier import Classifier
from moray.data.curation.cleaning import Cleaning, clean
from moray.data.curation.contamination import Benchmarks
from moray.data.curation.minhash import NO_KEY, band_keys, signatures
from moray.data.curation.rules import Rule, judge
from moray.data.curation.words import Words, folded
from moray.data.preparation.ledger import Ledger, Sample, excerpt
from moray.data.preparation.runs import digest_of
from moray.data.reading.documents import Document


@dataclass(frozen=True)
class Curation:
    """What is asked of documents.

    bands: bands and rows of MinHash. classifier: its file. benchmarks: that of `save_benchmarks`.
    """

    cleaning: Cleaning | None = None
    rules: tuple[Rule, ...] = ()
    bands: tuple[int, int] | None = None
    classifier: Path | None = None
    benchmarks: Path | None = None

    @property
    def needs_folded(self) -> bool:
        return any((self.bands, self.classifier, self.benchmarks))


@dataclass(frozen=True, eq=False)
class Curated:
    """A document that stays so far, its score (0 to 65,535; 0 without a classifier) and its bands' keys, uint64."""

    document: Document
    score: int = 0
    bands: np.ndarray | None = None


def curate(documents: Sequence[Document], how: Curation, seed: int, label: str, ledger: Ledger) -> list[Curated]:
    """Those of some documents of source `label` that stay; the others are in the ledger."""

    def drop(document: Document, stage: str, reason: str, value: str) -> None:
        ledger.drop(label, stage, reason, _size(document.text), sample_of(document, seed, value))

    if how.cleaning:
        documents = _cleaned(documents, how.cleaning, seed, label, ledger)
    if how.rules:
        verdicts = judge([document.text for document in documents], how.rules)
        for document, verdict in zip(documents, verdicts, strict=True):
            if verdict:
                drop(document, "rules", verdict.rule, f"{verdict.value:.4g}, must be {verdict.bound}")
        documents = [each for each, verdict in zip(documents, verdicts, strict=True) if verdict is None]
    if not how.needs_folded or not documents:
        return [Curated(document) for document in documents]
    words = Words.of([folded(document.text) for document in documents])
    stays = np.ones(len(documents), bool)
    if how.benchmarks:
        benchmarks = _benchmarks(how.benchmarks)
        stays = benchmarks.found(words) == 0
        for number in np.flatnonzero(~stays).tolist():
            text = documents[number].text
            drop(documents[number], "benchmarks", "run of words of an evaluation", benchmarks.example(text))
    scores = _classifier(how.classifier).score(words) if how.classifier else np.zeros(len(documents), np.uint16)
    keys = band_keys(signatures(words), *how.bands) if how.bands else None
    return [
        Curated(documents[n], int(scores[n]), None if keys is None else keys[n][keys[n] != NO_KEY])
        for n in np.flatnonzero(stays).tolist()
    ]


def _cleaned(documents: Sequence[Document], how: Cleaning, seed: int, label: str, ledger: Ledger) -> list[Document]:
    cleaned = []
    for document in documents:
        text, taken = clean(document.text, how)
        if not text:
            sample = sample_of(document, seed, f"of {len(document.text):,} characters")
            ledger.drop(label, "cleaning", "nothing left", _size(document.text), sample)
            continue
        for step, n_bytes in taken.items():
            ledger.clean(label, step, n_bytes)
        cleaned.append(replace(document, text=text))
    return cleaned


def sample_of(document: Document, seed: int, value: str) -> Sample:
    key = document.key.encode("utf-8", "replace").decode()  # names of files may be no UTF-8
    return Sample(digest_of(document.text, seed).hex(), key, value, excerpt(document.text))


def _size(text: str) -> int:
    return len(text.encode())


def save_benchmarks(benchmarks: Benchmarks, path: Path) -> None:
    """For other processes: they need not read the task files again."""
    np.savez(path, hashes=benchmarks.hashes, lengths=np.array(benchmarks.lengths, np.int64))


@lru_cache(maxsize=1)
def _benchmarks(path: Path) -> Benchmarks:
    with np.load(path) as arrays:
        return Benchmarks(arrays["hashes"], tuple(arrays["lengths"].tolist()), 0, 0)


@lru_cache(maxsize=1)
def _classifier(path: Path) -> Classifier:
    return Classifier.load(path)
