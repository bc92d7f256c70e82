"""Parquet of every type that holds text, as pyarrow writes it; a bad row costs itself alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from moray import UserError

Read = Callable[..., Any]


def write(path: Path, columns: dict) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_a_row_is_a_document(tmp_path: Path, read: Read) -> None:
    path = write(tmp_path / "rows.parquet", {"text": [f"text {n}" for n in range(700)], "n": range(700)})
    assert read(path).texts == {f"rows.parquet:{n + 1}": f"text {n}" for n in range(700)}
    path = write(tmp_path / "ids.parquet", {"id": ["a", None, ""], "text": ["x", None, "y"]})
    outcome = read(path)
    assert outcome.texts == {"ids.parquet:a": "x", "ids.parquet:3": "y"}
    assert outcome.lost("empty") == ["ids.parquet, row 2"]
    assert read(write(path, {"id": [7, 8], "text": ["x", "y"]})).texts == {"ids.parquet:7": "x", "ids.parquet:8": "y"}


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.string_view(),
        pyarrow.binary(),
        pyarrow.large_binary(),
        pyarrow.dictionary(pyarrow.int8(), pyarrow.string()),
    ],
    ids=str,
)
def test_every_type_that_holds_text(tmp_path: Path, read: Read, kind: pyarrow.DataType) -> None:
    texts = pyarrow.array(["éins", None, "zwei", "zwei"], kind)
    outcome = read(write(tmp_path / "rows.parquet", {"text": texts}))
    assert list(outcome.texts.values()) == ["éins", "zwei", "zwei"]
    assert outcome.lost("empty") == ["rows.parquet, row 2"]


def test_a_row_that_is_not_utf8_costs_itself_alone(tmp_path: Path, read: Read) -> None:
    """Columns of type string hold what their writers put there; nobody has checked it."""
    binary = pyarrow.array([b"a", b"caf\xe9", b"c"])
    texts = pyarrow.Array.from_buffers(pyarrow.string(), 3, binary.buffers())
    outcome = read(write(tmp_path / "rows.parquet", {"text": texts, "id": texts}))
    assert outcome.texts == {"rows.parquet:a": "a", "rows.parquet:c": "c"}
    assert outcome.lost("bad records") == ["rows.parquet, row 2: not UTF-8 (unexpected end of data, byte 4)"]


def test_another_column(tmp_path: Path, read: Read) -> None:
    data = [{"text": "a", "n": 1}, None, {"text": None, "n": 2}]
    path = write(tmp_path / "rows.parquet", {"data": data, "dotted.text": ["p", "q", "r"], "n": [1, 2, 3]})
    outcome = read(path, text_field="data.text")
    assert outcome.texts == {"rows.parquet:1": "a"}
    assert outcome.account.counts == {"empty": 2}
    assert list(read(path, text_field="dotted.text").texts.values()) == ["p", "q", "r"]
    found = r"found \['data.text', 'data.n', 'dotted.text', 'n'\]; name the right one with --text-field"
    with pytest.raises(UserError, match=rf"rows.parquet: no column 'text'; {found}"):
        read(path)
    with pytest.raises(UserError, match="row 1: column 'n' must hold text, not int"):
        read(path, text_field="n")


def test_columns_of_one_name_and_tables_without_rows(tmp_path: Path, read: Read) -> None:
    table = pyarrow.table([pyarrow.array(["x"]), pyarrow.array(["y"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    write(tmp_path / "b.parquet", {"text": pyarrow.array([], pyarrow.string())})
    write(tmp_path / "c.parquet", {"text": pyarrow.nulls(2)})
    outcome = read(tmp_path)
    assert list(outcome.texts.values()) == ["x"]
    assert outcome.account.counts == {"empty": 2}
    with pytest.raises(UserError, match=r"b.parquet' holds no documents"):
        read(tmp_path / "b.parquet")
