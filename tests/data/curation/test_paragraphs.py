"""Paragraphs of texts, and texts without those that came before."""

import random

import numpy as np
import pytest

from moray.data.curation.bloom import Bloom
from moray.data.curation.paragraphs import hashes, paragraphs, without

FOOTER = "All rights reserved. No part of this page may be copied, kept or sent on without our written consent."
SAME_FOOTER = "ALL RIGHTS reserved – no part of this page may be copied, kept,  or sent on without our written consent!"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one\ntwo\n\nthree", ["one\ntwo", "three"]),
        ("one\ntwo\n", ["one", "two"]),
        ("\n \n  one\n \t\n\n  two\n\n", ["  one", "  two"]),
        ("one\r\n\r\ntwo\r\n", ["one\r", "two"]),
        ("one", ["one"]),
        (" \n ", []),
        ("", []),
    ],
)
def test_paragraphs_stand_between_blank_lines_or_are_lines(text: str, expected: list[str]) -> None:
    assert [text[start:end] for start, end in paragraphs(text)] == expected


def prose(chance: random.Random, n: int) -> str:
    return " ".join("".join(chance.choices("etaoinsh", k=7)) for _ in range(n)).capitalize() + "."


def pages(n: int, footer: str = "") -> list[str]:
    chance = random.Random(n)
    texts = []
    for _ in range(n):
        parts = ["Home", *(prose(chance, chance.randrange(3, 40)) for _ in range(5))]
        parts.insert(chance.randrange(1, 7), footer)
        texts.append(chance.choice(["\n\n", "\n \n\n", "\n"]).join(part for part in parts if part))
    return texts


def deduplicated(texts: list[str]) -> list[str]:
    found, first, spans = hashes(texts)
    repeated = Bloom.sized(10_000, 1e-6).add(found)
    parts = [slice(*first[number : number + 2].tolist()) for number in range(len(texts))]
    return [without(text, spans[part], repeated[part]) for text, part in zip(texts, parts, strict=True)]


def test_texts_without_repeats_lose_nothing() -> None:
    texts = pages(300)  # "Home" is in each, and is short
    assert deduplicated(texts) == texts


def test_a_footer_stays_once() -> None:
    plain, texts = pages(100), pages(100, FOOTER)
    kept = deduplicated(texts)
    assert kept[0] == texts[0]
    assert not any(FOOTER in text for text in kept[1:])
    assert [text.split() for text in kept[1:]] == [text.split() for text in plain[1:]]
    assert all(is_subsequence(text, whole) for text, whole in zip(kept, texts, strict=True))


def is_subsequence(text: str, whole: str) -> bool:
    rest = iter(whole)
    return all(char in rest for char in text)


def test_what_only_looks_different_is_the_same_paragraph() -> None:
    first = f"One\n\n{FOOTER}"
    assert deduplicated([first, f"{SAME_FOOTER}\n\nTwo\n", SAME_FOOTER]) == [first, "Two\n", ""]


@pytest.mark.parametrize(("text", "gone", "left"), [
    ("a\n\n  b\n\n  c\n", [1], "a\n\n  c\n"),
    ("a\n\n  b\n\n  c\n", [2], "a\n\n  b"),
    ("a\n\n  b\n\n  c\n", [0, 1], "  c\n"),
    ("a\nb\nc", [0, 2], "b"),
    ("a\n\nb", [], "a\n\nb"),
    ("a \n\n b ", [0, 1], ""),
])  # fmt: skip
def test_what_separated_a_paragraph_goes_with_it(text: str, gone: list[int], left: str) -> None:
    spans = np.array(paragraphs(text))
    assert without(text, spans, np.isin(np.arange(len(spans)), gone)) == left


def test_hashes_are_of_texts_alone() -> None:
    texts = ["", *pages(20, FOOTER), "Home", "中" * 13, "中" * 12]
    found, first, spans = hashes(texts)
    assert np.diff(first).tolist()[-3:] == [0, 1, 0]
    assert (len(found), len(spans)) == (first[-1], first[-1])
    for number, text in enumerate(texts):
        part = slice(*first[number : number + 2].tolist())
        alone, _, spans_alone = hashes([text])
        assert (found[part] == alone).all()
        assert (spans[part] == spans_alone).all()
    assert [len(array) for array in hashes([])] == [0, 1, 0]


def test_short_paragraphs_and_reordered_words_stay() -> None:
    words = prose(random.Random(0), 13).split()
    short, long, turned = " ".join(words[1:]), " ".join(words), " ".join(reversed(words))
    assert deduplicated([short, short, long, turned, long]) == [short, short, long, turned, ""]
