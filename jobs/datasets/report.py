"""What became of the documents, as `report.json` in the dataset and as lines on a terminal."""

from collections.abc import Mapping
from typing import Any

from moray.data.preparation.ledger import KEPT, READ, Ledger

REPORT = "report.json"


def lines_of(ledger: Ledger) -> list[str]:
    """A line a reason, and what was read and kept."""
    lines = [f"{'read':<10} {_amount(*ledger.total(READ))}"]
    for stage, reason, n_documents, n_bytes in ledger.dropped():
        what = stage if stage.endswith("duplicates") else f"{stage}: {reason}"
        lines.append(f"{'dropped':<10} {n_documents:,} {what}" + (f", {_size(n_bytes)}" if n_bytes else ""))
    if cleaned := sum(ledger.cleaned.values()):
        steps = sorted({step for _, step in ledger.cleaned})
        parts = (f"{step} {_size(sum(n for (_, s), n in ledger.cleaned.items() if s == step))}" for step in steps)
        lines.append(f"{'cleaned':<10} {_size(cleaned)} taken away: {', '.join(parts)}")
    lines.append(f"{'kept':<10} {_amount(*ledger.total(KEPT))}")
    return lines


def as_json(ledger: Ledger, plan: Mapping[str, Any]) -> dict[str, Any]:
    """The ledger with the settings that it came of: the same for the same documents in whatever order."""
    return {"settings": dict(plan), **ledger.as_json()}


def _amount(n_documents: int, n_bytes: int) -> str:
    return f"{n_documents:,} documents, {_size(n_bytes)}"


def _size(n_bytes: int) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(n_bytes) >= size:
            return f"{n_bytes / size:,.1f} {unit}"
    return f"{n_bytes:,} bytes"
