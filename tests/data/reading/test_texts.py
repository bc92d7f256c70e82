"""Cutting long texts: nothing lost, nothing above the limit, and no character in two."""

import random

import pytest

from moray.data.reading.texts import cut


def blocks(text: bytes, size: int) -> list[bytes]:
    return [text[start : start + size] for start in range(0, len(text), size)]


def test_by_hand() -> None:
    assert list(cut([b"aaaa bbbb\ncc dd\n\neeee"], 16)) == [b"aaaa bbbb\ncc dd\n", b"\neeee"]
    assert list(cut([b"aaaa bbbb\ncc\n\ndd eeee"], 16)) == [b"aaaa bbbb\ncc\n\n", b"dd eeee"]
    assert list(cut([b"a" * 12 + b" bbbb cccc"], 16)) == [b"a" * 12 + b" ", b"bbbb cccc"]
    assert list(cut(["三".encode() * 7], 16)) == ["三".encode() * 5, "三".encode() * 2]
    assert list(cut([b"a" * 16], 16)) == [b"a" * 16]
    assert list(cut([], 16)) == [b""]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000])
def test_the_pieces_are_the_text_however_it_comes(size: int) -> None:
    rng = random.Random(0)
    marks = ["a", "wort", " ", "\n", "\n\n", "\r\n", "\r", "\r\r\n", "三", "🙂", "é"]
    for _ in range(20):
        text = "".join(rng.choices(marks, k=200))
        pieces = list(cut(blocks(text.encode(), size), 64))
        assert b"".join(pieces).decode() == text.replace("\r\n", "\n")
        assert all(0 < len(piece) <= 64 and piece.decode() for piece in pieces)


def test_what_is_no_text_is_cut_too() -> None:
    assert b"".join(cut([b"\x80" * 100], 16)) == b"\x80" * 100
