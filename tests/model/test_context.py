"""Where documents lie in a packed batch, against counts by hand."""

import pytest
import torch

from moray.model.attention.documents import Documents, document_lengths


@pytest.mark.parametrize(
    ("documents", "lengths"),
    [
        ([[0, 0, 0], [1, 1, 1]], None),
        ([[7, 7, 7], [7, 7, 7]], None),  # the same id in two rows is two pieces
        ([[0, 0, 1], [1, 1, 1]], [2, 1, 3]),
        ([[-1, 0, 0], [1, 1, -1]], [1, 2, 2, 1]),
        ([[0], [1]], None),
    ],
)
def test_lengths_are_those_of_the_runs_of_each_row(documents: list[list[int]], lengths: list[int] | None) -> None:
    assert document_lengths(torch.tensor(documents)) == lengths


def test_padding_is_not_valid() -> None:
    documents = Documents.of(torch.tensor([[-1, 0, 0, 3]]), torch.device("cpu"))
    assert documents.valid_BT.tolist() == [[False, True, True, True]]
    assert documents.lengths == [1, 2, 1]
