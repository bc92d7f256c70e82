"""All that a person may say of a preparation: options, `--recipe NAME`, and its sections by `--section.key value`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import Field, ValidationError, field_validator, model_validator

from moray import UserError, nearest
from moray.data.index import Kind
from moray.data.reading.rules import Answers, LongDocuments, OnDamage, Rules
from moray.data.tokenizer import check_vocab_size
from moray.jobs.config.load import flatten, read_recipe, settings
from moray.jobs.config.sections import Section
from moray.jobs.datasets.recipe import (
    BenchmarksSection,
    CleanSection,
    DuplicatesSection,
    QualitySection,
    RulesSection,
)
from moray.model.config.mistakes import in_one_line


class PrepareConfig(Section):
    """Raises UserError for a value that cannot be."""

    sources: tuple[str | Path, ...] = ("stdlib",)
    """The words without a name: stdlib, or files (.txt .md .rst .py .jsonl .json .tar, with .gz .zst .bz2 .xz;
    .parquet), folders, and fsspec URLs of either (s3://…)."""
    out: str | Path = ""
    """The folder to make, or the fsspec URL."""
    kind: Literal["auto", Kind] = "auto"
    """What the sources hold: text; chat (dialogues to learn the answers of); preference (pairs of answers, one of them
    preferred); prompts (whose answers can be checked). auto: as the fields of the first record say."""
    vocab_size: int = 6400
    """Entries of the byte-level BPE that is trained on the training split."""
    tokenizer: Path | None = None
    """A folder with an existing tokenizer to use instead."""
    validation: float = Field(0.01, gt=0, lt=1)
    """Share of the documents held out for validation, by hash of their key and text; of dialogues, by hash of the first
    thing that a user says, so that all answers to it are on one side."""
    seed: int = 0
    """Decides on the documents' order."""
    overwrite: bool = False
    """Replace a finished dataset in out; a word of its own, without a value."""
    answers: Answers = "all"
    """Which of several answers to one message become dialogues: all, the best, or the first."""
    dedup: Literal["auto", "exact", "none"] = "auto"
    """What is kept of equal documents: exact, one of them; none, all. auto: of text one, of other kinds all."""
    workers: int | None = Field(None, ge=1)
    """Processes; as many as there are cores and memory has room for, unless it is said. With engine ray: tasks at a
    time."""
    memory_mb: int | None = None
    """What they may take together, in MB; half of the free memory, unless it is said."""
    drops: Path | None = None
    """A .parquet file to list each dropped document in: where it was dropped, why, and which one stayed for it."""
    engine: Literal["local", "ray"] = "local"
    """local, processes of this machine; ray, those of all nodes of the Ray of RAY_ADDRESS or, without one, of a Ray of
    this machine (docs/datasets.md says what nodes must share)."""
    scratch: Path | None = None
    """Where to work when out is a URL: a folder on a disk; with engine ray, on one that all nodes share."""
    text_field: str = "text"
    """The field of JSON and parquet that holds the text; data.text is a field within a field."""
    max_document_bytes: int = 16 << 20
    """A longer document is cut or dropped."""
    long_documents: LongDocuments = "cut"
    """What is done with one: cut (after a paragraph, a line or a word) or drop."""
    max_bad: int = 100
    """Bad records (not UTF-8, not JSON, without a text) that are left out before it is an error."""
    on_damage: OnDamage = "stop"
    """Stop at a damaged file, or skip the rest of it."""
    clean: CleanSection = CleanSection()
    rules: RulesSection = RulesSection()
    duplicates: DuplicatesSection = DuplicatesSection()
    quality: QualitySection = QualitySection()
    benchmarks: BenchmarksSection = BenchmarksSection()

    @field_validator("sources", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str | Path) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.reading  # noqa: B018  which raises
        if self.tokenizer is None:
            check_vocab_size(self.vocab_size)
        return self

    @property
    def reading(self) -> Rules:
        """How sources are read; of kind auto, as texts."""
        kind: Kind = "text" if self.kind == "auto" else self.kind
        length = self.max_document_bytes, self.long_documents
        return Rules(self.text_field, *length, self.max_bad, self.on_damage, kind, self.answers)

    @property
    def keeps_equal(self) -> bool:
        return self.dedup == "none" or (self.dedup == "auto" and self.kind != "text")

    def check_kind(self) -> None:
        """Raises UserError where what is meant for text is asked of dialogues."""
        of_text = [name for name, value in flatten(self.model_dump()) if "." in name and value != _DEFAULTS[name]]
        if self.kind != "text" and of_text:
            raise UserError(
                f"{of_text[0]} is for text, and this is of kind {self.kind}; leave it out, or use --recipe chat"
            )


def load_preparation(recipe: str, overrides: Mapping[str, Any]) -> PrepareConfig:
    """What the recipe of that name, or a .toml file, says, and settings by their dotted names that win over it.

    Raises UserError of one line that names the setting, its value and what would be right.
    """
    tables: dict[str, Any] = {}
    for name, value in {**dict(flatten(read_recipe(recipe, "moray.jobs.datasets.recipes"))), **overrides}.items():
        if name not in _FIELDS:
            raise UserError(f"{name} is not a setting of a preparation; {nearest(name, list(_FIELDS))}")
        section, _, key = name.rpartition(".")
        is_none = (
            isinstance(value, str) and value.lower() == "none" and "none" not in get_args(_FIELDS[name].annotation)
        )
        (tables.setdefault(section, {}) if section else tables)[key] = None if is_none else value
    try:
        return PrepareConfig.model_validate(tables)
    except ValidationError as error:
        raise UserError(in_one_line(error, PrepareConfig)) from None


_FIELDS = dict(settings(PrepareConfig))
_DEFAULTS = {name: field.get_default(call_default_factory=True) for name, field in _FIELDS.items()}
