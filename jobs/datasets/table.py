"""What became of the documents, as a table of some twenty lines on a terminal."""

from collections.abc import Sequence

from moray.data.preparation.ledger import KEPT, READ, Ledger

MOST_REASONS = 14
MOST_SOURCES = 6
LABEL = 44  # characters of the first column, at most

Row = tuple[str, str, str, str]


def table_of(ledger: Ledger) -> list[str]:
    """What was read, a line a reason, what was cleaned and kept; and of a few sources what is left of each.

    Shares are of the bytes that were read.
    """
    read = ledger.total(READ)
    rows = [("", "documents", "bytes", "share"), _row("read", read, read[1]), *_reasons(ledger, read[1])]
    for step in sorted({step for _, step in ledger.cleaned}):
        n_bytes = sum(count for (_, of), count in ledger.cleaned.items() if of == step)
        if n_bytes:
            rows.append(("  cleaned: " + step, "", size(n_bytes), share(n_bytes, read[1])))
    rows.append(_row("kept", ledger.total(KEPT), read[1]))
    sources = ledger.sources()
    if 2 <= len(sources) <= MOST_SOURCES:
        rows += [
            _row(f"  of {source}", ledger.total(KEPT, source), ledger.total(READ, source)[1]) for source in sources
        ]
    return _aligned(rows)


def share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else ""


def size(n_bytes: int) -> str:
    for unit, least in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(n_bytes) >= least:
            return f"{n_bytes / least:,.1f} {unit}"
    return f"{n_bytes:,} bytes"


def what_of(stage: str, reason: str) -> str:
    """A stage and a reason in a few words."""
    return stage if stage.endswith("duplicates") else f"{stage}: {reason}"


def _reasons(ledger: Ledger, n_read: int) -> list[Row]:
    """In the order of the stages; of many the most frequent ones, and the rest in one row."""
    dropped = list(ledger.dropped())
    shown = sorted(dropped, key=lambda each: -each[2])[:MOST_REASONS]
    rows = [
        _row(f"  {what_of(stage, reason)}", (n_documents, n_bytes), n_read)
        for stage, reason, n_documents, n_bytes in dropped
        if (stage, reason, n_documents, n_bytes) in shown
    ]
    rest = [each for each in dropped if each not in shown]
    if rest:
        n_documents, n_bytes = sum(each[2] for each in rest), sum(each[3] for each in rest)
        rows.append(_row(f"  {len(rest)} rarer reasons (report.html)", (n_documents, n_bytes), n_read))
    return rows


def _row(label: str, amount: tuple[int, int], n_read: int) -> Row:
    n_documents, n_bytes = amount
    return label, f"{n_documents:,}", size(n_bytes) if n_bytes else "", share(n_bytes, n_read) if n_bytes else ""


def _aligned(rows: Sequence[Row]) -> list[str]:
    rows = [(_short(label), *cells) for label, *cells in rows]  # type: ignore[misc]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]


def _short(label: str) -> str:
    return label if len(label) <= LABEL else label[: LABEL // 2] + "…" + label[1 - LABEL // 2 :]
