"""Rules against the papers' tables, and documents planted so that each breaks one rule."""

import re

import pytest

from moray import UserError
from moray.data.curation.rules import RULE_SETS, Verdict, judge, rules_named

# Gopher: A1.1 and table A1; C4: section 2.2; FineWeb: datatrove's defaults; FineWeb2: cmn_Hani.
BOUNDS = {
    "gopher-quality": {
        "n_words": (50, 100_000),
        "mean_word_length": (3, 10),
        "symbol_to_word": (None, 0.1),
        "bullet_lines": (None, 0.9),
        "ellipsis_lines": (None, 0.3),
        "alphabetic_words": (0.8, None),
        "stop_words": (2, None),
    },
    "gopher-repetition": {
        "duplicate_lines": (None, 0.3),
        "duplicate_paragraphs": (None, 0.3),
        "duplicate_line_chars": (None, 0.2),
        "duplicate_paragraph_chars": (None, 0.2),
        "top_2_gram": (None, 0.2),
        "top_3_gram": (None, 0.18),
        "top_4_gram": (None, 0.16),
        "duplicate_5_gram_chars": (None, 0.15),
        "duplicate_6_gram_chars": (None, 0.14),
        "duplicate_7_gram_chars": (None, 0.13),
        "duplicate_8_gram_chars": (None, 0.12),
        "duplicate_9_gram_chars": (None, 0.11),
        "duplicate_10_gram_chars": (None, 0.1),
    },
    "c4": {"lorem_ipsum": (None, 0), "curly_brackets": (None, 0), "n_sentences": (5, None)},
    "fineweb": {
        "terminal_lines": (0.12, None),
        "short_lines": (None, 0.67),
        "duplicate_line_chars": (None, 0.01),
        "newlines_per_word": (None, 0.3),
    },
    "chinese": {
        "n_words": (50, 100_000),
        "symbol_to_word": (None, 0.1),
        "bullet_lines": (None, 0.9),
        "terminal_lines": (0.106, None),
        "duplicate_lines": (None, 0.287),
        "duplicate_10_gram_chars": (None, 0.182),
    },
}


def test_bounds_are_the_published_ones() -> None:
    assert {name: {r.signal: (r.low, r.high) for r in rules} for name, rules in RULE_SETS.items()} == BOUNDS
    names = [rule.name for rules in RULE_SETS.values() for rule in rules]
    assert len(set(names)) == len(names)


NUMBERS = [f"word{chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(500)]


def prose(n: int, start: int = 0) -> str:
    """n different words, some of them stop words, in sentences of ten."""
    words = ["the", "of", *NUMBERS[start:]][:n] if start == 0 else NUMBERS[start : start + n]
    return " ".join(word + "." * (place % 10 == 9) for place, word in enumerate(words)) + "."


def twice(within: str, between: str, around: str, size: int) -> str:
    """Four parts of four words that come twice, each time before another one of three words that comes once.

    Words have `size` letters; no five in a row come twice.
    """
    words = [chr(0x100 + n) * size for n in range(40)]
    again = [within.join(words[n : n + 4]) for n in range(0, 16, 4)]
    once = [between.join(words[n : n + 3]) for n in range(16, 40, 3)]
    return around.join(part for pair in zip(again * 2, once, strict=True) for part in pair)


GOOD = prose(120)
CHINESE = "".join(chr(0x4E00 + n) + ("。" if n % 7 == 6 else "") for n in range(91))
POEM = "床前明月光，疑是地上霜。舉頭望明月，低頭思故鄉。"
PLANTED = {
    "gopher_n_words": prose(20),
    "gopher_mean_word_length": "the of " + " ".join(word * 3 for word in NUMBERS[:80]),
    "gopher_symbol_to_word": GOOD + " #" * 20,
    "gopher_bullet_lines": "\n".join(f"- {prose(8, 1 + 8 * n)}" for n in range(20)) + " the of",
    "gopher_ellipsis_lines": "\n".join(prose(12, 1 + 12 * n) + ".." for n in range(9)) + " the of...",
    "gopher_alphabetic_words": GOOD + " |" * 40,
    "gopher_stop_words": prose(120, 1),
    "gopher_duplicate_lines": "\n".join([*[prose(30, 1 + 30 * n) for n in range(6)], *["so so"] * 5]),
    "gopher_duplicate_paragraphs": "\n\n".join(
        [*[f"{prose(9, 1 + 9 * n)}\n{prose(9, 200 + 9 * n)}\n{n}{n}" for n in range(7)], *["so it is"] * 5]
    ),
    "gopher_duplicate_line_chars": twice(" ", "\n", "\n", 12),
    "gopher_duplicate_paragraph_chars": twice("\n", "\n", "\n\n", 1),
    "gopher_top_2_gram": " ".join(f"aye nay {word}" for word in NUMBERS[:30]),
    "c4_lorem_ipsum": GOOD + " Lorem ipsum.",
    "c4_curly_brackets": GOOD + " {",
    "c4_n_sentences": prose(30),
    "fineweb_terminal_lines": "\n".join(prose(10, 1 + 10 * n).rstrip(".") for n in range(10)),
    "fineweb_short_lines": "\n".join([*[prose(4, 1 + 4 * n) for n in range(10)], prose(20, 100)]),
    "fineweb_duplicate_line_chars": "\n".join([prose(50, 1), prose(20, 100), prose(20, 100)]),
    "fineweb_newlines_per_word": "\n\n\n\n".join(prose(7, 1 + 7 * n) for n in range(10)),
    "chinese_n_words": POEM,
    "chinese_symbol_to_word": "#" * 12 + CHINESE,
    "chinese_bullet_lines": "\n".join("• " + CHINESE[n : n + 12] + "。" for n in range(0, 96, 12)),
    "chinese_terminal_lines": "\n".join(CHINESE.replace("。", "")[n : n + 12] for n in range(0, 72, 12)),
    "chinese_duplicate_lines": "\n".join([CHINESE[:48], CHINESE[48:], *["好。"] * 3]),
    "chinese_duplicate_10_gram_chars": CHINESE + CHINESE[:64],
}
"""By the rule of its set that the text breaks first."""


@pytest.mark.parametrize("name", PLANTED)
def test_a_text_that_breaks_a_rule_is_told_so(name: str) -> None:
    rules = next(rules for rules in RULE_SETS.values() if name in {rule.name for rule in rules})
    kept = CHINESE if name.startswith("chinese") else GOOD
    before, verdict, after = judge([kept, PLANTED[name], kept], rules)
    assert (before, after) == (None, None)
    assert verdict is not None
    assert verdict.rule == name
    # And with this rule off, no other one.
    assert judge([PLANTED[name]], rules_named([rule.name for rule in rules], {name: ".."})) == [None]


@pytest.mark.parametrize("n", range(3, 11))
def test_each_length_of_n_grams_has_its_rule(n: int) -> None:
    """A run of n words that comes back, each time among other words: rules of shorter runs are left out."""
    name = f"gopher_top_{n}_gram" if n < 5 else f"gopher_duplicate_{n}_gram_chars"
    run = " ".join(NUMBERS[:n])
    text = " ".join(f"{run} {word}" for word in NUMBERS[20:30])
    assert [verdict and verdict.rule for verdict in judge([text, GOOD], rules_named([name]))] == [name, None]
    longer = rules_named(["gopher-repetition"])
    longer = tuple(rule for rule in longer if rule.signal.startswith("duplicate_") and f"_{n + 1}_gram" in rule.signal)
    assert judge([text], longer) == [None]


def test_the_first_rule_in_order_is_named_with_value_and_bound() -> None:
    text = "one two # # #"  # too short and full of symbols
    assert judge([text], rules_named(["gopher-quality"])) == [Verdict("gopher_n_words", 2.0, ">= 50")]
    turned = rules_named(["gopher_symbol_to_word", "gopher-quality"])
    assert judge([text], turned) == [Verdict("gopher_symbol_to_word", 1.5, "<= 0.1")]


def test_a_value_at_a_bound_is_kept() -> None:
    rules = rules_named(["gopher_n_words"])
    assert judge([prose(50), prose(49)], rules) == [None, Verdict("gopher_n_words", 49.0, ">= 50")]


def test_rules_for_english_never_judge_chinese() -> None:
    english = rules_named(["gopher-quality", "gopher-repetition", "c4", "fineweb"])
    assert judge([POEM, CHINESE, POEM * 9, "ภาษาไทย" * 3], english) == [None] * 4
    rules = rules_named(["chinese"])
    assert judge([POEM, GOOD, "short"], rules) == [Verdict("chinese_n_words", 20.0, ">= 50"), None, None]


def test_stop_words_of_english_are_asked_of_latin_letters_alone() -> None:
    russian = " ".join(f"слово{chr(0x430 + n // 20)}{chr(0x430 + n % 20)}" for n in range(120)) + "."
    assert judge([russian], rules_named(["gopher-quality"])) == [None]


def test_rules_are_named_once_in_order_with_changed_bounds() -> None:
    rules = rules_named(["c4_n_sentences", "c4"], {"c4_n_sentences": "3..", "c4_curly_brackets": "..5"})
    assert [rule.name for rule in rules] == ["c4_n_sentences", "c4_lorem_ipsum", "c4_curly_brackets"]
    assert [(rule.low, rule.high) for rule in rules] == [(3, None), (None, 0), (None, 5)]
    assert rules[0].source.startswith("set to 3..; was: Raffel")
    assert rules_named(["gopher_n_words"], {"gopher_n_words": "30..1e6"})[0].high == 1_000_000
    assert rules_named([]) == ()


@pytest.mark.parametrize(
    ("names", "changed", "said"),
    [
        (["gopher-qualty"], {}, "rules.sets=gopher-qualty is no rule or set of rules; did you mean gopher-quality?"),
        (["zzz"], {}, "rules.sets=zzz is no rule or set of rules; there are gopher-quality, gopher-repetition"),
        (
            ["c4"],
            {"c4_n_sentence": "3.."},
            "rules.bounds has c4_n_sentence, which is none of the rules chosen",
        ),
        (
            ["c4"],
            {"c4_n_sentences": "3"},
            "rules.bounds: those of c4_n_sentences are '3', and should be like 50..100000",
        ),
        (["c4"], {"c4_n_sentences": "a..b"}, "rules.bounds: those of c4_n_sentences are 'a..b'"),
        (["c4"], {"c4_n_sentences": "9..3"}, "rules.bounds: those of c4_n_sentences are '9..3'"),
        (["c4"], {"c4_n_sentences": "nan.."}, "rules.bounds: those of c4_n_sentences are 'nan..'"),
    ],
)
def test_mistakes_are_told(names: list[str], changed: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        rules_named(names, changed)
