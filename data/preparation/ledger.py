"""What became of every document: read = kept + dropped by stage and reason, in documents and bytes, by source.

Ledgers of parts are added up in any order and give the same one: counts are sums, and of the samples those with the
smallest digests stay.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

SAMPLES = 20
EXCERPT = 100  # characters

READ, KEPT = "read", "kept"
STAGES = (
    "reading",
    "cleaning",
    "rules",
    "benchmarks",
    "quality",
    "exact duplicates",
    "near-duplicates",
    "paragraphs",
    "template",
)
"""Where documents may be dropped, in the order in which they come there."""


@dataclass(frozen=True, order=True, slots=True)
class Sample:
    """A document that was dropped. value: what was measured of it; kept: the key of the one that stayed for it."""

    digest: str
    key: str
    value: str
    excerpt: str
    kept: str = ""


@dataclass
class Ledger:
    """documents, bytes: by (source, stage, reason), with READ and KEPT as stages of their own; bytes are UTF-8.

    cleaned: bytes that cleaning and the dropping of paragraphs took away, by (source, step). samples: by (stage,
    reason). tell: hears of each document that is dropped: source, stage, reason, bytes and sample.
    """

    documents: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    bytes: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    cleaned: Counter[tuple[str, str]] = field(default_factory=Counter)
    samples: dict[tuple[str, str], list[Sample]] = field(default_factory=dict)
    tell: Callable[[str, str, str, int, Sample], None] | None = field(default=None, repr=False, compare=False)

    def count(self, source: str, stage: str, reason: str, n_bytes: int, n_documents: int = 1) -> None:
        self.documents[source, stage, reason] += n_documents
        self.bytes[source, stage, reason] += n_bytes

    def drop(self, source: str, stage: str, reason: str, n_bytes: int, sample: Sample) -> None:
        self.count(source, stage, reason, n_bytes)
        self.show(stage, reason, [sample])
        if self.tell:
            self.tell(source, stage, reason, n_bytes, sample)

    def show(self, stage: str, reason: str, samples: list[Sample]) -> None:
        held = self.samples.setdefault((stage, reason), [])
        held += samples
        if len(held) > SAMPLES:
            held.sort()
            del held[SAMPLES:]

    def clean(self, source: str, step: str, n_bytes: int) -> None:
        self.cleaned[source, step] += n_bytes

    def add(self, other: "Ledger") -> None:
        for mine, theirs in (
            (self.documents, other.documents),
            (self.bytes, other.bytes),
            (self.cleaned, other.cleaned),
        ):
            mine.update(theirs)  # type: ignore[arg-type]
        for (stage, reason), samples in other.samples.items():
            self.show(stage, reason, samples)

    def sources(self) -> list[str]:
        return sorted({source for source, _, _ in self.documents})

    def total(self, stage: str, source: str | None = None) -> tuple[int, int]:
        """Documents and bytes of a stage, of one source or of all."""
        keys = [key for key in self.documents if key[1] == stage and source in (None, key[0])]
        return sum(self.documents[key] for key in keys), sum(self.bytes[key] for key in keys)

    def dropped(self) -> Iterator[tuple[str, str, int, int]]:
        """Stage, reason, documents and bytes of all that was dropped, of all sources, in the order of the stages."""
        found: Counter[tuple[str, str]] = Counter()
        n_bytes: Counter[tuple[str, str]] = Counter()
        for (_, stage, reason), count in self.documents.items():
            if stage not in (READ, KEPT):
                found[stage, reason] += count
                n_bytes[stage, reason] += self.bytes[_, stage, reason]
        for stage, reason in sorted(found, key=lambda key: (STAGES.index(key[0]), key[1])):
            if found[stage, reason]:
                yield stage, reason, found[stage, reason], n_bytes[stage, reason]

    def check(self) -> None:
        """Raises AssertionError where what was read is not what was kept and dropped: of each source, to the byte."""
        for source in self.sources():
            read, kept = self.total(READ, source), self.total(KEPT, source)
            stages = [self.total(stage, source) for stage in STAGES]
            cleaned = sum(count for (of, _), count in self.cleaned.items() if of == source)
            documents = read[0] - kept[0] - sum(stage[0] for stage in stages)
            n_bytes = read[1] - kept[1] - sum(stage[1] for stage in stages) - cleaned
            assert (documents, n_bytes) == (0, 0), f"{source}: {documents} documents, {n_bytes} bytes without account"

    def as_json(self) -> dict[str, Any]:
        return {
            "documents": [[*key, count, self.bytes[key]] for key, count in sorted(self.documents.items())],
            "cleaned": [[*key, count] for key, count in sorted(self.cleaned.items())],
            "samples": [
                [*key, [[s.digest, s.key, s.value, s.excerpt, s.kept] for s in sorted(samples)[:SAMPLES]]]
                for key, samples in sorted(self.samples.items())
            ],
        }

    @classmethod
    def of_json(cls, content: dict[str, Any]) -> "Ledger":
        ledger = cls()
        for source, stage, reason, count, n_bytes in content["documents"]:
            ledger.count(source, stage, reason, n_bytes, count)
        for source, step, count in content["cleaned"]:
            ledger.clean(source, step, count)
        for stage, reason, samples in content["samples"]:
            ledger.show(stage, reason, [Sample(*sample) for sample in samples])
        return ledger


def excerpt(text: str) -> str:
    """The begin of a text, in one line."""
    return " ".join(text[: 2 * EXCERPT].split())[:EXCERPT]
