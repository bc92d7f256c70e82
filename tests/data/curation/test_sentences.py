"""Sentences, counted by hand."""

import pytest

from moray.data.curation.sentences import n_sentences


@pytest.mark.parametrize(
    ("text", "n"),
    [
        ("", 0),
        (" \n\n ", 0),
        ("Dr. Smith went home. It rained in the U.S. for days!", 2),
        ('He said: "I know." Then he left.', 2),
        ("A title\n\nA sentence\nover two lines.", 2),
        ("床前明月光，疑是地上霜。举头望明月，低头思故乡。", 2),
        ("他说：“你好。”我走了！好吗？", 3),
        ("Он родился в 1900 г. в Москве. Она осталась.", 2),
    ],
)
def test_sentences_by_example(text: str, n: int) -> None:
    assert n_sentences(text) == n


def test_long_texts_are_counted_in_pieces() -> None:
    assert n_sentences("It was so. " * 20_000) == 20_000
    assert n_sentences("這是一句話。" * 20_000) == 20_000


def test_quotation_marks_without_end_are_no_trap() -> None:
    """In one piece these take sentencex ten minutes: its time is quadratic in them."""
    assert n_sentences("“好" * 500_000) > 0
