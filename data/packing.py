"""Whole documents into rows of a fixed length: best-fit decreasing, a pure function of the lengths.

The longest document is placed first, each in the row that it fills best (Johnson, 1974: at most 11/9 of the fewest
rows). Source: Ding et al., "Fewer Truncations Improve Language Modeling", 2024, section 3.
"""

from typing import NamedTuple

import numpy as np


class Packing(NamedTuple):
    """Which documents each row holds: row r those of `documents[ends[r - 1] : ends[r]]`."""

    documents: np.ndarray  # int64 [documents]
    ends: np.ndarray  # int64 [rows]

    def row(self, number: int) -> np.ndarray:
        first = int(self.ends[number - 1]) if number else 0
        return self.documents[first : int(self.ends[number])]


def pack(lengths: np.ndarray, capacity: int) -> Packing:
    """Rows of at most `capacity` tokens, in the order of their longest document.

    Shapes: lengths int64 [documents], each from 1 to capacity. Equal lengths keep their order.
    """
    order = np.argsort(-lengths, kind="stable")
    with_room: dict[int, list[int]] = {}  # rows by the tokens that still fit
    rooms = 0  # bit r: there is a row with room for r tokens more
    row_of = np.empty(len(lengths), np.int64)
    n_rows = 0
    for document, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        if fitting := rooms >> length:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, row, n_rows = capacity, n_rows, n_rows + 1
        row_of[document] = row
        if left := room - length:
            with_room.setdefault(left, []).append(row)
            rooms |= 1 << left
    placed = order[np.argsort(row_of[order], kind="stable")]
    return Packing(placed, np.cumsum(np.bincount(row_of, minlength=n_rows), dtype=np.int64))
