"""What data.mix and data.phases say: sources by name, and their weights from a global batch on.

Weights stay as they were written, so that what a run records reads like what was asked for. Equal are those that deal
out equal counts: 3 and 2 are 0.6 and 0.4.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from moray import UserError, nearest
from moray.data.mixture import CYCLE, Phase, counts_of, least_weight

DIGITS = 9


class MixedSource(NamedTuple):
    """An entry of data.mix."""

    name: str
    weight: str
    folder: str

    @classmethod
    def parse(cls, entry: str) -> "MixedSource":
        """Of `web=0.6:DIR`. Raises UserError where it is none."""
        found = re.fullmatch(r"([\w-]+)=([^:]*):(.+)", entry)
        if not found:
            raise UserError(
                f"data.mix={entry} must be NAME=WEIGHT:FOLDER, as in web=0.6:data/web; of more, with commas"
            )
        return cls(*found.groups())

    def __str__(self) -> str:
        return f"{self.name}={self.weight}:{self.folder}"


class WeightsFrom(NamedTuple):
    """The weights from a global batch on, as they were written: an entry of data.phases."""

    batch: int
    weights: Mapping[str, str]

    @classmethod
    def parse(cls, entry: str) -> "WeightsFrom":
        """Of `2000:web=0.2,poems=0.8`. Raises UserError where it is none."""
        found = re.fullmatch(r"(\d{1,15}):([\w-]+=[^,=]*(?:,[\w-]+=[^,=]*)*)", entry)
        if not found:
            raise UserError(
                f"data.phases={entry} must be STEP:NAME=WEIGHT,…, as in 2000:web=0.2,poems=0.8; more of them with "
                "semicolons"
            )
        pairs = [pair.split("=") for pair in found[2].split(",")]
        if twice := _twice([name for name, _ in pairs]):
            raise UserError(f"data.phases={entry} has {twice} twice")
        return cls(int(found[1]), dict(sorted(pairs)))

    def __str__(self) -> str:
        return f"{self.batch}:{','.join(f'{name}={weight}' for name, weight in self.weights.items())}"


@dataclass(frozen=True)
class Mix:
    """Sources by name, sorted, and their weights from the start on, and from later global batches."""

    folders: dict[str, str]
    phases: Sequence[WeightsFrom]

    @classmethod
    def of(cls, mix: Sequence[str], phases: Sequence[str]) -> "Mix":
        """From the two settings. Raises UserError where an entry is none, or a name is there twice."""
        sources = [MixedSource.parse(entry) for entry in mix]
        if twice := _twice([source.name for source in sources]):
            raise UserError(f"data.mix={','.join(mix)} has {twice} twice; give each source a name of its own")
        first = WeightsFrom(0, {source.name: source.weight for source in sources})
        folders = {source.name: source.folder for source in sources}
        return cls(folders, [first, *(WeightsFrom.parse(entry) for entry in phases)])

    @property
    def texts(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The two settings."""
        first, *others = self.phases
        sources = [MixedSource(name, first.weights.get(name, "0"), folder) for name, folder in self.folders.items()]
        return tuple(map(str, sources)), tuple(map(str, others))

    def check(self) -> None:
        """Raises UserError naming a weight that is none or too small, an unknown source, and phases out of order."""
        for number, phase in enumerate(self.phases):
            setting = f"data.phases={phase}" if number else f"data.mix={','.join(self.texts[0])}"
            if unknown := phase.weights.keys() - self.folders.keys():
                name = min(unknown)
                raise UserError(f"{setting}: {name} is no source of data.mix; {nearest(name, [*self.folders])}")
            _check_weights(setting, phase.weights)
            if number and phase.batch <= (before := self.phases[number - 1].batch):
                raise UserError(f"{setting} must begin after {'step' if number == 1 else 'the phase of step'} {before}")

    def phases_of(self, global_batch: int) -> tuple[Phase, ...]:
        """By position; one whose weights are those of the phase before goes on with its cycles."""
        phases: list[Phase] = []
        for phase in self.phases:
            counts = self._counts(phase)
            if not phases or counts != phases[-1].counts:
                phases.append(Phase(phase.batch * global_batch, counts))
        return tuple(phases)

    def going_on_from(self, before: "Mix", batch: int) -> "Mix":
        """What a run that has done the batches before this one with another mix goes on with: its own past, and from
        here on these weights. Sources that have come since had none.
        """
        past = [phase for phase in before.phases if phase.batch < batch]
        now = [phase for phase in self.phases if phase.batch <= batch][-1]
        if not past or self._counts(past[-1]) != self._counts(now):
            past.append(WeightsFrom(batch, now.weights))
        return Mix(self.folders, [*past, *(phase for phase in self.phases if phase.batch > batch)])

    def _counts(self, phase: WeightsFrom) -> tuple[int, ...]:
        return counts_of({name: Fraction(phase.weights.get(name, "0")) for name in self.folders})


def _check_weights(setting: str, weights: Mapping[str, str]) -> None:
    for name, weight in weights.items():
        if weight.startswith("-"):
            raise UserError(f"{setting}: {name}={weight} must not be negative")
        if not re.fullmatch(rf"[0-9]{{1,{DIGITS}}}(\.[0-9]{{0,{DIGITS}}})?|\.[0-9]{{1,{DIGITS}}}", weight):
            raise UserError(f"{setting}: {name}={weight or 'nothing'} must be a weight, a number like 0.6")
    numbers = {name: Fraction(weight) for name, weight in weights.items()}
    if not (total := sum(numbers.values(), Fraction(0))):
        raise UserError(f"{setting}: the weights add up to 0; one of them at least must be more")
    for name, number in numbers.items():
        if 0 < number < (least := least_weight(total - number)):
            enough = math.ceil(least * 10**DIGITS) / 10**DIGITS
            raise UserError(
                f"{setting}: {name}={weights[name]} is less than one of {CYCLE:,} sequences; beside the others it must "
                f"be at least {enough:.{DIGITS}f}, or 0"
            )


def _twice(names: Sequence[str]) -> str | None:
    return next((name for name in names if names.count(name) > 1), None)
