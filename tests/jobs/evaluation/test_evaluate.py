"""`moray evaluate` as it is typed: what it prints, what it writes, and one line for each mistake."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny

from moray.jobs.cli import dispatch
from moray.jobs.evaluation.scoring import Score
from moray.parallel.checkpoint.commits import list_commits

Moray = Callable[..., "Outcome"]  # type: ignore[name-defined]  # noqa: F821 - of conftest.py
CHOICES = [
    {"query": f"{n} and {n} is", "choices": [str(2 * n), str(2 * n + 1)], "gold": n % 2, "id": "same"} for n in range(7)
]


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CUDA_VISIBLE_DEVICES", "")
        words = tiny(dataset, folder, train__steps=2, checkpoint__every=1, model__max_seq_len=64, cluster__workers=1)
        assert dispatch(["pretrain", *words]) == 0
    return folder


def task_of(path: Path, items: list[Any]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def line_of(outcome: Any) -> str:
    assert (outcome.code, outcome.out) == (2, "")
    (line,) = outcome.err.splitlines()
    return str(line)


def test_several_files_are_one_report(moray: Moray, run: Path, tmp_path: Path) -> None:
    choices = task_of(tmp_path / "choices.jsonl", CHOICES)
    texts = task_of(tmp_path / "texts.jsonl", [{"text": "def whale(sea):"}, {"text": "import json\n" * 30}])
    outcome = moray("evaluate", run, "--tasks", choices, texts, "--out", tmp_path / "found.json", "--items")
    assert (outcome.code, outcome.err) == (0, "")
    report = json.loads((tmp_path / "found.json").read_text())
    commit = list_commits(run / "checkpoints")[-1]
    assert report["model"] == {"folder": str(commit.path), "commit": commit.manifest.digest}
    first, second = report["tasks"]
    assert (first["kind"], first["n"], first["shots"], first["cut"]) == ("multiple choice", 7, 0, 0)
    assert (second["kind"], second["n"], second["cut"]) == ("text", 2, 1)
    # Items of one id are items all the same.
    assert [(each["line"], each["id"]) for each in first["items"]] == [(n, "same") for n in range(1, 8)]
    p = sum(each["chosen"] == each["gold"] for each in first["items"]) / 7
    assert first["metrics"]["acc"] == pytest.approx({"value": p, "standard_error": math.sqrt(p * (1 - p) / 7)})
    bits, size = (sum(each[name] for each in second["items"]) for name in ("bits", "bytes"))
    assert second["metrics"]["bits_per_byte"]["value"] == pytest.approx(bits / size)
    head, *rows, last = outcome.out.splitlines()
    assert head.split() == ["task", "kind", "n", "metric", "value", "standard", "error"]
    assert [row.split()[0] for row in rows] == ["choices.jsonl", "choices.jsonl", "texts.jsonl"]
    assert rows[2].split()[-2:] == [f"{x:.4f}" for x in second["metrics"]["bits_per_byte"].values()]
    assert last == "texts.jsonl: 1 of 2 items longer than the model, and cut into windows"


def test_the_size_of_batches_changes_nothing(moray: Moray, run: Path, tmp_path: Path) -> None:
    task, found = task_of(tmp_path / "choices.jsonl", CHOICES), []
    for batch_tokens in (1, 50, 8192):
        words = (
            "--batch-tokens",
            batch_tokens,
            "--shots",
            2,
            "--limit",
            3,
            "--items",
            "--out",
            tmp_path / "found.json",
        )
        assert moray("evaluate", run, "--tasks", task, *words).code == 0
        found.append(json.loads((tmp_path / "found.json").read_text())["tasks"][0])
    assert [each["line"] for each in found[0]["items"]] == [3, 4, 5]
    for other in found[1:]:
        for one, two in zip(found[0]["items"], other["items"], strict=True):
            assert one["log_likelihoods"] == pytest.approx(two["log_likelihoods"], abs=1e-5)
        assert other["metrics"] == found[0]["metrics"]


def test_a_commit_is_evaluated_by_name(moray: Moray, run: Path, tmp_path: Path) -> None:
    task = task_of(tmp_path / "choices.jsonl", CHOICES)
    first = list_commits(run / "checkpoints")[0]
    assert moray("evaluate", first.path, "--tasks", task, "--out", tmp_path / "found.json").code == 0
    report = json.loads((tmp_path / "found.json").read_text())
    assert report["model"]["commit"] == first.manifest.digest
    assert "items" not in report["tasks"][0]


def test_of_equal_choices_the_first_is_chosen(moray: Moray, run: Path, tmp_path: Path) -> None:
    items = [{"query": "a", "choices": ["b", "b"], "gold": gold} for gold in (0, 1)]
    task = task_of(tmp_path / "choices.jsonl", items)
    assert moray("evaluate", run, "--tasks", task, "--items", "--out", tmp_path / "found.json").code == 0
    (found,) = json.loads((tmp_path / "found.json").read_text())["tasks"]
    assert [(each["chosen"], each["chosen_per_byte"]) for each in found["items"]] == [(0, 0), (0, 0)]
    assert found["metrics"]["acc"]["value"] == 0.5


def test_the_likeliest_per_byte_by_hand(
    moray: Moray, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """-3.3 over 3 bytes is less than -3.6 over 6; of their characters, 3 and 2, it would be more."""
    scores = [Score(-3.3, False), Score(-3.6, False)]
    monkeypatch.setattr("moray.jobs.evaluation.choices.score", lambda model, sequences: scores)
    task = task_of(tmp_path / "choices.jsonl", [{"query": "a", "choices": ["abc", "漢漢"], "gold": 1}])
    assert moray("evaluate", run, "--tasks", task, "--out", tmp_path / "found.json").code == 0
    (found,) = json.loads((tmp_path / "found.json").read_text())["tasks"]
    assert {name: metric["value"] for name, metric in found["metrics"].items()} == {"acc": 0, "acc_per_byte": 1}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shots", "-1"], "shots=-1 must be 0 or more"),
        (["--shots", "7"], "shots=7 leaves nothing to score: "),
        (["--limit", "0"], "limit=0 must be at least 1"),
        (["--batch-tokens", "0"], "batch_tokens=0 must be at least 1, and is best some thousands"),
        (["--last-word"], "last_word=true is for files of texts, and none of the tasks is one"),
        (["--items"], "items=true needs a file that they are written to: --out FILE"),
        (["--out", "nowhere/found.json"], "out=nowhere/found.json must be a file in a folder that exists"),
    ],
)
def test_settings_that_make_no_sense(moray: Moray, run: Path, tmp_path: Path, words: list[str], message: str) -> None:
    assert message in line_of(moray("evaluate", run, "--tasks", task_of(tmp_path / "task.jsonl", CHOICES), *words))


def test_items_that_a_model_cannot_take_are_named(moray: Moray, run: Path, tmp_path: Path) -> None:
    long = {**CHOICES[0], "choices": ["no", "yes " * 100]}
    task = task_of(tmp_path / "task.jsonl", [CHOICES[0], long])
    assert f"{task}, line 2: ' yes yes" in line_of(moray("evaluate", run, "--tasks", task))
    texts = task_of(tmp_path / "texts.jsonl", [{"text": "one two"}, {"text": "one"}])
    line = line_of(moray("evaluate", run, "--tasks", texts, "--last-word"))
    assert f"{texts}, line 2: text='one' must have two words" in line
    assert "shots=1 must be 0 for" in line_of(moray("evaluate", run, "--tasks", texts, "--shots", "1"))


def test_a_model_without_a_tokenizer(moray: Moray, run: Path, tmp_path: Path) -> None:
    assert moray("export", run, "--out", tmp_path / "out").code == 0
    (tmp_path / "out" / "tokenizer.json").unlink()
    line = line_of(moray("evaluate", tmp_path / "out", "--tasks", task_of(tmp_path / "task.jsonl", CHOICES)))
    assert line.endswith("must be a folder that holds a tokenizer.json")


def test_there_must_be_tasks_and_a_model(moray: Moray, run: Path, tmp_path: Path) -> None:
    task = task_of(tmp_path / "task.jsonl", CHOICES)
    assert "--tasks" in line_of(moray("evaluate", run))
    assert "nowhere is not a run: there is no such folder" in line_of(moray("evaluate", "nowhere", "--tasks", task))
