"""Parquet: a record a row."""

import json
from collections.abc import Iterator
from typing import IO, Any

from moray.data.reading.compression import BUFFER_BYTES, optional
from moray.data.reading.records import Damage, Item, Loss, Reason, Record, missing, name_of
from moray.data.reading.rules import Rules

PURPOSE = "reading a .parquet file"

# However large rows are, few are held. What remains is the format's: it is decoded by pages, which writers make of
# 1 MiB, but pyarrow of up to 1,024 rows.
BATCH_BYTES = 4 << 20
MAX_BATCH_ROWS = 128  # one text that stands in many rows takes no room in the file


def read_parquet(
    file: IO[bytes], rules: Rules, n_before: int = 0, groups: tuple[int, int] | None = None
) -> Iterator[Item]:
    """A document a row, from the column of `rules`, named by column `id` if there is one, else by its row number.

    groups: the first row group and the one behind the last, where others read the rest: the `n_before` rows before it.
    """
    # Pre-buffering would hold whole row groups.
    table = optional("pyarrow.parquet", PURPOSE).ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False)
    numbers = range(*groups) if groups else range(table.metadata.num_row_groups)
    if rules.kind != "text":
        yield from _rows(table, numbers, n_before)
        return
    columns = [table.schema.column(n).path for n in range(len(table.schema))]
    field = rules.text_field
    if field not in columns:
        raise Damage(missing("column", field, columns))
    has_id, number = "id" in columns, n_before
    n_rows = _batch_rows(table.metadata, columns.index(field))
    for batch in table.iter_batches(n_rows, numbers, columns=[field, "id"] if has_id else [field]):
        texts = _values(batch, field)
        names = _values(batch, "id") if has_id else [None] * len(texts)
        for text, name in zip(texts, names, strict=True):
            number += 1
            place = f"row {number}"
            if text is None:
                yield Loss(Reason.EMPTY, place)
            elif isinstance(text, bytes):
                yield Record(place, name_of(name, number), (text,))
            else:
                yield Loss(Reason.BAD, place, f"column {field!r} must hold text, not {type(text).__name__}")


def row_groups(file: IO[bytes]) -> list[tuple[int, int]]:
    """Rows and bytes, before compression, of each row group."""
    metadata = optional("pyarrow.parquet", PURPOSE).ParquetFile(file, pre_buffer=False).metadata
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    return [(group.num_rows, group.total_byte_size) for group in groups]


def _rows(table: Any, groups: range, number: int) -> Iterator[Item]:
    """Whole rows, as JSON."""
    for batch in table.iter_batches(MAX_BATCH_ROWS, groups):
        for row in batch.to_pylist():
            number += 1
            yield Record(f"row {number}", name_of(row.get("id"), number), (json.dumps(row, default=str).encode(),))


def _batch_rows(metadata: Any, column: int) -> int:
    """How many rows make up BATCH_BYTES where a column's rows are longest."""
    groups = [metadata.row_group(n) for n in range(metadata.num_row_groups)]
    longest = max(
        (group.column(column).total_uncompressed_size // (group.num_rows or 1) for group in groups), default=0
    )
    return min(max(BATCH_BYTES // (longest + 1), 1), MAX_BATCH_ROWS)


def _values(batch: Any, field: str) -> list[Any]:
    """A column's values, strings as bytes that nobody has decoded yet."""
    arrow, compute = (
        optional("pyarrow", PURPOSE),
        optional("pyarrow.compute", PURPOSE),
    )
    names = batch.schema.names
    first, *below = [field] if field in names else field.split(".")
    column = batch.column(names.index(first))  # by number: two columns may have one name
    if below:
        column = compute.struct_field(column, below)
    if arrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        return column.cast(arrow.large_binary()).to_pylist()
    except arrow.ArrowNotImplementedError:
        return column.to_pylist()
