"""Which positions of the stream each step of a run was taken on: as it was recorded, or as it will be."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moray import UserError
from moray.jobs.training.metrics import read_steps


@dataclass(frozen=True)
class Taken:
    """What is known of a step: its positions [first, end), its loss, and what was skipped before it, with the reasons.

    is_recorded: metrics.jsonl has its row, which names the positions; else they follow from the steps before.
    """

    first: int
    end: int
    loss: float | None = None
    skipped: tuple[tuple[int, int, str], ...] = ()
    is_recorded: bool = True


@dataclass(frozen=True)
class History:
    """The steps of a run that are recorded, in order, in a run of so many steps of so many sequences."""

    run: Path
    taken: Mapping[int, Taken]
    steps: int
    global_batch: int

    @classmethod
    def read(cls, run: Path, steps: int, global_batch: int) -> "History":
        """Without steps that were undone. Memory: a few hundred bytes a step."""
        rows = read_steps(run, _taken)
        return cls(run, {step: taken for step, taken in rows.items() if taken}, steps, global_batch)

    def of_step(self, step: int) -> Taken:
        """Raises UserError for a step that the run does not have."""
        if not 1 <= step <= self.steps:
            raise UserError(f"--step {step} must lie between 1 and {self.steps}, the steps of {self.run} (train.steps)")
        if step in self.taken:
            return self.taken[step]
        before = max((other for other in self.taken if other < step), default=0)
        first = (self.taken[before].end if before else 0) + (step - before - 1) * self.global_batch
        return Taken(first, first + self.global_batch, is_recorded=False)

    def of_position(self, position: int) -> str:
        """Who took it, in words. Raises UserError for a position that the run does not reach."""
        end = max([self.of_step(self.steps).end, *(taken.end for taken in self.taken.values())])
        if not 0 <= position < end:
            raise UserError(f"--position {position} must lie between 0 and {end - 1}, the last one of {self.run}")
        for step, taken in self.taken.items():
            if taken.first <= position < taken.end:
                return f"lane {position - taken.first} of step {step}"
            for first, last, why in taken.skipped:
                if first <= position < last:
                    return f"skipped before step {step}: {why}"
        return "of no step that metrics.jsonl records"


def _taken(row: dict[str, Any]) -> Taken | None:
    """None: the row does not say it, or is an edited one."""
    try:
        first, end = map(int, row["positions"])
        skipped = tuple((*map(int, window["positions"]), str(window["why"])) for window in row.get("skipped", ()))
        loss = row.get("loss")
        return Taken(first, end, loss if isinstance(loss, float) else None, skipped)  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError):
        return None
