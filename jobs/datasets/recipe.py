"""What is done to text between reading and tokenizing, as a person may set it: `--section.key value`."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from moray import UserError
from moray.data.curation.minhash import banding
from moray.data.curation.rules import Rule, rules_named
from moray.jobs.config.sections import AnyPath, Section


class CleanSection(Section):
    characters: bool = False
    """Newlines are made \\n, characters composed (NFC), and control and invisible ones taken out."""
    mojibake: bool = False
    """Text that was decoded wrongly is mended by ftfy."""
    lines: bool = False
    """Lines that are no sentences (menus, notices, code of pages) are taken out, as C4 did."""
    mask: tuple[Literal["email", "ip", "card"], ...] = ()
    """What is replaced by a mark: e-mail addresses, IP addresses, numbers of credit cards."""

    @field_validator("mask", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return _listed(value)


class RulesSection(Section):
    sets: tuple[str, ...] = ()
    """Rules that a document must keep: gopher-quality, gopher-repetition, c4, fineweb, chinese."""
    bounds: tuple[str, ...] = ()
    """Other bounds for some of them: gopher_n_words=20..100000,gopher_mean_word_length=2..12."""

    @field_validator("sets", "bounds", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return _listed(value)

    @model_validator(mode="after")
    def _check(self) -> "RulesSection":
        self.rules  # noqa: B018  which raises
        return self

    @property
    def rules(self) -> tuple[Rule, ...]:
        return rules_named(self.sets, dict(_bound(text) for text in self.bounds))


class DuplicatesSection(Section):
    near: float | None = Field(None, gt=0, lt=1)
    """Of documents whose 5-word shingles have at least about this Jaccard index one stays; none: all do. 0.72 is
    FineWeb's."""
    paragraphs: bool = False
    """A paragraph of 13 words or more stays where it comes first, and nowhere else."""

    @property
    def bands(self) -> tuple[int, int] | None:
        """Bands and rows of MinHash."""
        return None if self.near is None else banding(self.near)

    @model_validator(mode="after")
    def _check(self) -> "DuplicatesSection":
        try:
            self.bands  # noqa: B018  which raises
        except UserError as error:
            raise UserError(f"duplicates.near: {error}") from None
        return self


class QualitySection(Section):
    classifier: AnyPath = ""
    """A file made by `moray quality train`."""
    keep: float | None = Field(None, gt=0, le=1)
    """The share of documents that stay, the best by the classifier."""
    cut: float | None = Field(None, ge=0, lt=1)
    """Documents stay that are good with at least this probability, by the classifier."""
    sample: bool = False
    """Documents stay by chance, the better the likelier, as GPT-3's did."""

    @model_validator(mode="after")
    def _check(self) -> "QualitySection":
        given = [f"quality.{name}" for name in ("keep", "cut", "sample") if getattr(self, name) not in (None, False)]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} both say what stays; leave one out")
        if given and not self.classifier:
            raise UserError(f"{given[0]} needs quality.classifier, a file made by `moray quality train`")
        if self.classifier and not given:
            raise UserError(
                f"quality.classifier={self.classifier} scores, and nothing says what stays; add quality.keep=0.7 (the "
                "best by that share), quality.cut=0.5 (by probability) or quality.sample=true"
            )
        return self


class BenchmarksSection(Section):
    tasks: tuple[AnyPath, ...] = ()
    """Task files of `moray evaluate`: documents that share a run of 13 words with one of them are left out."""

    @field_validator("tasks", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return _listed(value)


def _listed(value: Any) -> Any:
    return () if value in (None, "") else tuple(value.split(",")) if isinstance(value, str) else value


def _bound(text: str) -> tuple[str, str]:
    name, equals, bound = text.partition("=")
    if not equals:
        raise UserError(f"rules.bounds={text} must be NAME=LOW..HIGH, for example gopher_n_words=20..100000")
    return name, bound
