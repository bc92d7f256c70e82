"""How sources are read, as a person may set it."""

from dataclasses import dataclass
from typing import Literal, get_args

from moray import UserError
from moray.data.index import Kind

Answers = Literal["all", "best", "first"]
LongDocuments = Literal["cut", "drop"]
OnDamage = Literal["stop", "skip"]


@dataclass(frozen=True)
class Rules:
    """What records hold, where the text of one is, how long a document may be, and what faults a reading bears.

    A text above `max_document_bytes` (UTF-8) is cut after a paragraph, a line or a word, or dropped. More than
    `max_bad` bad records end the reading, and so does a damaged file unless `on_damage` is "skip".
    Raises UserError for a value that cannot be.
    """

    text_field: str = "text"  # of JSON and parquet; `data.text` is field `text` of field `data`
    max_document_bytes: int = 16 << 20
    long_documents: LongDocuments = "cut"
    max_bad: int = 100
    on_damage: OnDamage = "stop"
    kind: Kind = "text"
    answers: Answers = "all"  # of several to one message

    def __post_init__(self) -> None:
        if not self.text_field:
            raise UserError("text_field='' must name the field that holds the text, for example content or data.text")
        if self.max_document_bytes < 1024:
            raise UserError(f"max_document_bytes={self.max_document_bytes} must be at least 1024")
        if self.max_bad < 0:
            raise UserError(f"max_bad={self.max_bad} must be 0 or more")
        choices = (("long_documents", LongDocuments), ("on_damage", OnDamage), ("kind", Kind), ("answers", Answers))
        for name, kinds in choices:
            if getattr(self, name) not in get_args(kinds):
                raise UserError(f"{name}={getattr(self, name)!r} must be one of {', '.join(get_args(kinds))}")

    @property
    def max_record_bytes(self) -> int:
        """What a JSON record may take: escapes lengthen a text, and other fields stand beside it."""
        return 4 * self.max_document_bytes
