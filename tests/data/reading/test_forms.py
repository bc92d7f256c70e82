"""Every form of dialogues, pairs and prompts, by hand."""

import json
from typing import Any

import pytest

from moray.data.reading.forms import Example, examples, kinds_of
from moray.data.reading.records import Reason
from moray.data.reading.rules import Rules
from moray.data.reading.turns import Unfit

U, A, S, T = "user", "assistant", "system", "tool"


def contents(record: dict[str, Any], kind: Any = "chat", **rules: Any) -> list[dict[str, Any]]:
    """As they are once they have been JSON."""
    found = list(examples(record, kind, Rules(kind=kind, **rules)))
    assert all(isinstance(example, Example) for example in found), found
    return [json.loads(json.dumps(example.content)) for example in found if isinstance(example, Example)]


def dialogues(record: dict[str, Any], **rules: Any) -> list[list[list[str]]]:
    return [content["turns"] for content in contents(record, **rules)]


def refused(record: Any, kind: Any = "chat") -> list[tuple[Reason, str]]:
    found = examples(record, kind, Rules(kind=kind))
    return [(unfit.reason, unfit.why) for unfit in found if isinstance(unfit, Unfit)]


@pytest.mark.parametrize(
    ("record", "turns"),
    [
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, [[U, "Add.\n\n1 2"], [A, "3"]]),
        ({"instruction": "Add.", "input": "", "output": "3", "system": "Be exact."},
         [[S, "Be exact."], [U, "Add."], [A, "3"]]),
        ({"instruction": "c", "output": "d", "history": [["a", "b"]]}, [[U, "a"], [A, "b"], [U, "c"], [A, "d"]]),
        ({"prompt": "2 + 2 =\n", "completion": "4<|endoftext|>", "task": "sums"}, [[U, "2 + 2 ="], [A, "4"]]),
        ({"prompt": "a", "response": "b"}, [[U, "a"], [A, "b"]]),
        ({"question": "q", "answer": "1 <<1=1>> #### 1"}, [[U, "q"], [A, "1 <<1=1>> #### 1"]]),
        ({"question": "q", "context": "c", "answer": "a"}, [[U, "c\n\nq"], [A, "a"]]),
        ({"instruction": "q", "context": "", "response": "a"}, [[U, "q"], [A, "a"]]),
        ({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "u"}]},
                       {"role": "assistant", "content": "a"}]}, [[S, "s"], [U, "u"], [A, "a"]]),
        ({"messages": [{"role": "user", "content": "u"},
                       {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]},
                       {"role": "tool", "content": "1"}, {"role": "assistant", "content": "one"}]},
         [[U, "u"], [A, '{"name": "f"}'], [T, "1"], [A, "one"]]),
        ({"conversations": [{"from": "human", "value": "h"}, {"from": "function_call", "value": "f"},
                            {"from": "observation", "value": "o"}, {"from": "gpt", "value": "g"}],
          "tools": [{"name": "f"}], "system": "s"},
         [[S, 's\n\n[{"name": "f"}]'], [U, "h"], [A, "f"], [T, "o"], [A, "g"]]),
        ({"dialogue": [{"speaker": "Ann", "text": "hi"}, {"speaker": "Bob", "text": "hello"},
                       {"speaker": "Ann", "text": "so"}, {"speaker": "Ann", "text": "what now?"}], "response": "tea"},
         [[U, "hi"], [A, "hello"], [U, "so\nwhat now?"], [A, "tea"]]),
        ({"dialogue": [{"speaker": "User", "text": "hi"}], "response": "yes"}, [[U, "hi"], [A, "yes"]]),
    ],
)  # fmt: skip
def test_a_dialogue(record: dict[str, Any], turns: list[list[str]]) -> None:
    assert dialogues(record) == [turns]


def test_several_reference_answers() -> None:
    record = {"instruction": "i", "input": "", "outputs": ["a", "b"]}
    assert dialogues(record) == [[[U, "i"], [A, "a"]], [[U, "i"], [A, "b"]]]
    assert dialogues(record, answers="best") == dialogues(record, answers="first") == [[[U, "i"], [A, "a"]]]


def node(role: str, text: str, *replies: Any, rank: int | None = None, **more: Any) -> dict[str, Any]:
    return {
        "role": role,
        "text": text,
        "rank": rank,
        "deleted": False,
        "review_result": True,
        "replies": [*replies],
    } | more


TREE = {
    "message_tree_id": "t",
    "prompt": node(
        "prompter",
        "q",
        node("assistant", "second", rank=1),
        node("assistant", "best", node("prompter", "more?", node("assistant", "last")), rank=0),
        node("assistant", "gone", node("prompter", "below"), rank=2, deleted=True),
        node("assistant", "spam", rank=3, review_result=False),
        node("assistant", "unranked"),
        node("assistant", " ", rank=4),
    ),
}


def test_every_answer_of_a_tree_ends_a_dialogue() -> None:
    q, best = (U, "q"), (A, "best")
    long = [q, best, (U, "more?"), (A, "last")]
    assert usable(TREE) == [[q, (A, "second")], [q, best], long, [q, (A, "unranked")]]
    left_out = [unfit.reason for unfit in examples(TREE, "chat", Rules(kind="chat")) if isinstance(unfit, Unfit)]
    assert left_out == [Reason.REFUSED, Reason.REFUSED, Reason.EMPTY]
    assert usable(TREE, answers="best") == [[q, best], long]
    assert usable(TREE, answers="first") == [[q, (A, "second")]]
    gone = node("prompter", "q", node("assistant", "gone", rank=0, deleted=True), node("assistant", "kept", rank=1))
    for answers in ("best", "first"):  # what was deleted is no answer
        assert usable({"prompt": gone}, answers=answers) == [[q, (A, "kept")]]


def usable(tree: dict[str, Any], **rules: Any) -> list[list[Any]]:
    found = examples(tree, "chat", Rules(kind="chat", **rules))
    return [example.content["turns"] for example in found if isinstance(example, Example)]


def test_siblings_are_pairs_by_rank() -> None:
    found = [
        example for example in examples(TREE, "preference", Rules(kind="preference")) if isinstance(example, Example)
    ]
    (pair,) = (example.content for example in found)
    assert pair == {"turns": [(U, "q")], "chosen": [(A, "best")], "rejected": [(A, "second")]}


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"question": "q", "response_j": "a", "response_k": "b"},
        {"instruction": "q", "input": "", "chosen_response": "a", "rejected_response": "b"},
        {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"},
         "rejected": {"from": "gpt", "value": "b"}},
        {"prompt": [{"role": "user", "content": "q"}], "chosen": [{"role": "assistant", "content": "a"}],
         "rejected": [{"role": "assistant", "content": "b"}]},
        {"prompt": "q", "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
         "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]},
        # UltraFeedback, binarized: `messages` are the chosen dialogue.
        {"prompt": "q", "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
         "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}],
         "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
         "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]},
    ],
)  # fmt: skip
def test_a_pair(record: dict[str, Any]) -> None:
    assert contents(record, "preference") == [{"turns": [[U, "q"]], "chosen": [[A, "a"]], "rejected": [[A, "b"]]}]


def test_pairs_that_are_none() -> None:
    assert refused({"prompt": "q", "chosen": "a", "rejected": "a"}, "preference") == [(Reason.ALIKE, "")]
    assert refused({"prompt": "q", "chosen": "a", "rejected": " "}, "preference") == [
        (Reason.EMPTY, "an answer is empty")
    ]
    whole = "\n\nHuman: q\n\nAssistant: "  # HH-RLHF's, of which nothing says where a turn ends
    ((reason, _),) = refused({"chosen": whole + "a", "rejected": whole + "b"}, "preference")
    assert reason == Reason.BAD


@pytest.mark.parametrize(
    ("record", "reference"),
    [
        ({"question": "q", "answer": "so\n#### -1,234 dollars\n" + " " * 400}, "-1234"),
        ({"question": "q", "answer": "#### 1 no\n#### 2"}, "2"),
        ({"problem": "q", "solution": "x"}, "x"),
        ({"prompt": [{"role": "user", "content": "q"}], "reward_model": {"ground_truth": "7"}}, "7"),
        ({"instruction": "q", "input": "", "reference": ["a", "b"]}, ["a", "b"]),
        ({"query": "q", "answer": "plain"}, "plain"),
        (
            {
                "problem": "q",
                "solution": "long",
                "answer": "7",
                "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "long"}],
            },
            "long",
        ),
    ],
)
def test_a_prompt_and_its_reference(record: dict[str, Any], reference: Any) -> None:
    """Verl 7274, open-instruct 1530: an answer far from the text's end, and its sign."""
    assert contents(record, "prompts") == [{"turns": [[U, "q"]], "reference": reference}]


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"headline": "x", "body": "y"}, "of no form that is known as chat; its fields: ['body', 'headline']"),
        ([1], "must be an object, not list"),
        ({"instruction": 3, "output": "x"}, "field 'instruction' must be a string, not int"),
        ({"instruction": "x", "output": 3}, "field 'output' must be a string, and 'outputs' a list of such"),
        ({"instruction": "c", "output": "d", "history": ["a"]}, "field 'history' must be a list of pairs"),
        ({"messages": []}, "field 'messages' must be a list of messages, not '[]'"),
        ({"messages": [{"role": "user", "content": 3}]}, "field 'messages': content must be text, not int"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": ["f"]}]}, "tool_calls must be a list of"),
        ({"prompt": {"role": "prompter", "text": "q", "replies": ["x"]}}, "a message of a tree must be an object"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "nobody answers"),
        (
            {"conversations": [{"from": "gpt", "value": "x"}]},
            "roles out of order: turn 1 is assistant's at the beginning",
        ),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "from='alien' is none of system, developer, user"),
        ({"dialogue": "x", "response": "y"}, "field 'dialogue' must be a list of objects with speaker and text"),
    ],
)
def test_a_record_that_is_bad(record: Any, why: str) -> None:
    ((reason, said),) = refused(record)
    assert reason == Reason.BAD
    assert why in said


@pytest.mark.parametrize(
    ("record", "kinds"),
    [
        ({"text": "t", "prompt": "p", "completion": "c"}, ["text"]),
        ({"messages": []}, ["chat"]),
        (TREE, ["chat"]),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, ["preference"]),
        ({"question": "q", "answer": "#### 1"}, ["chat", "prompts"]),
        ({"problem": "q", "ground_truth": "1"}, ["prompts"]),
        ({"body": "x"}, []),
        ("x", []),
    ],
)
def test_the_kind_of_a_record(record: Any, kinds: list[str]) -> None:
    assert kinds_of(record, "text") == kinds
