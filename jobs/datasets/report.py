"""What became of the documents: `report.json` and `report.html` in the dataset, and lines on a terminal."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moray.data.preparation.ledger import KEPT, READ, Ledger
from moray.data.preparation.read import NOT_DOCUMENTS
from moray.data.reading.account import Account
from moray.jobs.datasets.page import PAGE, render
from moray.jobs.datasets.table import size, table_of, what_of

REPORT = "report.json"


def write_reports(folder: Path, ledger: Ledger, settings: Mapping[str, Any], account: Account) -> None:
    """The ledger with the settings that it came of: the same for the same documents in whatever order.

    Of what is no document, files that were damaged or not read, their numbers alone: places differ between machines.
    """
    files = {reason: count for reason, count in sorted(account.counts.items()) if reason in NOT_DOCUMENTS}
    report = {"settings": dict(settings), "files and texts": files, **ledger.as_json()}
    content = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    (folder / REPORT).write_text(content, encoding="utf-8")
    (folder / PAGE).write_text(render(ledger, settings))


def lines_of(ledger: Ledger) -> list[str]:
    """A table, or where nothing was dropped or cleaned one line."""
    if any(ledger.dropped()) or any(ledger.cleaned.values()):
        return table_of(ledger)
    return [f"{'kept':<10} all that was read: {_amount(*ledger.total(KEPT))}"]


def reasons_of(ledger: Ledger) -> str:
    """What was read and why it was dropped, in one line."""
    reasons = [f"{n_documents:,} {what_of(stage, reason)}" for stage, reason, n_documents, _ in ledger.dropped()]
    return f"read {_amount(*ledger.total(READ))}" + (f"; dropped {', '.join(reasons)}" if reasons else "")


def _amount(n_documents: int, n_bytes: int) -> str:
    return f"{n_documents:,} documents, {size(n_bytes)}"
