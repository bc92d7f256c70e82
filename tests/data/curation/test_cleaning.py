"""Cleaning: each rule by example, and over random strings that clean ones stay and bytes add up."""

import random
import re
import sys
import unicodedata

import pytest

from moray import UserError
from moray.data.curation.cleaning import MAX_MARKS, Cleaning, clean
from moray.data.curation.masking import luhn

CHARACTERS = Cleaning()
LINES = Cleaning(lines=True)
MASK = Cleaning(mask=("email", "ip", "card"))
ALL = Cleaning(lines=True, mask=("email", "ip", "card"))


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("\ufeffa\r\nb\rc\u2028d\u2029e\x85f", "a\nb\nc\nd\ne\nf"),
        ("a\r\x00\nb", "a\nb"),
        ("one\x0ctwo", "one\ntwo"),
        ("a\x07b\tc\x9fd", "ab\tcd"),
        ("cafe\u0301 e\u200b\u0301", "café é"),
        ("in\xadvisible\u200b \u2060x\ufeff", "invisible x"),
        ("  a \u3000\n b\t\n\n\n\n\n\nc\n\n\nd  ", "a\n b\n\n\nc\n\n\nd"),
        ("half\ud800", "half"),
        ("می\u200cخواهم", "می\u200cخواهم"),  # Persian: "I want"
        ("👩\u200d👩\u200d👧", "👩\u200d👩\u200d👧"),
        ("👁\ufe0f\u200d🗨\ufe0f", "👁\ufe0f\u200d🗨\ufe0f"),
        ("ന്\u200d അ", "ന്\u200d അ"),  # Malayalam: behind a virama, at the end of a word
        ("\u200da \u200c b\u200d", "a  b"),
        ("क\u200d\u200dष", "क\u200dष"),
        ("\u200b\ufeff\n\u200d", ""),
    ],
)
def test_characters_by_example(text: str, cleaned: str) -> None:
    assert clean(text, CHARACTERS)[0] == cleaned


def random_text(chance: random.Random) -> str:
    pieces = ["a", "e", " ", "  ", "\n", "\n\n\n", "\r", "\r\n", "\t", "\u200b", "\u200d", "\u200c", "\u0301", "\u0323"]
    pieces += [
        "क",
        "़",
        "\u0958",
        "्",
        "👩",
        "\ufe0f",
        "中",
        "。",
        "\u3000",
        "\xa0",
        "\x00",
        "\ufeff",
        "\ud800",
        "각",
        "\u1100",
    ]
    pieces += ["joe@x.com", "@", ".", "…", "...", "8.8.8.8", "10.0.0.1", "2001:4860:4860::8888", "4111 1111 1111 1111"]
    pieces += [
        "4242-4242-4242-4242",
        "1",
        "-",
        ":",
        "one two three.",
        "JavaScript",
        "\u0301" * 40,
        "\u0315\u0300" * 20,
        "\u1fef",
    ]
    return "".join(chance.choices(pieces, k=chance.randrange(25)))


@pytest.mark.parametrize("how", [CHARACTERS, LINES, MASK, ALL])
def test_cleaning_twice_is_cleaning_once_and_bytes_add_up(how: Cleaning) -> None:
    chance = random.Random(0)
    for _ in range(3000):
        text = random_text(chance)
        cleaned, removed = clean(text, how)
        assert clean(cleaned, how) == (cleaned, dict.fromkeys(removed, 0)), ascii(text)
        n_bytes = len(text.encode("utf-8", "surrogatepass"))
        assert n_bytes - sum(removed.values()) == len(cleaned.encode())  # and no surrogate is left
        assert cleaned == cleaned.strip()
        assert "\n\n\n\n" not in cleaned
        assert not re.search(r"[^\S\n]\n|[\r\x00\ufeff\u200b]", cleaned)
        assert unicodedata.is_normalized("NFC", cleaned)


def test_marks_without_end_are_cut() -> None:
    """Otherwise normalising them takes minutes: its time is quadratic in a run's length."""
    cleaned, _ = clean("a" + "\u0315\u0300" * 150_000, CHARACTERS)
    assert len(cleaned) <= MAX_MARKS + 1


def test_only_steps_asked_for_are_taken_and_counted() -> None:
    assert clean(" a ", Cleaning(characters=False)) == (" a ", {})
    assert clean("\ufeffa", CHARACTERS) == ("a", {"characters": 3})
    assert clean("write to me@x.de now", MASK) == ("write to email@example.com now", {"characters": 0, "mask": -10})


@pytest.mark.parametrize("stretch", [1, 1 << 19])
def test_lines_of_prose_stay(monkeypatch: pytest.MonkeyPatch, stretch: int) -> None:
    monkeypatch.setattr("moray.data.curation.lines.STRETCH", stretch)
    page = [
        "Home",
        "A first line of prose.",
        'She said: "I know."',
        "",
        "This line is cut off...",
        "And this one is too…",
        "Two words.",
        "Please enable JavaScript to see this page.",
        "By going on you agree to our Privacy Policy.",
        "",
        "春眠不覺曉，處處聞啼鳥。",
        "他說：「你好嗎？」",
        "我也不知道……",
        "好。",
        "No full stop here",
    ]
    kept = [page[1], page[2], "", "", page[10], page[11], page[12]]
    assert clean("\n".join(page), LINES)[0].split("\n") == kept


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("to joe.bloggs+x@mail.example-site.co.uk.", "to email@example.com."),
        ("邮箱joe@x.cn，谢谢", "邮箱email@example.com，谢谢"),
        ("@handle and a@b stay", "@handle and a@b stay"),
        (
            "from 8.8.8.8, not v1.2.3.4 or 1.2.3.4.5 or 300.1.1.1",
            "from 192.0.2.1, not v1.2.3.4 or 1.2.3.4.5 or 300.1.1.1",
        ),
        ("192.168.0.1 and 10.1.2.3 and 127.0.0.1", "192.168.0.1 and 10.1.2.3 and 127.0.0.1"),
        ("at 2001:4860:4860::8888: yes", "at 2001:db8::1: yes"),
        ("12:30:45, a::b, fe80::1, 2001:12", "12:30:45, a::b, fe80::1, 2001:12"),
        ("card 4111 1111 1111 1111 or 378282246310005", "card 0000-0000-0000-0000 or 0000-0000-0000-0000"),
        ("卡号4111111111111111。", "卡号0000-0000-0000-0000。"),
        ("4111 1111 1111 1112", "4111 1111 1111 1112"),  # Luhn
        ("ISBN 978-3-16-148410-0", "ISBN 978-3-16-148410-0"),
        (
            "pi 3.1415926535897932, 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15",
            "pi 3.1415926535897932, 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15",
        ),
    ],
)
def test_masks_by_example(text: str, cleaned: str) -> None:
    assert clean(text, MASK)[0] == cleaned


def test_only_kinds_asked_for_are_masked() -> None:
    assert clean("a@b.com 8.8.8.8", Cleaning(mask=("ip",)))[0] == "a@b.com 192.0.2.1"


def test_luhn_is_that_of_the_standard() -> None:
    assert luhn("79927398713")  # the example of the standard's annex
    assert [digit for digit in "0123456789" if luhn("7992739871" + digit)] == ["3"]


@pytest.mark.parametrize(
    "piece", ["a", "1", "a.", "1.", "1 ", "1:", "a@", "@a", "a@a.", " ", "\n", "\r", "\u200d", "2001:"]
)
def test_no_pattern_is_quadratic(piece: str) -> None:
    """A megabyte of what each begins with; a quadratic one would run into the time limit of all tests."""
    assert isinstance(clean(piece * (1_000_000 // len(piece)) + "x", ALL)[0], str)


def test_wrong_decodings_are_undone_and_nothing_else() -> None:
    pytest.importorskip("ftfy")
    how = Cleaning(mojibake=True)
    assert clean("schÃ¶n “so” … ﬁ", how) == ("schön “so” … ﬁ", {"mojibake": 2, "characters": 0})


def test_without_ftfy_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(UserError, match=re.escape("pip install 'moray-train[clean]'")):
        clean("a", Cleaning(mojibake=True))
