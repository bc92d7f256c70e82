"""A shard of a split out of the buckets of the shuffle."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import tee
from pathlib import Path
from typing import Any

import numpy as np

from moray.data.chat.templates import chat_template_of
from moray.data.index import Kind
from moray.data.preparation.bucket import read_bucket
from moray.data.preparation.dialogues import write_dialogues
from moray.data.preparation.drops import ledger_of
from moray.data.preparation.ledger import KEPT, Ledger, Sample, excerpt
from moray.data.preparation.profile import Profile
from moray.data.preparation.progress import tick
from moray.data.preparation.runs import Record, Run
from moray.data.shards import SplitWriter
from moray.data.tokenizer import load_tokenizer

NO_LIMIT = 1 << 62


@dataclass(frozen=True)
class EncodeShard:
    """The documents of some buckets that are in a split -> `SPLIT-number.tar` and the arrays that describe it.

    limit: documents whose side is below it are for validation. tokenizer: its folder. keep_drops: what
    the template drops is listed.
    """

    out: Path
    buckets: tuple[Path, ...]
    runs: tuple[Run, ...]
    labels: tuple[str, ...]
    tokenizer: Path
    kind: Kind
    split: str
    number: int
    limit: int
    keep_drops: bool
    size: int = 1

    def run(self, folder: Path) -> dict[str, Any]:
        profile = Profile()
        with ledger_of(folder, self.keep_drops) as ledger:
            highest_id = self._write(folder, ledger, profile)
        return {"ledger": ledger.as_json(), "highest_id": highest_id, "profile": profile.as_json()}

    def _write(self, folder: Path, ledger: Ledger, profile: Profile) -> int:

        def leave_out(record: Record, why: str) -> None:
            label, n_bytes, key = self.labels[record.source], len(record.text), record.key.decode()
            ledger.count(label, KEPT, "", -n_bytes, -1)
            sample = Sample(record.digest.hex(), key, why, excerpt(record.text.decode()))
            ledger.drop(label, "template", "not written by the chat template", n_bytes, sample)

        writer = SplitWriter(folder, self.split, shard_tokens=NO_LIMIT, kind=self.kind, first=self.number)
        try:
            records = self._records(ledger)
            if self.kind == "text":
                self._write_texts(records, writer)
            else:
                template = chat_template_of(self.tokenizer)
                write_dialogues(records, self.kind, template, writer, profile, leave_out)
            writer.finish()
        finally:
            writer.close()
        return writer.highest_id

    def _records(self, ledger: Ledger) -> Iterator[Record]:
        for bucket in self.buckets:
            for record in read_bucket(of_split(bucket, self.split, self.limit), self.runs):
                ledger.count(self.labels[record.source], KEPT, "", len(record.text))
                tick(len(record.text))
                yield record

    def _write_texts(self, records: Iterator[Record], writer: SplitWriter) -> None:
        tokenizer = load_tokenizer(self.tokenizer)
        records, again = tee(records)  # one of them is ahead by what is encoded at a time
        encoded = tokenizer.encode_documents(record.text.decode() for record in again)
        for record, tokens in zip(records, encoded, strict=True):
            writer.add(record.key.decode(), tokens)


def of_split(bucket: Path, split: str, limit: int) -> np.ndarray:
    """What of a bucket is in a split; ORDER."""
    order = np.load(bucket / "order.npy")
    return order[(order["side"] < limit) == (split == "validation")]
