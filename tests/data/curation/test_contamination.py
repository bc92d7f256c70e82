"""Runs of words shared with evaluation texts, against sets of tuples in Python."""

import random

import pytest

from moray.data.curation.contamination import Benchmarks
from moray.data.curation.words import Words, folded

QUESTION = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many clips?"
)
LOOKS_DIFFERENT = (
    "NATALIA sold (clips) to 48 of her friends -- in\nApril; and then, she  sold half as many clips in May how many"
)


def found(benchmarks: Benchmarks, *texts: str) -> list[int]:
    return benchmarks.found(Words.of([folded(text) for text in texts])).tolist()


def vocabulary(n: int) -> list[str]:
    return [f"w{number}" for number in range(n)]


def test_a_planted_question_is_found_whatever_it_looks_like() -> None:
    around = " ".join(vocabulary(50))
    benchmarks = Benchmarks.of([QUESTION, "床前明月光，疑是地上霜。举头望明月，低头思故乡。"])
    n_runs = 23 - 13 + 1
    planted = [f"{around} {QUESTION} {around}", f"{around} {LOOKS_DIFFERENT} {around}"]
    assert found(benchmarks, *planted, around) == [n_runs, n_runs - 1, 0]
    assert found(benchmarks, "詩：床前明月光疑是地上霜舉頭") == [0]  # 10 of its characters in a row
    assert found(benchmarks, "床前明月光疑是地上霜举头望……") == [1]


def test_twelve_words_of_a_longer_question_are_no_match() -> None:
    words = QUESTION.split()
    benchmarks = Benchmarks.of([QUESTION])
    assert found(benchmarks, " ".join(words[3:15]), " ".join(words[3:16]), "") == [0, 1, 0]
    assert found(benchmarks, " ".join([*words[:12], "no", *words[13:]])) == [0]
    # Nor are words of two documents that stand side by side in a batch.
    assert found(benchmarks, " ".join(words[:7]), " ".join(words[7:])) == [0, 16 - 13 + 1]


@pytest.mark.parametrize("n", [8, 9, 12])
def test_of_a_short_text_all_words_are_one_run(n: int) -> None:
    words = vocabulary(n)
    benchmarks = Benchmarks.of([" ".join(words)])
    assert (benchmarks.lengths, benchmarks.n_texts, len(benchmarks.hashes)) == ((n,), 1, 1)
    assert found(benchmarks, " ".join(words), " ".join(["a", *words, "b"]), " ".join(words[1:]), "") == [1, 1, 0, 0]


def test_texts_below_eight_words_are_counted_and_never_found() -> None:
    benchmarks = Benchmarks.of(["one two three four five six seven", "", QUESTION])
    assert (benchmarks.n_texts, benchmarks.n_short, benchmarks.lengths) == (1, 2, (13,))
    assert found(benchmarks, "one two three four five six seven eight", "") == [0, 0]
    assert found(Benchmarks.of(["too short"]), QUESTION) == [0]
    assert Benchmarks.of(["too short"]).example(QUESTION) == ""


def test_counts_are_those_of_sets_of_tuples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moray.data.curation.words.STRETCH", 200)
    chance = random.Random(0)
    asked = [chance.choices("ab", k=chance.randrange(30)) for _ in range(60)]
    documents = [chance.choices("ab", k=chance.randrange(60)) for _ in range(100)]
    known = set()
    for words in asked:
        n = min(13, len(words))
        known |= {tuple(words[start : start + n]) for start in range(len(words) - n + 1) if n >= 8}
    benchmarks = Benchmarks.of([" ".join(words) for words in asked])
    assert len(benchmarks.hashes) == len(known)
    assert found(benchmarks, *(" ".join(words) for words in documents)) == [
        sum(tuple(words[start : start + n]) in known for n in range(8, 14) for start in range(len(words) - n + 1))
        for words in documents
    ]


def test_a_shared_run_is_shown() -> None:
    benchmarks = Benchmarks.of([QUESTION, " ".join(vocabulary(9))])
    assert benchmarks.example(f"Quoth she: {LOOKS_DIFFERENT}").split() == (
        ["natalia", "sold", "(clips)", "to", "48", "of", "her", "friends", "--", "in", "april;", "and", "then,", "she"]
    )
    assert benchmarks.example("W0 ﻿w1 w2 w3 w4 w5 w6 w7, w8, w9").endswith("w7, w8")
    assert benchmarks.example("nothing of it") == ""


def test_hashes_stay_what_they_are() -> None:
    hashes = Benchmarks.of([" ".join(vocabulary(9)), "明" * 13]).hashes
    assert hashes.tolist() == [4395363651296388608, 13853193545961840307]
