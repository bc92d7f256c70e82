"""`--drops FILE.parquet`: each document that was dropped, where, why, and which one stayed for it."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from moray import UserError
from moray.data.preparation.drops import Drop, names_of, read_drops
from moray.data.reading.compression import optional

PURPOSE = "writing a .parquet file"
ROWS = 1 << 17
"""Held in memory at a time, and a row group of the file."""


def check_drops(path: Path, out: Path, *, overwrite: bool) -> None:
    """Raises UserError for a file that could not be written in the end, or that is there and is not to be replaced."""
    if path.suffix != ".parquet":
        raise UserError(f"drops={path} must be a .parquet file, for example {path.with_suffix('.parquet')}")
    if path.absolute().is_relative_to(out.absolute()):
        raise UserError(f"drops={path} lies in out={out}, which holds the dataset alone; name a file elsewhere")
    if not path.absolute().parent.is_dir():
        raise UserError(f"drops={path}: there is no folder {path.parent}; make it, or name a file in another one")
    if path.is_dir():
        raise UserError(f"drops={path} is a folder; name a file in it, for example {path / 'drops.parquet'}")
    if path.exists() and not overwrite:
        raise UserError(f"drops={path} is there already; choose another name, or replace it with --overwrite")
    optional("pyarrow.parquet", PURPOSE)


def write_drops(path: Path, folders: Sequence[Path]) -> None:
    """Writes what the tasks of these folders dropped, in their order; the file is there whole or not at all.

    Memory: ROWS rows, whose near-duplicates' winners are looked up together in what buckets have kept of them. Raises
    UserError where the file cannot be written.
    """
    arrow, parquet = (
        optional("pyarrow", PURPOSE),
        optional("pyarrow.parquet", PURPOSE),
    )
    types = {int: arrow.int64(), str: arrow.string()}
    schema = arrow.schema([(name, types[kind]) for name, kind in Drop.__annotations__.items()])
    partial = path.with_name(path.name + ".partial")
    rows = read_drops(folders)
    try:
        with parquet.ParquetWriter(partial, schema) as writer:
            while batch := list(islice(rows, ROWS)):
                columns = zip(*_named(batch, folders), strict=True)
                writer.write_table(arrow.table(list(map(list, columns)), schema=schema))
        partial.replace(path)
    except OSError as error:
        raise UserError(f"drops={path} cannot be written ({error.strerror or error})") from None
    finally:
        partial.unlink(missing_ok=True)


def _named(batch: Sequence[Drop], folders: Sequence[Path]) -> Iterator[Drop]:
    names = names_of({row.kept for row in batch if row.stage == "near-duplicates"}, folders)
    return (row._replace(kept=names[row.kept]) if row.stage == "near-duplicates" else row for row in batch)
