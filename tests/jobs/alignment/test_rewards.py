"""What rl.rewards may say, and what it is told where it says something else."""

import pytest

from moray import UserError
from moray.jobs.alignment.rewards import Reward, parse_rewards


@pytest.mark.parametrize(
    ("value", "rewards"),
    [
        ("exact=1", [("exact", 1.0, "builtin", "")]),
        (
            "gsm8k=1.0,format:REGEX=0.2,my_rewards:length=-0.1",
            [
                ("gsm8k", 1.0, "builtin", ""),
                ("format:REGEX", 0.2, "builtin", "REGEX"),
                ("my_rewards:length", -0.1, "function", "length"),
            ],
        ),
        (
            " gsm8k:flexible = .5 , model:runs/a,b=c = 1e-1",
            [("gsm8k:flexible", 0.5, "builtin", "flexible"), ("model:runs/a,b=c", 0.1, "model", "runs/a,b=c")],
        ),
        # Commas, equals signs and colons of expressions; a space before the last equals sign is of the expression.
        (
            "format:a{1,3}=b, (?:c|d)=1,2 =0.5,pack.age:Class.judge=0",
            [
                ("format:a{1,3}=b, (?:c|d)=1,2 ", 0.5, "builtin", "a{1,3}=b, (?:c|d)=1,2 "),
                ("pack.age:Class.judge", 0.0, "function", "Class.judge"),
            ],
        ),
        # What a word cannot say, a list can.
        (["format:x=1,exact=2=3"], [("format:x=1,exact=2", 3.0, "builtin", "x=1,exact=2")]),
        (
            ["format:(?s)a\n.*=1", "exact=2"],
            [("format:(?s)a\n.*", 1, "builtin", "(?s)a\n.*"), ("exact", 2, "builtin", "")],
        ),
    ],
)
def test_entries_have_names_weights_and_kinds(
    value: str | list[str], rewards: list[tuple[str, float, str, str]]
) -> None:
    found = parse_rewards(value)
    assert [(each.name, each.weight, each.kind, each.argument) for each in found] == rewards
    assert parse_rewards([str(each) for each in found]) == found


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "rl.rewards is empty"),
        ([], "rl.rewards is empty"),
        ("exact", r"rl.rewards=exact must be NAME=WEIGHT"),
        ("exact=much", r"rl.rewards=exact=much must be NAME=WEIGHT"),
        (["exact=1", "gsm8k"], r"rl.rewards=gsm8k must be NAME=WEIGHT"),
        ("exact=1,", r"rl.rewards=exact=1, must be NAME=WEIGHT"),
        ("gms8k=1,exact=1", r"there is no built-in gms8k, .*; did you mean gsm8k\?"),
        ("exact:strictly=1", r"there is no built-in exact:strictly, .*; did you mean exact\?"),
        (
            "my_rewards.length=1",
            r"there is no built-in my_rewards.length, .* is written module:function; there are exact, ",
        ),
        ("fromat:[0-9]+=1", r"fromat:\[0-9\]\+ must be module:function, .* did you mean format:REGEX\?"),
        ("format=1", r"rl.rewards=format=1.0 must say the expression"),
        ("format:(=1", r"\( is no regular expression: missing \)"),
        ("model:=1", r"must name the reward model's run"),
        ("exact=nan", r"the weight must be a finite number"),
        ("a:b=-inf", r"the weight must be a finite number"),
        ("exact=-1", r"exact=-1.0: a negative weight would reward what is wrong"),
        ("model:runs/a=-1", r"a negative weight would reward what is wrong"),
        ("exact=0,a:b=0", r"exact=0.0,a:b=0.0: all weights are 0"),
        ("exact=1,gsm8k=1,exact=0.5", r"has exact twice"),
    ],
)
def test_what_is_no_reward_is_told(value: str | list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_rewards(value)


def test_weights_read_as_they_were_written() -> None:
    assert [str(Reward("exact", weight)) for weight in (1.0, 0.1, 1e-7)] == ["exact=1.0", "exact=0.1", "exact=1e-07"]
