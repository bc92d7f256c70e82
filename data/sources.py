"""The datasets that a run learns from: one, or several by name, of one kind and one tokenizer."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import TypeVar

from moray import UserError
from moray.data.dataset import Dataset
from moray.data.index import Kind

T = TypeVar("T")


@dataclass(frozen=True)
class Sources:
    """Datasets by name, in the names' order; a lone one, which data.path names, has the name ''."""

    datasets: Mapping[str, Dataset]

    @classmethod
    def open(cls, folders: Mapping[str, str]) -> "Sources":
        """Raises UserError as `Dataset.open` does, and naming two sources that a model cannot learn from at once."""
        sources = cls({name: Dataset.open(folder, _called(name)) for name, folder in sorted(folders.items())})
        first, *others = sources.datasets.values()
        for other in others:
            if other.kind != first.kind:
                raise UserError(
                    f"{first.called}={first.folder} is of kind {first.kind}, but {other.called}={other.folder} of kind "
                    f"{other.kind}; a run learns from one kind"
                )
            if other.tokenizer_sha256 != first.tokenizer_sha256:
                raise UserError(
                    f"{first.called}={first.folder} and {other.called}={other.folder} have different tokenizers; "
                    f"prepare one of them with `--tokenizer` and the folder of the other"
                )
        return sources

    @property
    def first(self) -> Dataset:
        """Whose tokenizer is that of all."""
        return next(iter(self.datasets.values()))

    @property
    def kind(self) -> Kind:
        return self.first.kind

    def verify(self) -> None:
        """As `Dataset.verify`, of each."""
        for dataset in self.datasets.values():
            dataset.verify()

    def check_vocabulary(self, model_vocab_size: int) -> None:
        """As `Dataset.check_vocabulary`, of each."""
        for dataset in self.datasets.values():
            dataset.check_vocabulary(model_vocab_size)

    @property
    def fingerprint(self) -> str | dict[str, str]:
        """What a run remembers its data by: that of a lone dataset, or those of several by name."""
        if "" in self.datasets:
            return self.first.fingerprint
        return {name: dataset.fingerprint for name, dataset in self.datasets.items()}

    def check_fingerprint(self, expected: str | Mapping[str, str]) -> None:
        """Raises UserError if a run was trained on other data than this; it may have got sources since."""
        known = {"": expected} if isinstance(expected, str) else expected
        if missing := sorted(known.keys() - self.datasets.keys()):
            setting = "data.path" if "" in self.datasets else "data.mix"
            raise UserError(
                f"{setting} is without {', '.join(filter(None, missing)) or 'data.path'}, which this run was trained "
                "on: its positions would mean other sequences. Name all that it had (a source of weight 0 gives "
                "nothing any more), or begin another run.dir with its weights, by model.from"
            )
        for name, fingerprint in known.items():
            self.datasets[name].check_fingerprint(fingerprint)


def in_turn(each: Iterable[Iterable[T]]) -> Iterator[T]:
    """The first of each, then the second of each, and so on, as far as they go."""
    boxes = [((item,) for item in items) for items in each]
    for row in zip_longest(*boxes):
        yield from (box[0] for box in row if box)


def _called(name: str) -> str:
    return f"data.mix: {name}" if name else "data.path"
