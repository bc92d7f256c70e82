"""Scores and answers of a model that is spread over ranks are those of one process, and so is what is told of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from architectures import MODELS
from pool import Pool
from tiny import tiny
from vocabularies import gpt2

from moray.data.tokenizer import load_tokenizer
from moray.jobs.cli import dispatch
from moray.jobs.evaluation.greedy import continue_greedily
from moray.jobs.evaluation.ranks import ALONE, Ranks
from moray.jobs.evaluation.scoring import Model, Score, Scored, score
from moray.jobs.training.metrics import read_metrics
from moray.model import Decoder, ModelConfig, initialise
from moray.parallel.layout import Layout
from moray.parallel.shard import build_decoder, initialise_shards

Moray = Callable[..., "Outcome"]  # type: ignore[name-defined]  # noqa: F821 - of conftest.py
MODEL = MODELS["moe-deepseek"]
DRAW = np.random.default_rng(0)
SEQUENCES = [Scored(DRAW.integers(0, MODEL.vocab_size, n), int(DRAW.integers(1, n))) for n in DRAW.integers(2, 40, 23)]
PROMPTS = [DRAW.integers(0, MODEL.vocab_size, n) for n in DRAW.integers(1, 20, 7)]
LAYOUTS = [
    Layout(dp_shard=2),
    Layout(dp_shard=1, tp=2),
    Layout(dp_shard=4, ep=2),
    Layout(dp_shard=2, ep=2, dispatcher="allgather"),
    Layout(dp_shard=2, tp=2, ep=4),
]


def found_by(model: Model) -> tuple[list[Score], list[list[int]]]:
    return score(model, SEQUENCES), continue_greedily(model, PROMPTS, 6)


def spread(folder: Path, config: ModelConfig, layout: Layout) -> tuple[list[Score], list[list[int]]]:
    decoder = build_decoder(config, layout.meshes("cpu"), dtype=torch.float64, compute_dtype=torch.float64)
    initialise_shards(decoder, 0)
    ranks = Ranks(layout.dp_rank(dist.get_rank()), layout.dp, layout.tp)
    return found_by(Model(decoder.eval(), load_tokenizer(folder), 64, ranks))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_layout_finds_what_one_process_finds(pool: Pool, tmp_path: Path, layout: Layout) -> None:
    """OpenRLHF 1332: the last, ragged pass counts as any; DeepSpeed 8262: ranks with less to do wait for nobody."""
    folder = gpt2(tmp_path)
    decoder = Decoder(MODEL).double()
    initialise(decoder, 0)
    scores, answers = found_by(Model(decoder.eval(), load_tokenizer(folder), 64, ALONE))
    for found, written in pool.run(spread, layout.world_size, folder, MODEL, layout):
        assert [each.is_greedy for each in found] == [each.is_greedy for each in scores]
        # What is summed of fp32 log-probabilities.
        expected = [each.log_likelihood for each in scores]
        assert [each.log_likelihood for each in found] == pytest.approx(expected, rel=1e-6)
        assert written == answers


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("tasks")
    choices = [{"query": f"{n} and {n} is", "choices": [str(2 * n), str(n)], "gold": n % 2} for n in range(9)]
    texts = [{"text": "def whale(sea):\n    return sea"}, {"text": "import json"}]
    paths = []
    for name, items in (("choices.jsonl", choices), ("texts.v2.jsonl", texts)):
        paths.append(folder / name)
        paths[-1].write_text("".join(json.dumps(item) + "\n" for item in items))
    return paths


def test_tasks_are_asked_while_it_trains(moray: Moray, dataset: Path, tasks: list[Path], tmp_path: Path) -> None:
    """Their numbers are those that `moray evaluate` finds of the commit, and they change nothing in the training."""
    settings = {"train__steps": 4, "train__eval_every": 0}
    asked = {**settings, "eval__tasks": ",".join(map(str, tasks)), "eval__every": 2, "eval__limit": 5}
    for name, changes in (("asked", asked), ("plain", settings)):
        assert dispatch(["pretrain", *tiny(dataset, tmp_path / name, **changes)]) == 0
    rows, plain = (read_metrics(tmp_path / name) for name in ("asked", "plain"))
    names = ["eval/choices/acc", "eval/choices/acc_per_byte", "eval/texts/bits_per_byte"]
    assert [sorted(name for name in row if name.startswith("eval/")) for row in rows] == [[], names, [], names]
    assert [row["loss"] for row in rows] == [row["loss"] for row in plain]
    outcome = moray("evaluate", tmp_path / "asked", "--tasks", *tasks, "--limit", 5, "--out", tmp_path / "found.json")
    assert outcome.code == 0, outcome.err
    report = json.loads((tmp_path / "found.json").read_text())["tasks"]
    found = {
        f"eval/{Path(task['file']).name.split('.')[0]}/{name}": metric["value"]
        for task in report
        for name, metric in task["metrics"].items()
    }
    assert {name: rows[-1][name] for name in names} == pytest.approx(found, rel=1e-6)


def test_task_files_are_looked_at_before_anything_starts(
    moray: Moray, dataset: Path, tasks: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "choices.jsonl").write_text('{"query": "q", "choices": ["a", "b"]}\n')
    for files, message in (
        ([tmp_path / "none.jsonl"], "none.jsonl is no file"),
        ([tmp_path / "choices.jsonl"], "the fields ['choices', 'query'] fit no kind of task"),
        ([tasks[0], tasks[0]], "eval.tasks has two files named choices"),
    ):
        changes: dict[str, Any] = {"eval__tasks": ",".join(map(str, files))}
        outcome = moray("pretrain", *tiny(dataset, tmp_path / "run", **changes))
        assert outcome.code == 2
        assert message in outcome.err
    assert not (tmp_path / "run").exists()


def test_tasks_that_cannot_be_asked_end_no_training(moray: Moray, dataset: Path, tmp_path: Path) -> None:
    """What only the model can tell, hours later: an answer that is longer than it takes."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "q", "chosen": "x y " * 3000, "rejected": "b"}) + "\n")
    changes: dict[str, Any] = {"train__steps": 2, "train__eval_every": 0, "eval__tasks": pairs}
    assert moray("pretrain", *tiny(dataset, tmp_path / "run", **changes)).code == 0
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    (failed,) = [event for event in events if event["kind"] == "tasks_failed"]
    assert "the model takes max_seq_len=2048" in failed["error"]
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2]


def test_several_workers_say_what_one_says(
    moray: Moray, dataset: Path, tasks: list[Path], tmp_path: Path, ray_cluster: str
) -> None:
    assert dispatch(["pretrain", *tiny(dataset, tmp_path / "run", train__steps=1, train__eval_every=0,
                                       optimizer__warmup_steps=1)]) == 0  # fmt: skip
    reports = []
    for name, options in (("one", []), ("two", ["--workers", 2, "--ep", 2])):
        outcome = moray("evaluate", tmp_path / "run", "--tasks", *tasks, "--out", tmp_path / name, *options)
        assert outcome.code == 0, outcome.err
        reports.append(json.loads((tmp_path / name).read_text()))
    one, two = reports
    assert one["model"] == two["model"]
    for mine, theirs in zip(one["tasks"], two["tasks"], strict=True):
        for metric, value in mine["metrics"].items():
            assert theirs["metrics"][metric] == pytest.approx(value, rel=1e-6)
    outcome = moray("evaluate", tmp_path / "run", "--tasks", *tasks, "--workers", 2, "--tp", 3)
    assert outcome.code == 2
    assert "tp=3" in outcome.err
