"""Signals of batches against plain Python, a text at a time, written from the papers' words; and hand counts."""

import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from moray.data.curation.signals import SIGNALS, signals
from moray.data.curation.words import Words

Span = tuple[int, int]


def word_spans(text: str) -> list[Span]:
    """Found by `Words`, which has tests of its own."""
    found = Words.of([text])
    return list(zip(found.starts.tolist(), found.ends.tolist(), strict=True))


def ngrams(text: str, n: int) -> list[tuple[tuple[str, ...], Span]]:
    spans = word_spans(text)
    runs = [spans[place : place + n] for place in range(len(spans) - n + 1)]
    return [(tuple(text[start:end] for start, end in run), (run[0][0], run[-1][1])) for run in runs]


def share_of_chars(text: str, spans: list[Span]) -> float:
    return len({place for start, end in spans for place in range(start, end)}) / max(len(text), 1)


def top_by_hand(text: str, n: int) -> float:
    found = ngrams(text, n)
    [(top, count)] = Counter(words for words, _ in found).most_common(1) or [((), 0)]  # the first of several
    return share_of_chars(text, [span for words, span in found if words == top]) if count > 1 else 0.0


def duplicates_by_hand(text: str, n: int) -> float:
    seen: set[tuple[str, ...]] = set()
    spans = []
    for words, span in ngrams(text, n):
        if words in seen:
            spans.append(span)
        seen.add(words)
    return share_of_chars(text, spans)


def parts_by_hand(text: str, separator: str, in_chars: bool) -> float:
    parts = [part.strip() for part in text.split(separator) if part.strip()]
    again = [part for place, part in enumerate(parts) if part in parts[:place]]
    return sum(map(len, again)) / max(len(text), 1) if in_chars else len(again) / max(len(parts), 1)


def lines_by_hand(text: str, holds: Callable[[str], bool]) -> float:
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return sum(1 for line in lines if holds(line)) / max(len(lines), 1)


def letters_by_hand(text: str, low: str, high: str) -> float:
    letters = [char for char in text if char.isalpha()]
    return sum(low <= char <= high for char in letters) / max(len(letters), 1)


def by_hand(text: str) -> dict[str, float]:
    words = [text[start:end] for start, end in word_spans(text)]
    tokens = text.split()
    forms = {
        form
        for word in ["the", "be", "to", "of", "and", "that", "have", "with"]
        for form in (word, word.title(), word.upper())
    }
    expected = {
        "n_words": len(words),
        "mean_word_length": sum(map(len, words)) / max(len(words), 1),
        "alphabetic_words": sum(any(c.isalpha() for c in token) for token in tokens) / max(len(tokens), 1),
        "stop_words": len({word.lower() for word in words if word in forms}),
        "symbol_to_word": max(text.count("#"), text.count("...")) / max(len(words), 1),
        "newlines_per_word": text.count("\n") / max(len(words), 1),
        "bullet_lines": lines_by_hand(text, lambda line: line[0] in "-*•"),
        "ellipsis_lines": lines_by_hand(text, lambda line: line.endswith("...")),
        "terminal_lines": lines_by_hand(text, lambda line: line[-1] in ".。！"),
        "short_lines": lines_by_hand(text, lambda line: len(line) <= 30),
        "duplicate_lines": parts_by_hand(text, "\n", False),
        "duplicate_line_chars": parts_by_hand(text, "\n", True),
        "duplicate_paragraphs": parts_by_hand(text, "\n\n", False),
        "duplicate_paragraph_chars": parts_by_hand(text, "\n\n", True),
        "lorem_ipsum": text.lower().count("lorem ipsum"),
        "curly_brackets": text.count("{"),
        "latin": letters_by_hand(text, "A", "z"),
        "han": letters_by_hand(text, "一", "鿿"),
        "unspaced": letters_by_hand(text, "一", "鿿"),
    }
    expected |= {f"top_{n}_gram": top_by_hand(text, n) for n in (2, 3, 4)}
    return expected | {f"duplicate_{n}_gram_chars": duplicates_by_hand(text, n) for n in range(5, 11)}


PIECES = {
    "english": [
        "the",
        "The",
        "WITH",
        "a",
        "rain",
        "in",
        "Spain",
        "stays",
        "12",
        "mainly...",
        "on",
        "#",
        "plain.",
        "-",
        "*",
        "{",
        "Lorem",
        "ipsum",
        ",",
        "and",
        "that",
    ],
    "chinese": [*"床前明月光疑是地上霜。！", "明月", "...", "x", "#", "12"],
}


@pytest.mark.parametrize("stretch", [37, 1 << 19])
@pytest.mark.parametrize("language", PIECES)
def test_signals_of_a_batch_are_those_found_one_by_one(
    monkeypatch: pytest.MonkeyPatch, language: str, stretch: int
) -> None:
    monkeypatch.setattr("moray.data.curation.words.STRETCH", stretch)
    chance = random.Random(0)
    texts = ["", " \n", "12 34", "a"]
    for _ in range(400):
        space = " " if language == "english" else ""
        phrases = [space.join(chance.choices(PIECES[language], k=chance.randrange(1, 13))) for _ in range(6)]
        texts.append(
            "".join(phrase + chance.choice([" ", " ", "\n", "\n\n"]) for phrase in chance.choices(phrases, k=9))
        )
    found = signals(texts)
    expected = [by_hand(text) for text in texts]
    for name in expected[0]:
        assert found[name] == pytest.approx([one[name] for one in expected]), name
    assert found["duplicate_10_gram_chars"].any()  # or else nothing was compared
    zeros = {"greek", "cyrillic", "hebrew", "arabic", "devanagari", "thai", "hangul", "kana"}
    assert set(SIGNALS) == {*expected[0], *zeros, "n_sentences"}


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("top_2_gram", "a b x a b", 6 / 9),
        ("top_2_gram", "a a a a", 7 / 7),  # characters count once
        ("top_2_gram", "all these are different", 0),
        ("duplicate_5_gram_chars", "a b c d e. a b c d e", 9 / 20),  # the first place isn't counted
        ("duplicate_5_gram_chars", "a b c d e f a b c d e f", 11 / 23),  # and of two that overlap each character once
        ("duplicate_5_gram_chars", "明月光疑是，明月光疑是", 5 / 11),
        ("duplicate_6_gram_chars", "a b c d e. a b c d e", 0),
        ("mean_word_length", "It's fine", 7 / 3),
        ("alphabetic_words", "a1 | 22 | -- b", 2 / 6),
        ("stop_words", "The thing to be: to BE", 3),
        ("symbol_to_word", "wait…… # for … it", 2 / 3),
        ("terminal_lines", "他走了。\n“好！”\n標題\nA title", 0.5),
        ("bullet_lines", "• a\n- b\n□明\nc", 0.5),
        ("newlines_per_word", "a\n\nb", 1),
        ("n_sentences", "One. Two!\n\nThree", 3),
        ("latin", "abc 中", 0.75),
        ("kana", "ひらカナ漢", 0.8),
        ("cyrillic", "да, yes", 0.4),
        ("unspaced", "ไทย", 1),
    ],
)
def test_signals_by_example(name: str, text: str, value: float) -> None:
    assert signals(["other other", text, ""], {name})[name][1] == pytest.approx(value)


def test_repeats_of_another_text_are_none() -> None:
    text = "one two three four five six seven eight nine ten"
    found = signals([text] * 3, {"duplicate_5_gram_chars", "top_2_gram"})
    assert not found["duplicate_5_gram_chars"].any()
    assert not found["top_2_gram"].any()


def test_only_what_is_wanted_comes_and_no_text_is_no_trouble() -> None:
    found = signals([], SIGNALS)
    assert list(found) == list(SIGNALS)
    assert all(values.shape == (0,) and values.dtype == np.float64 for values in found.values())
    assert list(signals(["a b"], ["n_words"])) == ["n_words"]
    assert {values.dtype for values in signals(["a b 中", ""]).values()} == {np.dtype(np.float64)}
