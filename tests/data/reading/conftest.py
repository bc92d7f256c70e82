"""Sources read to their end: the texts by their keys, and the account of what was left out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from moray.data.reading.account import Account
from moray.data.reading.documents import read_documents
from moray.data.reading.rules import Rules


class Outcome(NamedTuple):
    texts: dict[str, str]
    account: Account

    def lost(self, reason: str) -> list[str]:
        """What was left out for a reason, in words, by the file's name instead of its path."""
        losses = self.account.named.get(reason, [])  # type: ignore[call-overload]
        assert self.account.counts[reason] == len(losses)  # type: ignore[index]
        return [str(loss).rpartition("/")[2] if loss.place.startswith("/") else str(loss) for loss in losses]


@pytest.fixture
def read() -> Callable[..., Outcome]:
    def reading(*sources: str | Path, **rules: Any) -> Outcome:
        account = Account(Rules(**rules))
        documents = list(read_documents(sources, account))
        texts = {document.key: document.text for document in documents}
        assert len(texts) == len(documents)
        return Outcome(texts, account)

    return reading
