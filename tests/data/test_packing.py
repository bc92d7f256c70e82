"""Packing, against a packer that looks at every row, the lower bound, and TRL's where it is installed."""

import numpy as np
import pytest

from moray.data.packing import pack


def plainly(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing as it is defined: of all rows in which a document fits, the fullest one."""
    rows: list[list[int]] = []
    for document in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        used = [sum(lengths[i] for i in row) for row in rows]
        fitting = [row for row in range(len(rows)) if used[row] + lengths[document] <= capacity]
        if fitting:
            rows[max(fitting, key=lambda row: used[row])].append(document)
        else:
            rows.append([document])
    return rows


@pytest.mark.parametrize("capacity", [63, 64, 65])
@pytest.mark.parametrize("seed", range(4))
def test_each_document_once_and_as_full_as_the_definition(capacity: int, seed: int) -> None:
    """TRL 4554, 3887, 5075: documents cut or lost, nothing packed at 2^n + 1."""
    lengths = np.random.default_rng(seed).integers(1, capacity + 1, 200)
    packing = pack(lengths, capacity)
    rows = [packing.row(number) for number in range(len(packing.ends))]
    assert sorted(np.concatenate(rows).tolist()) == list(range(200))
    fills = [int(lengths[row].sum()) for row in rows]
    assert max(fills) <= capacity
    # Rows that are equally full may take each other's documents: what is left to choose changes no fill.
    expected = [sum(int(lengths[i]) for i in row) for row in plainly(lengths.tolist(), capacity)]
    assert sorted(fills) == sorted(expected)
    assert len(rows) <= 11 / 9 * (int(lengths.sum()) / capacity) + 1


def test_a_row_of_one_token_and_a_document_that_fills_it() -> None:
    packing = pack(np.array([1, 8, 1]), 8)
    assert [packing.row(i).tolist() for i in range(len(packing.ends))] == [[1], [0, 2]]
    assert pack(np.array([1, 1]), 1).ends.tolist() == [1, 2]


def test_no_documents_make_no_rows() -> None:
    assert [part.tolist() for part in pack(np.zeros(0, np.int64), 8)] == [[], []]


def test_as_many_rows_as_trl() -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    lengths = np.minimum(np.random.default_rng(0).geometric(0.02, 1000), 256)
    theirs = trl.pack_dataset(
        datasets.Dataset.from_dict({"input_ids": [[0] * int(n) for n in lengths]}), seq_length=256, strategy="bfd"
    )
    assert len(pack(lengths, 256).ends) == len(theirs)
