"""Samples in rows, by hand."""

import numpy as np
import torch

from moray.jobs.alignment.packed import packed


def test_rows_by_hand() -> None:
    """A token stands where it is predicted; the longest sample begins the first row, and rows come in twos."""
    samples = [
        (np.array([1, 2]), np.array([3])),
        (np.array([4]), np.array([5, 6, 7])),
        (np.array([8, 9]), np.array([8])),
    ]
    rows = packed(samples, 7, 2)
    assert rows.tokens_RT.tolist() == [[4, 5, 6, 7, 1, 2, 3], [8, 9, 8, 0, 0, 0, 0]]
    i = -100
    assert rows.targets_RT.tolist() == [[5, 6, 7, i, i, 3, i], [i, 8, i, i, i, i, i]]
    assert rows.positions_RT.tolist() == [[0, 1, 2, 3, 0, 1, 2], [0, 1, 2, 0, 0, 0, 0]]
    assert rows.documents_RT.tolist() == [[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, -1, -1, -1, -1]]
    assert rows.ends_S == [6, 3, 9]
    assert rows.samples_in(range(1)) == [0, 1]
    values = [np.array([0.5]), np.array([1.0, 2.0, 3.0]), np.array([4.0])]
    assert rows.placed(values).tolist() == [[1, 2, 3, 0, 0, 0.5, 0], [0, 4, 0, 0, 0, 0, 0]]
    assert len(packed(samples, 10, 1).tokens_RT) == 1
    more = packed(samples, 7, 3)
    assert more.documents_RT[2].unique().tolist() == [-1]
    torch.testing.assert_close(more.tokens_RT[:2], rows.tokens_RT)
