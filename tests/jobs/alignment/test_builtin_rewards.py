"""Built-in rewards against tables made by hand."""

from typing import Any

import pytest

from moray.jobs.alignment.builtin_rewards import builtin
from moray.jobs.alignment.rewards import Sample, parse_rewards


def judged(name: str, answer: str, reference: Any) -> float:
    (reward,) = parse_rewards([f"{name}=1"])
    return builtin(reward)(Sample("k", "Q", answer, reference, ended=True, tokens=()))


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("57", "57", True),
        (" 57\n", 57, True),
        ("57", "5", False),
        ("5 57", "57", False),
        ("-5", "5", False),
        ("57.", "57", False),
        ("The  White\tWhale", "the white whale", True),
        ("cafe\u0301", "caf\u00e9", True),
        ("x²", "x2", False),
        ("straße", "STRASSE", True),
        ("two", ["2", "two"], True),
        ("three", ["2", "two"], False),
        ("2 two", ["2", "two"], False),
        ("true", True, True),
        ("0.5", 0.5, True),
        ("", "57", False),
    ],
)
def test_exact(answer: str, reference: Any, right: bool) -> None:
    assert judged("exact", answer, reference) == right


@pytest.mark.parametrize(
    ("answer", "reference", "strict", "flexible"),
    [
        ("6 * 12 = <<6*12=72>>72 whales.\n#### 72", "72", True, True),
        ("#### -1,234" + " and so it is, for all I know" * 14, "-1234", True, True),
        ("#### 1,234", -1234, False, False),
        ("#### 18.00", 18, True, True),
        ("#### $18", "18", True, True),
        ("it is 72", "72", False, True),
        ("it is 72, not 7", "72", False, False),
        ("#### 7\nNo:\n#### 72", "72", True, True),
        ("#### 72\nNo:\n#### 7", "72", False, False),
        ("172", "72", False, False),
        ("#### 172", "72", False, False),
        # Guesses in a row are one guess, wherever the right one stands but at the end.
        ("#### " + " ".join(map(str, range(100))), "72", False, False),
        ("#### seventy-two, so 72", "72", True, True),
        ("72 ####", "72", False, True),
        ("#### 72", ["71", 72], True, True),
        ("#### 72", "He counts 6.\n#### 72", True, True),
        ("#### 10000000000000000", 1e16, True, True),
        ("", "72", False, False),
    ],
)
def test_gsm8k(answer: str, reference: Any, strict: bool, flexible: bool) -> None:
    assert judged("gsm8k", answer, reference) == strict
    assert judged("gsm8k:flexible", answer, reference) == flexible


@pytest.mark.parametrize("name", ["exact", "gsm8k"])
@pytest.mark.parametrize("reference", [None, [], {"answer": 72}, [["72"]]])
def test_a_reference_that_nothing_equals_is_an_error(name: str, reference: Any) -> None:
    with pytest.raises(ValueError, match="the reference must be"):
        judged(name, "#### 72", reference)


@pytest.mark.parametrize("reference", ["3/4", "seventy", "#### seventy", True, float("nan"), ["72", "many"]])
def test_gsm8k_wants_a_number(reference: Any) -> None:
    with pytest.raises(ValueError, match="must be a number, or end in"):
        judged("gsm8k", "#### 72", reference)


@pytest.mark.parametrize(
    ("pattern", "answer", "right"),
    [
        ("[0-9]+", "57", True),
        ("[0-9]+", "57\n", False),
        ("[0-9]+", "x57", False),
        ("<think>.*</think>.*", "<think>a\nb</think>c", False),
        ("(?s)<think>.*</think>.*", "<think>a\nb</think>c", True),
        ("a|ab", "ab", True),
        ("x=[0-9]{1,3}", "x=123", True),
    ],
)
def test_format(pattern: str, answer: str, right: bool) -> None:
    assert judged(f"format:{pattern}", answer, None) == right
