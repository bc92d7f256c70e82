"""Texts of task files."""

import json
from pathlib import Path

import pytest

from moray import UserError
from moray.jobs.datasets.benchmarks import texts_of_tasks


def lines(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_what_would_give_an_item_away_is_its_question_and_its_right_answer(tmp_path: Path) -> None:
    choices = lines(tmp_path / "c.jsonl", {"query": "Sky is", "choices": ["green", "blue"], "gold": 1})
    questions = lines(
        tmp_path / "q.jsonl",
        {"question": "2 + 2?", "answer": "It is #### 4"},
        {"question": "1 + 1?", "answer": "#### 2"},
    )
    assert texts_of_tasks([choices, questions]) == ["Sky is blue", "2 + 2?", "1 + 1?"]


def test_what_is_no_task_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no.jsonl, line 1: the fields \['a'\] fit no kind of task"):
        texts_of_tasks([lines(tmp_path / "no.jsonl", {"a": 1})])
