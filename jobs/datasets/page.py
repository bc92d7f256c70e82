"""`report.html` of a dataset: what became of its documents, as one page that needs nothing but itself.

The same ledger and settings give the same page.
"""

from collections.abc import Mapping
from importlib import resources
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from moray.data.preparation.ledger import KEPT, READ, STAGES, Ledger, Sample
from moray.jobs.datasets.table import share, size, what_of

PAGE = "report.html"
CUTTING = "paragraphs"
"""The one step, of those that take bytes away from documents that stay, that is a stage of its own."""
COLUMNS = {"document": "key", "measured": "value", "stays for it": "kept", "begins": "excerpt"}
"""Of the samples."""


class Left(NamedTuple):
    """What is left after a stage, and its shares of what was read, in percent."""

    stage: str
    documents: str
    bytes: str
    documents_share: float
    bytes_share: float


def render(ledger: Ledger, settings: Mapping[str, Any]) -> str:
    """The page, in ASCII: a browser reads references in any encoding."""
    files, style = resources.files("moray.jobs.datasets"), resources.files("moray.jobs.report") / "page.css"
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    n_read = ledger.total(READ)[1]
    sources = ledger.sources()
    html = page.from_string((files / "page.html").read_text()).render(
        style=Markup(style.read_text()),
        facts=_facts(ledger),
        funnels=[("all sources", funnel(ledger)), *((source, funnel(ledger, source)) for source in sources)]
        if len(sources) > 1
        else [(source, funnel(ledger, source)) for source in sources],
        reasons=[
            (what_of(stage, reason), f"{n_documents:,}", f"{n_bytes:,}", share(n_bytes, n_read))
            for stage, reason, n_documents, n_bytes in ledger.dropped()
        ],
        cleaned=[
            (source, step, f"{count:,}", share(count, ledger.total(READ, source)[1]))
            for (source, step), count in sorted(ledger.cleaned.items())
            if count
        ],
        samples=[
            (what_of(stage, reason), _columns(ledger.samples[stage, reason]), sorted(ledger.samples[stage, reason]))
            for stage, reason, _, _ in ledger.dropped()
            if ledger.samples.get((stage, reason))
        ],
        settings=[(name, _said(value)) for name, value in settings.items()],
    )
    return html.encode("ascii", "xmlcharrefreplace").decode()


def funnel(ledger: Ledger, source: str | None = None) -> list[Left]:
    """What is left after each stage that took something, of one source or of all."""
    read = n_documents, n_bytes = ledger.total(READ, source)
    left = [_left("read", read, read)]
    for stage in STAGES:
        documents, dropped = ledger.total(stage, source)
        cleaned = sum(
            count
            for (of, step), count in ledger.cleaned.items()
            if source in (None, of) and stage == (CUTTING if step == CUTTING else "cleaning")
        )
        n_documents, n_bytes = n_documents - documents, n_bytes - dropped - cleaned
        if documents or dropped or cleaned:
            left.append(_left(f"after {stage}", (n_documents, n_bytes), read))
    return [*left, _left(KEPT, ledger.total(KEPT, source), read)]


def _left(stage: str, amount: tuple[int, int], read: tuple[int, int]) -> Left:
    shares = [100 * part / whole if whole else 0.0 for part, whole in zip(amount, read, strict=True)]
    return Left(stage, f"{amount[0]:,}", size(amount[1]), *shares)


def _facts(ledger: Ledger) -> list[tuple[str, str, str]]:
    read, kept, cleaned = ledger.total(READ), ledger.total(KEPT), sum(ledger.cleaned.values())
    all_dropped = list(ledger.dropped())
    dropped = sum(n for _, _, n, _ in all_dropped), sum(n for _, _, _, n in all_dropped)
    return [
        ("read", f"{read[0]:,}", f"documents, {size(read[1])}"),
        ("kept", f"{kept[0]:,}", f"documents, {size(kept[1])}"),
        ("dropped", f"{dropped[0]:,}", f"documents, {size(dropped[1])}"),
        ("cleaned away", size(cleaned), "of documents that stay, or were dropped later"),
    ]


def _columns(samples: list[Sample]) -> list[tuple[str, str]]:
    """Heading and field of what some of the samples have."""
    return [(name, field) for name, field in COLUMNS.items() if any(getattr(one, field) for one in samples)]


def _said(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(_said, value)) or "none" if isinstance(value, list | tuple) else str(value)
