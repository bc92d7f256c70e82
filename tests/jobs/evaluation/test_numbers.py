"""Numbers out of answers, against what a reader would say."""

import pytest

from moray.jobs.evaluation.numbers import are_equal, number_behind_hashes, number_of


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("6 * 12 = 72\n#### 72", "72"),
        ("#### -1,234", "-1,234"),
        (
            "#### -1,234" + " so it is, and so on" * 20,
            "-1,234",
        ),
        ("#### $18.50 in all", "18.50"),
        ("#### 72.", "72"),
        ("#### 70 or rather 72", "72"),
        ("#### 3\n#### 4", "4"),
        ("12-5 is 7", "7"),
        ("12-5", "5"),
        ("it is -7", "-7"),
        ("0.75, 1,000, and", "1,000"),
        ("no more than .5", ".5"),
        ("7 and then ####", "7"),
        ("3.14", "3.14"),
        ("#### seven", None),
        ("", None),
    ],
)
def test_the_number_that_an_answer_comes_to(text: str, number: str | None) -> None:
    assert number_of(text) == number


def test_a_reference_must_say_its_number_behind_hashes() -> None:
    assert number_behind_hashes("it is 72") is None
    assert number_behind_hashes("it is 72\n#### seventy-two") is None


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [("1,234", "1234.0", True), ("72", "-72", False), ("0.5", ".50", True), ("7", None, False), ("7", "77", False)],
)
def test_numbers_are_equal_whatever_way_they_are_written(one: str, other: str | None, equal: bool) -> None:
    assert are_equal(one, other) == equal
