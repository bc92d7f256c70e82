"""Runs on several datasets: what they record, that kills and changes of weights keep to one order, and what they say.

The truth is a run that was told everything at its start, and that nobody touched.
"""

import io
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from tiny import tiny

from moray.cluster.events import read_events
from moray.data.dataset import Dataset
from moray.data.index import write_index
from moray.data.stream import evaluation_batches
from moray.jobs.cli import dispatch
from moray.jobs.config.arguments import parse_settings
from moray.jobs.config.load import load_config
from moray.jobs.datasets.config import PrepareConfig
from moray.jobs.datasets.prepare import prepare
from moray.jobs.generation.generate import load_run
from moray.jobs.report.report import render
from moray.jobs.runs.ledger import ledger_problems
from moray.jobs.runs.status import status_of
from moray.jobs.training.drive import check
from moray.jobs.training.metrics import read_metrics
from moray.parallel.checkpoint.commits import list_commits, read_tensors

STEPS, BATCH, CHANGE = 8, 4, 4
EXACT = ("step", "loss", "grad_norm", "tokens", "positions")
LATER = {"json": "1", "mail": "9"}


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="session")
def mail(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other text, with the tokenizer of `dataset`."""
    folder = tmp_path_factory.mktemp("mixed") / "mail"
    source = Path(sysconfig.get_path("stdlib")) / "email"
    config = PrepareConfig(sources=(source,), out=folder, tokenizer=dataset, validation=0.1)
    prepare(config, Console(file=io.StringIO()))
    return folder


def arguments(dataset: Path, mail: Path, run: Path, json: str = "3", more: str = "1", **changes: object) -> list[str]:
    plan: dict[str, object] = {
        "data__mix": f"mail={more}:{mail},json={json}:{dataset}",
        "train__steps": STEPS,
        "train__eval_every": 4,
        "checkpoint__every": 2,
        "checkpoint__keep": 9,
        "run__trackers": "none",
    }
    return ["pretrain", *tiny(Path(), run, **{"data__path": "", **plan, **changes})]


@pytest.fixture(scope="module")
def untouched(dataset: Path, mail: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "untouched"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CUDA_VISIBLE_DEVICES", "")
        assert dispatch(arguments(dataset, mail, run)) == 0
    return run


@pytest.fixture(scope="module")
def planned(dataset: Path, mail: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Told of a change of weights after four steps when it began."""
    run = tmp_path_factory.mktemp("runs") / "planned"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CUDA_VISIBLE_DEVICES", "")
        assert dispatch(arguments(dataset, mail, run, data__phases=f"{CHANGE}:json=1,mail=9")) == 0
    return run


def assert_same_history(run: Path, truth: Path) -> None:
    ours, theirs = read_metrics(run), read_metrics(truth)
    assert [{key: row[key] for key in EXACT} for row in ours] == [{key: row[key] for key in EXACT} for row in theirs]
    mine, other = (dict(read_tensors(list_commits(path / "checkpoints")[-1])) for path in (run, truth))
    assert mine.keys() == other.keys()
    assert [name for name in mine if not torch.equal(mine[name], other[name])] == []
    assert ledger_problems(run) == []


def data_of(run: Path) -> dict[str, Any]:
    """What the newest commit says of the data."""
    return list_commits(run / "checkpoints")[-1].manifest.metadata["config"]["data"]


def taken_back(source: Path, run: Path, to: int) -> Path:
    """A copy of a run as it was behind that step."""
    shutil.copytree(source, run)
    for commit in list_commits(run / "checkpoints"):
        if commit.step > to:
            shutil.rmtree(commit.path)
    return run


KILLED = """
import os, signal, moray.jobs.training.trainer as trainer
from moray.jobs.cli import main
take_step = trainer.take_step
def take_step_and_die(training, batch):
    row = take_step(training, batch)
    if training.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return row
trainer.take_step = take_step_and_die
main()
"""


def test_a_kill_changes_nothing(dataset: Path, mail: Path, untouched: Path, tmp_path: Path) -> None:
    words = arguments(dataset, mail, tmp_path)
    killed = subprocess.run([sys.executable, "-c", KILLED, *words], capture_output=True, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert dispatch(words) == 0
    assert_same_history(tmp_path, untouched)


def test_a_run_remembers_all_its_sources(dataset: Path, mail: Path, untouched: Path) -> None:
    metadata = list_commits(untouched / "checkpoints")[-1].manifest.metadata
    expected = {name: Dataset.open(folder).fingerprint for name, folder in (("json", dataset), ("mail", mail))}
    assert metadata["data"] == {"position": STEPS * BATCH, "skipped": 0, "fingerprint": expected}
    assert load_config(str(untouched / "config.toml"), {}).data.folders == {"json": str(dataset), "mail": str(mail)}


def test_the_validation_loss_is_told_of_each_source_and_of_the_tokens_of_all(
    dataset: Path, mail: Path, untouched: Path
) -> None:
    decoder, _ = load_run(untouched, pytest.fail)
    row, total, count = read_metrics(untouched)[-1], 0.0, 0
    for name, folder in (("json", dataset), ("mail", mail)):
        loss = tokens = 0
        for batch in evaluation_batches(Dataset.open(folder), "validation", seq_len=64, global_batch=4, lanes=range(4)):
            with torch.no_grad():
                logits = decoder(batch.tokens_BT, batch.positions_BT, batch.documents_BT)
            loss += F.cross_entropy(logits.flatten(0, 1), batch.targets_BT.flatten(), reduction="sum").item()
            tokens += int((batch.targets_BT != -100).sum())
        assert row[f"validation_loss/{name}"] == pytest.approx(loss / tokens, rel=1e-5)
        total, count = total + loss, count + tokens
    assert row["validation_loss"] == pytest.approx(total / count, rel=1e-5)


def test_the_report_shows_each_source(untouched: Path, dataset: Path, mail: Path) -> None:
    page = render(untouched, status_of(untouched), 4)
    for name, folder in (("json", dataset), ("mail", mail)):
        assert f"validation, {name}" in page
        assert str(folder) in page
    assert "fingerprint" not in page, "why no samples were drawn"


def test_weights_that_change_at_a_resume_are_a_phase_from_there_on(
    dataset: Path, mail: Path, untouched: Path, planned: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = taken_back(untouched, tmp_path / "run", CHANGE)
    words = arguments(dataset, mail, run, *LATER.values())
    assert dispatch(words) == 0
    assert "going on from step 4 with data.phases=4:json=1,mail=9 (there: )" in capfd.readouterr().err
    assert_same_history(run, planned)
    assert data_of(run) == {
        "path": "",
        "mix": [f"json=3:{dataset}", f"mail=1:{mail}"],
        "phases": ["4:json=1,mail=9"],
        "long_dialogues": "cut",
    }
    noted = [event for event in read_events(run / "events.jsonl") if event["kind"] == "mixture"]
    assert [(event["step"], event["position"], event["phases"]) for event in noted] == [(4, 16, ["4:json=1,mail=9"])]
    assert load_config(str(run / "config.toml"), {}).data.phases == ("4:json=1,mail=9",)
    # The same command goes on with the same order, once more and from wherever.
    for step in (6, 4):
        again = taken_back(run, tmp_path / str(step), step)
        assert dispatch(arguments(dataset, mail, again, *LATER.values())) == 0
        assert_same_history(again, planned)


def test_a_commit_of_before_the_change_is_gone_on_from_in_the_same_order(
    dataset: Path, mail: Path, planned: Path, untouched: Path, tmp_path: Path
) -> None:
    """Where all later ones turn out to be damaged."""
    run = taken_back(untouched, tmp_path / "run", CHANGE)
    words = arguments(dataset, mail, run, *LATER.values())
    assert dispatch(words) == 0
    for commit in list_commits(run / "checkpoints"):
        if commit.step > 2:
            weights = next(commit.path.glob("*.safetensors"))
            os.truncate(weights, weights.stat().st_size - 1)
    assert dispatch(words) == 0
    assert [e["step"] for e in read_events(run / "events.jsonl") if e["kind"] == "resume"] == [4, 2]
    assert_same_history(run, planned)


def test_a_source_may_come_later_and_none_may_go(dataset: Path, mail: Path, untouched: Path, tmp_path: Path) -> None:
    more = {"data__mix": f"json=1:{dataset},mail=1:{mail},again=2:{mail}"}
    run = taken_back(untouched, tmp_path / "run", CHANGE)
    assert dispatch(arguments(dataset, mail, run, **more)) == 0
    assert read_metrics(run)[:CHANGE] == read_metrics(untouched)[:CHANGE]
    assert data_of(run)["mix"] == [f"again=0:{mail}", f"json=3:{dataset}", f"mail=1:{mail}"]
    assert data_of(run)["phases"] == ["4:again=2,json=1,mail=1"]
    with pytest.raises(ValueError, match=r"^data.mix is without again, which this run was trained on: .*weight 0"):
        dispatch(arguments(dataset, mail, run, train__steps=9))
    with pytest.raises(ValueError, match=r"^data.path is without again, json, mail, which this run was trained on"):
        dispatch(arguments(dataset, mail, run, train__steps=9, data__mix="", data__path=dataset))
    other = {"data__mix": f"json=1:{mail},mail=1:{mail},again=2:{mail}"}
    with pytest.raises(ValueError, match=rf"^data.mix: json={mail} has fingerprint"):
        dispatch(arguments(dataset, mail, run, train__steps=9, **other))


def test_a_run_on_one_dataset_becomes_no_mixture(dataset: Path, mail: Path, tmp_path: Path) -> None:
    alone: dict[str, object] = {"data__mix": "", "data__path": dataset, "train__steps": 2, "train__eval_every": 0}
    assert dispatch(arguments(dataset, mail, tmp_path, **alone)) == 0
    data = list_commits(tmp_path / "checkpoints")[-1].manifest.metadata["data"]
    assert data["fingerprint"] == Dataset.open(dataset).fingerprint
    with pytest.raises(ValueError, match=r"^data.mix is without data.path, which this run was trained on"):
        dispatch(arguments(dataset, mail, tmp_path))


def test_two_processes_mix_as_one_does(dataset: Path, mail: Path, planned: Path, tmp_path: Path) -> None:
    """The weights are changed at a resume, of which each process has its own command line."""
    run = taken_back(planned, tmp_path / "run", CHANGE)
    words = arguments(dataset, mail, run, *LATER.values(), cluster__launcher="torchrun")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "moray"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *words], env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    for mine, other in zip(read_metrics(run), read_metrics(planned), strict=True):
        for key in ("positions", "tokens", "loss", "validation_loss", "validation_loss/json", "validation_loss/mail"):
            assert mine.get(key) == (pytest.approx(other[key], rel=1e-4) if key in other else None)


def test_the_start_says_how_often_each_source_is_seen(
    dataset: Path, mail: Path, tmp_path: Path, moray: Callable[..., Any]
) -> None:
    config = arguments(dataset, mail, tmp_path, "1", "0", data__phases="1:mail=1", train__steps=400, train__seq_len=512)
    sequences = {
        name: -(-(Dataset.open(folder).splits["train"].n_tokens - 1) // 512)
        for name, folder in (("json", dataset), ("mail", mail))
    }
    told: list[str] = []
    check(load_config(*parse_settings(config[1:])), told.append)
    json, mails = 4 / sequences["json"], 1596 / sequences["mail"]
    assert told == [
        f"json 0.2%: 4 sequences, {json:.1f} epochs of {sequences['json']:,}",
        f"mail 99.8%: 1,596 sequences, {mails:.1f} epochs of {sequences['mail']:,}",
        f"warning: mail is seen {mails:.1f} times; beyond about 4 epochs, repeated data teach less and less "
        "(Muennighoff et al., 2023): give it less weight, or the run fewer steps",
    ]


def test_sources_that_do_not_go_together_are_both_named(dataset: Path, mail: Path, tmp_path: Path) -> None:
    shutil.copytree(mail, tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").write_text((mail / "tokenizer.json").read_text() + "\n")
    opened = Dataset.open(mail)
    write_index(tmp_path / "other", opened.vocab_size, opened.pad_id, opened.splits)
    with pytest.raises(
        ValueError, match=rf"^data.mix: a={dataset} and data.mix: b={tmp_path}/other have different tok"
    ):
        dispatch(arguments(dataset, mail, tmp_path / "run", data__mix=f"a=1:{dataset},b=1:{tmp_path}/other"))
    with pytest.raises(ValueError, match=rf"^data.mix: b={tmp_path}/nowhere does not exist; make it with"):
        dispatch(arguments(dataset, mail, tmp_path / "run", data__mix=f"a=1:{dataset},b=1:{tmp_path}/nowhere"))
    assert not (tmp_path / "run").exists()
