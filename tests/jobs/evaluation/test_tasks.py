"""Task files: which kind each is, and a line for what is wrong with one."""

import gzip
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import zstandard

from moray import UserError
from moray.jobs.evaluation.tasks import Choice, Question, Text, read_task

CHOICE = {"query": "2 + 2 is", "choices": ["4", "5"], "gold": 0}
QUESTION = {"question": "How many?", "answer": "Two.\n#### 2"}
TEXT = {"text": "The whale."}


def write(path: Path, *items: Any) -> Path:
    path.write_text("".join(f"{item if isinstance(item, str) else json.dumps(item)}\n" for item in items))
    return path


def refusal(path: Path, shots: int = 0) -> str:
    with pytest.raises(UserError) as raised:
        read_task(path, shots, None)
    return str(raised.value).replace(str(path), "FILE")


@pytest.mark.parametrize(("item", "kind"), [(CHOICE, Choice), (QUESTION, Question), (TEXT, Text)])
def test_fields_say_the_kind(tmp_path: Path, item: dict[str, Any], kind: type) -> None:
    path = write(tmp_path / "task.jsonl", {**item, "source": "elsewhere"}, "", item)
    task = read_task(path, 0, None)
    assert task.kind is kind
    assert [each.line for each in task.items] == [1, 3]
    assert task.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_compressed_files_are_read_alike(tmp_path: Path) -> None:
    plain = write(tmp_path / "task.jsonl", CHOICE, CHOICE).read_bytes()
    (tmp_path / "task.jsonl.gz").write_bytes(gzip.compress(plain))
    (tmp_path / "task.jsonl.zst").write_bytes(zstandard.compress(plain))
    for name in ("task.jsonl.gz", "task.jsonl.zst"):
        assert len(read_task(tmp_path / name, 0, None).items) == 2
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(plain)[:-20])
    assert "FILE cannot be read: " in refusal(tmp_path / "cut.jsonl.gz")


def test_the_first_items_are_examples_and_are_not_scored(tmp_path: Path) -> None:
    items = [{"text": f"{n}", "id": n} for n in range(6)]
    task = read_task(write(tmp_path / "task.jsonl", *items), 2, 3)
    assert [each.identity for each in task.examples] == [0, 1]
    assert [each.identity for each in task.items] == [2, 3, 4]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "tasks=FILE is empty: a task file holds a JSON object a line"),
        (["", ""], "tasks=FILE is empty"),
        (['{"text": "a'], "FILE, line 1: not JSON"),
        ([TEXT, "[1]"], "FILE, line 2: must be an object, not list"),
        ([{"texts": "a"}], r"FILE, line 1: the fields \['texts'\] fit no kind of task; one of: query, choices, gold; "),
        ([{"query": "a", "choices": ["b", "c"]}], r"line 1: the fields \['choices', 'query'\] fit no kind of task"),
        ([CHOICE, {"query": "a", "choices": ["b", "c"]}], r"line 2: gold missing; found \['choices', 'query'\]"),
        (
            [CHOICE, TEXT],
            r"line 2: query and choices and gold missing; found \['text'\], and the file's first item has",
        ),
        ([{**CHOICE, "gold": True}], "line 1: gold=True must be the index of the right choice, 0 to 1"),
        ([{**CHOICE, "gold": None}], "line 1: gold=None must be the index"),
        ([{**CHOICE, "gold": "0"}], "line 1: gold='0' must be the index"),
        ([{**CHOICE, "gold": 1.0}], r"line 1: gold=1\.0 must be the index"),
        ([{**CHOICE, "gold": 2}], "line 1: gold=2 must be the index"),
        ([{**CHOICE, "gold": -1}], "line 1: gold=-1 must be the index"),
        ([{**CHOICE, "choices": ["a", ""]}], "line 1: choices holds ''; each must be a text that is not empty"),
        ([{**CHOICE, "choices": ["a", 2]}], "line 1: choices holds 2; each must be a text"),
        ([{**CHOICE, "choices": ["a"]}], r"line 1: choices=\['a'\] must be a list of two texts at least"),
        ([{**CHOICE, "choices": "ab"}], "line 1: choices='ab' must be a list"),
        ([{**CHOICE, "query": ""}], "line 1: query='' must be a text that is not empty"),
        ([{**QUESTION, "answer": "2"}], "line 1: answer='2' must end in `#### N`"),
        ([{**QUESTION, "question": 7}], "line 1: question=7 must be a text"),
        ([{"text": " \n"}], r"line 1: text=' \\n' must not be empty"),
        ([{"text": None}], "line 1: text=None must be a text"),
        (['{"text": "\\ud83d"}'], "line 1: text='.*' must be a text"),
    ],
)
def test_what_is_no_task_is_refused_by_file_and_line(tmp_path: Path, items: list[Any], message: str) -> None:
    assert re.search(message, refusal(write(tmp_path / "task.jsonl", *items)))


def test_shots_must_leave_something_to_score(tmp_path: Path) -> None:
    path = write(tmp_path / "task.jsonl", *[TEXT] * 3)
    assert refusal(path, 3) == "shots=3 leaves nothing to score: FILE has 3 items; give 2 at most"
    assert len(read_task(path, 2, None).items) == 1


def test_files_that_are_no_json_lines(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.jsonl") == "tasks=FILE is no file; give JSON lines, for example arc.jsonl.gz"
    assert "must be JSON lines" in refusal(write(tmp_path / "task.json", CHOICE))
    assert "must be JSON lines" in refusal(write(tmp_path / "task.txt", CHOICE))
