"""Rules for a text: bounds on signals, as published, and the first one that a text breaks."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from moray import UserError, nearest
from moray.data.curation.signals import signals

Scripts = Literal["any", "spaced", "latin", "chinese"]

UNSPACED_SHARE = 0.3
"""Above this share of its letters a text is one of a script without spaces (Chinese: of Han)."""


@dataclass(frozen=True)
class Rule:
    """A text breaks it whose signal is below `low` or above `high`; one at a bound does not. None: no bound.

    It is for texts whose letters are in `scripts`: "spaced" parts words by spaces, "latin" is that and mostly Latin
    letters (for rules that are really about English). A text is never judged by a rule that isn't for it.
    """

    name: str
    signal: str
    low: float | None
    high: float | None
    scripts: Scripts
    source: str


@dataclass(frozen=True)
class Verdict:
    """The rule that a text breaks first, the value of its signal and the bound it is past (">= 50")."""

    rule: str
    value: float
    bound: str


_QUALITY = "Rae et al. 2021 (Gopher), A1.1, Quality filtering"
_REPETITION = "Rae et al. 2021 (Gopher), table A1"
_C4 = "Raffel et al. 2020 (C4), section 2.2"
_FINEWEB = "Penedo et al. 2024 (FineWeb), section 3.6; bounds of datatrove's FineWebQualityFilter"
_FINEWEB_2 = "Penedo et al. 2025 (FineWeb2), configs/cmn_Hani.yml"
_OURS = "ours: Gopher's rule (A1.1), a character being a word"

GOPHER_QUALITY = (
    Rule("gopher_n_words", "n_words", 50, 100_000, "spaced", _QUALITY),
    Rule("gopher_mean_word_length", "mean_word_length", 3, 10, "spaced", _QUALITY),
    Rule("gopher_symbol_to_word", "symbol_to_word", None, 0.1, "spaced", _QUALITY),
    Rule("gopher_bullet_lines", "bullet_lines", None, 0.9, "spaced", _QUALITY),
    Rule("gopher_ellipsis_lines", "ellipsis_lines", None, 0.3, "spaced", _QUALITY),
    Rule("gopher_alphabetic_words", "alphabetic_words", 0.8, None, "spaced", _QUALITY),
    Rule("gopher_stop_words", "stop_words", 2, None, "latin", _QUALITY),
)

# Lines and paragraphs repeat in any script; n-grams of characters are shorter than those of words.
GOPHER_REPETITION = (
    Rule("gopher_duplicate_lines", "duplicate_lines", None, 0.30, "any", _REPETITION),
    Rule("gopher_duplicate_paragraphs", "duplicate_paragraphs", None, 0.30, "any", _REPETITION),
    Rule("gopher_duplicate_line_chars", "duplicate_line_chars", None, 0.20, "any", _REPETITION),
    Rule("gopher_duplicate_paragraph_chars", "duplicate_paragraph_chars", None, 0.20, "any", _REPETITION),
    Rule("gopher_top_2_gram", "top_2_gram", None, 0.20, "spaced", _REPETITION),
    Rule("gopher_top_3_gram", "top_3_gram", None, 0.18, "spaced", _REPETITION),
    Rule("gopher_top_4_gram", "top_4_gram", None, 0.16, "spaced", _REPETITION),
    Rule("gopher_duplicate_5_gram_chars", "duplicate_5_gram_chars", None, 0.15, "spaced", _REPETITION),
    Rule("gopher_duplicate_6_gram_chars", "duplicate_6_gram_chars", None, 0.14, "spaced", _REPETITION),
    Rule("gopher_duplicate_7_gram_chars", "duplicate_7_gram_chars", None, 0.13, "spaced", _REPETITION),
    Rule("gopher_duplicate_8_gram_chars", "duplicate_8_gram_chars", None, 0.12, "spaced", _REPETITION),
    Rule("gopher_duplicate_9_gram_chars", "duplicate_9_gram_chars", None, 0.11, "spaced", _REPETITION),
    Rule("gopher_duplicate_10_gram_chars", "duplicate_10_gram_chars", None, 0.10, "spaced", _REPETITION),
)

# What C4 asks of pages; what it asks of lines is `Cleaning.lines`. The code that made C4 asks for three sentences of
# five words a line, its paper for five of three. No list of bad words: it drops the wrong pages, and is a download.
C4 = (
    Rule("c4_lorem_ipsum", "lorem_ipsum", None, 0, "any", _C4),
    Rule("c4_curly_brackets", "curly_brackets", None, 0, "any", _C4),
    Rule("c4_n_sentences", "n_sentences", 5, None, "spaced", _C4),
)

FINEWEB = (
    Rule("fineweb_terminal_lines", "terminal_lines", 0.12, None, "spaced", _FINEWEB),
    Rule("fineweb_short_lines", "short_lines", None, 0.67, "spaced", _FINEWEB),
    Rule("fineweb_duplicate_line_chars", "duplicate_line_chars", None, 0.01, "spaced", _FINEWEB),
    Rule("fineweb_newlines_per_word", "newlines_per_word", None, 0.3, "spaced", _FINEWEB),
)

# FineWeb2 counts in words of a segmenter, of 1.6 characters or so: ten characters are about six of them.
CHINESE = (
    Rule("chinese_n_words", "n_words", 50, 100_000, "chinese", _OURS),
    Rule("chinese_symbol_to_word", "symbol_to_word", None, 0.1, "chinese", _OURS),
    Rule("chinese_bullet_lines", "bullet_lines", None, 0.9, "chinese", _OURS),
    Rule("chinese_terminal_lines", "terminal_lines", 0.106, None, "chinese", _FINEWEB_2 + ": line_punct_thr"),
    Rule("chinese_duplicate_lines", "duplicate_lines", None, 0.287, "chinese", _FINEWEB_2 + ": dup_line_frac"),
    Rule(
        "chinese_duplicate_10_gram_chars",
        "duplicate_10_gram_chars",
        None,
        0.182,
        "chinese",
        _FINEWEB_2 + ": dup_n_grams, n = 6",
    ),
)

RULE_SETS: dict[str, tuple[Rule, ...]] = {
    "gopher-quality": GOPHER_QUALITY,
    "gopher-repetition": GOPHER_REPETITION,
    "c4": C4,
    "fineweb": FINEWEB,
    "chinese": CHINESE,
}


def judge(texts: Sequence[str], rules: Sequence[Rule]) -> list[Verdict | None]:
    """For each text the first of the rules, in their order, that it breaks; None where it breaks none."""
    found = signals(texts, {rule.signal for rule in rules} | {"han", "latin", "unspaced"})
    spaced = found["unspaced"] <= UNSPACED_SHARE
    is_in: dict[Scripts, np.ndarray] = {
        "any": np.ones(len(texts), bool),
        "spaced": spaced,
        "latin": spaced & (found["latin"] > 0.5),
        "chinese": found["han"] > UNSPACED_SHARE,
    }
    verdicts: list[Verdict | None] = [None] * len(texts)
    is_open = np.ones(len(texts), bool)
    for rule in rules:
        values = found[rule.signal]
        for past, bound in _past(rule, values):
            broken = np.flatnonzero(is_open & is_in[rule.scripts] & past)
            is_open[broken] = False
            for place in broken.tolist():
                verdicts[place] = Verdict(rule.name, float(values[place]), bound)
    return verdicts


def _past(rule: Rule, values: np.ndarray) -> Iterator[tuple[np.ndarray, str]]:
    if rule.low is not None:
        yield values < rule.low, f">= {rule.low:g}"
    if rule.high is not None:
        yield values > rule.high, f"<= {rule.high:g}"


def rules_named(names: Sequence[str], changed: Mapping[str, str] | None = None) -> tuple[Rule, ...]:
    """The rules of the sets named, or single rules, in their order and each once, some with other bounds.

    `changed` has bounds by a rule's name: "50..100000", "0.5..", "..0.2", or ".." for a rule that nothing breaks.
    Raises UserError for a name that there isn't, for a rule changed that isn't among those named, and for bounds that
    are none.
    """
    known = {**RULE_SETS, **{rule.name: (rule,) for rules in RULE_SETS.values() for rule in rules}}
    for name in names:
        if name not in known:
            raise UserError(f"rules.sets={name} is no rule or set of rules; {nearest(name, known)}")
    rules = {rule.name: rule for name in names for rule in known[name]}
    for name, bounds in (changed or {}).items():
        if name not in rules:
            chosen = nearest(name, rules) if rules else "rules.sets names none"
            raise UserError(f"rules.bounds has {name}, which is none of the rules chosen; {chosen}")
        low, high = _bounds(name, bounds)
        rules[name] = replace(rules[name], low=low, high=high, source=f"set to {bounds}; was: {rules[name].source}")
    return tuple(rules.values())


def _bounds(name: str, text: str) -> tuple[float | None, float | None]:
    low, dots, high = text.partition("..")
    try:
        # A bound that is left open is as one that nothing is past.
        least, most = float(low.strip() or "-inf"), float(high.strip() or "inf")
    except ValueError:
        least, most = math.inf, -math.inf
    if not dots or not least <= most:
        raise UserError(f"rules.bounds: those of {name} are {text!r}, and should be like 50..100000, 0.5.. or ..0.2")
    return least if low.strip() else None, most if high.strip() else None
