"""What is said of one check: all is well, or what is wrong and what to do about it."""

from collections.abc import Iterable
from typing import Literal

from moray.jobs.doctor.facts import Frozen

Level = Literal["ok", "note", "bad"]
GIB = 2**30


class Verdict(Frozen):
    """note: a run works, but slower than it could, or others trip over it. bad: to be mended first."""

    check: str
    level: Level
    says: str


def check(name: str, all_is_well: str, findings: Iterable[tuple[Level, str]]) -> list[Verdict]:
    """One verdict a finding; where there is none, that all is well."""
    found = [Verdict(check=name, level=level, says=says) for level, says in findings]
    return found or [Verdict(check=name, level="ok", says=all_is_well)]


def listed(names: Iterable[str]) -> str:
    """Names for a line; of very many the first few."""
    found = list(names)
    return ", ".join(found) if len(found) <= 8 else f"{', '.join(found[:8])} and {len(found) - 8} more"
