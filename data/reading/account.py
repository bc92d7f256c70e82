"""The one place where what is left out is counted, named and limited."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from moray import UserError
from moray.data.reading.records import Loss, Reason
from moray.data.reading.rules import Rules

NAMED = 10


@dataclass
class Account:
    """What reading left out: how many for each reason, and the first few by name (memory stays bounded).

    n_records: those that were met, good or bad but for their format.
    """

    rules: Rules
    counts: Counter[Reason] = field(default_factory=Counter)
    named: dict[Reason, list[Loss]] = field(default_factory=dict)
    n_records: int = 0

    def note(self, loss: Loss) -> None:
        """Counts a loss. Raises UserError for the bad record that is one too many."""
        self.counts[loss.reason] += 1
        named = self.named.setdefault(loss.reason, [])
        if len(named) < NAMED:
            named.append(loss)
        self._check(loss)

    def add(self, other: "Account") -> None:
        """Counts what another reading left out. Raises UserError as `note` does."""
        self.n_records += other.n_records
        for reason, losses in other.named.items():
            self.counts[reason] += other.counts[reason]
            named = self.named.setdefault(reason, [])
            named += losses[: NAMED - len(named)]
            self._check(losses[-1])

    def _check(self, newest: Loss) -> None:
        if newest.reason is Reason.BAD and self.counts[Reason.BAD] > self.rules.max_bad:
            first, *others = self.named[Reason.BAD]
            begin = f", {first.place} the first" if others else ""
            limit = f"more than max_bad={self.rules.max_bad} records are bad{begin}"
            raise UserError(f"{newest}; {limit}; mend them, or bear more by --max-bad")

    def damaged(self, path: Path | str, why: str) -> None:
        """Counts a file that cannot be read, or not to its end. Raises UserError unless such are to be skipped."""
        loss = Loss(Reason.DAMAGED, str(path), why)
        if self.rules.on_damage == "stop":
            raise UserError(f"{loss}; mend or remove it, or go on without such files by --on-damage skip")
        self.note(loss)

    def lines(self) -> list[str]:
        """What was left out and what was changed, in words."""
        lines = []
        for reason, count in self.counts.items():
            named = self.named[reason]
            lines.append(f"{'left out' if reason is not Reason.CUT else 'changed':<10} {reason}: {count:,}")
            lines += [f"{'':<12}{loss}" for loss in named]
            lines += [f"{'':<12}and {count - len(named):,} more"] if count > len(named) else []
        return lines
