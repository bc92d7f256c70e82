"""Words of batches, against a loop over characters; hashes, against Python's own integers."""

import random
import unicodedata

import numpy as np
import pytest

from moray.data.curation.words import _UNSPACED, BASE, Words, folded, folded_words, mix, runs

ALPHABET = "ab1 é\u0301\u0308中文の。, ก่ข\ufe0f Ⅳ²x"


def words_by_hand(text: str) -> list[str]:
    words: list[str] = []
    is_open, is_alone = False, False
    for char in text:
        category = unicodedata.category(char)[0]
        alone = category == "L" and any(low <= ord(char) <= high for low, high in _UNSPACED)
        if alone or category in "LN":
            if is_open and not is_alone and not alone:
                words[-1] += char
            else:
                words.append(char)
            is_open, is_alone = True, alone
        elif category == "M" and is_open:
            words[-1] += char
        else:
            is_open = False
    return words


def words_of(found: Words, texts: list[str], number: int) -> list[str]:
    base = int(found.text_ends[number]) - len(texts[number])
    span = slice(*found.first[number : number + 2].tolist())
    return [
        texts[number][start - base : end - base]
        for start, end in zip(found.starts[span].tolist(), found.ends[span].tolist(), strict=True)
    ]


@pytest.mark.parametrize("stretch", [3, 1 << 19])
def test_words_of_a_batch_are_those_found_character_by_character(monkeypatch: pytest.MonkeyPatch, stretch: int) -> None:
    monkeypatch.setattr("moray.data.curation.words.STRETCH", stretch)
    chance = random.Random(0)
    texts = ["".join(chance.choices(ALPHABET, k=chance.randrange(30))) for _ in range(3000)]
    found = Words.of(texts)
    assert [words_of(found, texts, number) for number in range(len(texts))] == [words_by_hand(text) for text in texts]
    assert found.counts.tolist() == [len(words_by_hand(text)) for text in texts]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("It's Dr. O'Neil, 3.14!", ["It", "s", "Dr", "O", "Neil", "3", "14"]),
        ("床前明月光，疑是", list("床前明月光疑是")),
        ("naïve cafe\u0301", ["naïve", "cafe\u0301"]),
        ("\ufe0f", []),
        ("", []),
    ],
)
def test_words_by_example(text: str, words: list[str]) -> None:
    assert words_of(Words.of([text]), [text], 0) == words


def hash_by_hand(word: str) -> int:
    total = sum((ord(char) + 1) * pow(BASE, place, 1 << 64) for place, char in enumerate(word)) % (1 << 64)
    return int(mix(np.array([total], np.uint64))[0])


@pytest.mark.parametrize("stretch", [2, 1 << 19])
def test_hashes_are_a_polynomial_of_the_characters_wherever_the_word_stands(
    monkeypatch: pytest.MonkeyPatch, stretch: int
) -> None:
    monkeypatch.setattr("moray.data.curation.words.STRETCH", stretch)
    texts = ["one two one", "two 明 x" * 50]
    found = Words.of(texts)
    words = [word for number in range(2) for word in words_of(found, texts, number)]
    assert found.hashes.tolist() == [hash_by_hand(word) for word in words]


def test_mixing_is_the_published_one() -> None:
    """The first outputs of splitmix64 with seed 1234567, as its authors' C gives them."""
    seeds = (1234567 + np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    assert mix(seeds).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_runs_tell_order_and_length_and_stay_within_their_text() -> None:
    texts = ["a b c d", "b c", "", "a b c", "c b a"]
    hashes, first = Words.of(texts).ngrams(3)
    assert np.diff(first).tolist() == [2, 1, 0, 1, 1]
    abc, bcd, bc, again, cba = hashes.tolist()
    assert abc == again
    assert len({abc, bcd, bc, cba}) == 4
    empty, none = runs(np.zeros(0, np.uint64), np.zeros(3, np.int64), 5)
    assert (len(empty), none.tolist()) == (0, [0, 0, 0])


def test_what_only_looks_different_is_folded() -> None:
    assert folded("ＡBC ﬁ Straße") == "abc fi strasse"


def test_words_come_in_batches_of_folded_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moray.data.curation.words.STRETCH", 4)
    texts = ["", "A", "bB", "ﬁ ve five", "C", "", "d d"]
    found = list(folded_words(iter(texts)))
    assert [words.counts.tolist() for words in found] == [[0, 1, 1], [3], [1, 0, 2]]
    hashes = np.concatenate([words.hashes for words in found])
    assert (hashes == Words.of([" ".join(map(folded, texts))]).hashes).all()
    assert list(folded_words([])) == []
