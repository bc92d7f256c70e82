"""What a file's name says of it: the format within, and the compression around it."""

import os
import re
from dataclasses import dataclass
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["text", "jsonl", "json", "tar", "parquet"]

TEXT_SUFFIXES = (".py", ".md", ".rst", ".txt")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_KINDS: dict[str, Kind] = {
    **dict.fromkeys(TEXT_SUFFIXES, "text"),
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".tar": "tar",
    ".parquet": "parquet",
}
KNOWN = f"{' '.join(_KINDS)}, and with {' '.join(COMPRESSIONS)} behind all but the last"


@dataclass(frozen=True, slots=True)
class Format:
    kind: Kind
    compression: str = ""  # one of COMPRESSIONS, or none


def format_of(name: str) -> Format | None:
    """The format of a file of that name, in any case; None where it is not known."""
    name, compression = re.sub(r"\.tgz$", ".tar.gz", name.lower()), ""
    stem, suffix = os.path.splitext(name)
    if suffix in COMPRESSIONS:
        name, compression = stem, suffix
    kind = _KINDS.get(os.path.splitext(name)[1])
    return None if kind is None or (kind == "parquet" and compression) else Format(kind, compression)
