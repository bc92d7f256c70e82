"""Reads a part of the sources: what is good of it, as runs of documents; what is not, in the ledger."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moray.data.preparation.batches import batches
from moray.data.preparation.curate import Curation, curate
from moray.data.preparation.drops import ledger_of
from moray.data.preparation.ledger import READ, Ledger, Sample
from moray.data.preparation.progress import tick
from moray.data.preparation.runs import RunWriter, digest_of, record_of
from moray.data.reading.account import Account
from moray.data.reading.documents import Document, read_piece
from moray.data.reading.pieces import PIECE_BYTES, Piece, pieces_of
from moray.data.reading.records import Loss, Reason
from moray.data.reading.rules import Rules
from moray.data.reading.sources import Source, SourceFile

NOT_DOCUMENTS = (Reason.UNREAD, Reason.DAMAGED, Reason.CUT)
MOST_PIECES = 1000  # of a part: of small files there may be many


def parts_of(source: Source) -> Iterator[tuple[Piece, ...]]:
    """The files of a source in parts of about PIECE_BYTES: pieces of large ones, several small ones together."""
    part: list[Piece] = []
    for file in source.files:
        for piece in pieces_of(file):
            is_full = sum(held.size for held in part) + piece.size > PIECE_BYTES or len(part) == MOST_PIECES
            if part and (is_full or piece.range):
                yield tuple(part)
                part = []
            part.append(piece)
            if piece.range:  # others read the rest of the file meanwhile
                yield tuple(part)
                part = []
    if part:
        yield tuple(part)


@dataclass(frozen=True)
class ReadPart:
    """A part of the source named `label` -> runs.

    curation: what is done to each document. seed: of the shuffle. run_bytes: of text held in memory.
    keep_drops: what is dropped is listed. keep_equal: equal texts all stay.
    """

    out: Path
    pieces: tuple[Piece, ...]
    label: str
    rules: Rules
    curation: Curation
    seed: int
    run_bytes: int
    keep_drops: bool
    keep_equal: bool = True

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)

    def run(self, folder: Path) -> dict[str, Any]:
        # A list of what is dropped needs the name of each copy.
        counts_copies = not (self.keep_equal or self.keep_drops)
        has_bands = self.curation.bands is not None
        writer = RunWriter(folder, self.run_bytes, has_bands=has_bands, counts_copies=counts_copies)
        scores: Counter[int] = Counter()
        with ledger_of(folder, self.keep_drops) as ledger:
            account = _Account(self.rules, ledger=ledger, label=self.label, seed=self.seed)
            for batch in batches(self._documents(account, ledger), lambda document: len(document.text)):
                for each in curate(batch, self.curation, self.seed, self.label, ledger):
                    writer.add(record_of(each.document, self.seed, each.score, each.bands))
                    scores[each.score] += 1
        writer.flush()
        if self.curation.classifier:
            np.save(folder / "scores.npy", np.array([[*scores], [*scores.values()]], np.int64))
        return {
            "ledger": ledger.as_json(),
            "account": account_as_json(account),
            "n_documents": writer.n_documents,
            "n_bytes": writer.n_bytes,
            "n_bands": writer.n_bands,
        }

    def _documents(self, account: "_Account", ledger: Ledger) -> Iterator[Document]:
        for piece in self.pieces:
            account.file = piece.file
            piece.file.check()
            for document in read_piece(piece, account, tick):
                ledger.count(self.label, READ, "", len(document.text.encode()))
                yield document


@dataclass
class _Account(Account):
    """Puts what is no usable document into the ledger too, named by what does not depend on where the source lies."""

    ledger: Ledger = field(kw_only=True)
    label: str = field(kw_only=True)
    seed: int = field(kw_only=True)
    file: SourceFile = field(init=False)

    def note(self, loss: Loss) -> None:
        super().note(loss)
        if loss.reason not in NOT_DOCUMENTS:
            key = loss.place.replace(str(self.file.path), self.file.key, 1).encode("utf-8", "replace").decode()
            why = loss.why.encode("utf-8", "replace").decode()
            self.ledger.count(self.label, READ, "", 0)
            self.ledger.drop(
                self.label, "reading", loss.reason, 0, Sample(digest_of(key, self.seed).hex(), key, why, "")
            )


def account_as_json(account: Account) -> dict[str, Any]:
    named = {reason: [[loss.place, loss.why] for loss in losses] for reason, losses in account.named.items()}
    return {"counts": dict(account.counts), "named": named, "n_records": account.n_records}


def account_of_json(content: dict[str, Any], rules: Rules) -> Account:
    named = {
        Reason(reason): [Loss(Reason(reason), *loss) for loss in losses] for reason, losses in content["named"].items()
    }
    counts = Counter({Reason(reason): count for reason, count in content["counts"].items()})
    return Account(rules, counts, named, content["n_records"])
