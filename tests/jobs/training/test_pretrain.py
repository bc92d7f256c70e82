"""`moray pretrain` end to end: what a run leaves behind, and that stops, kills and other layouts change nothing in it.

The truth is one run that nobody touched.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import webdataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import tiny

from moray.cluster.events import EventLog, read_events
from moray.data.dataset import Dataset
from moray.data.stream import Stream
from moray.jobs.cli import dispatch
from moray.jobs.config.load import load_config
from moray.jobs.generation.generate import load_run
from moray.jobs.runs.ledger import ledger_problems
from moray.jobs.runs.status import status_of
from moray.jobs.training.drive import next_generation
from moray.jobs.training.metrics import read_metrics
from moray.jobs.training.schedule import learning_rate
from moray.model import Decoder, initialise
from moray.model.accounting.cost import training_state_bytes
from moray.parallel.checkpoint.checkpointer import Checkpointer
from moray.parallel.checkpoint.commits import list_commits, read_tensors, verify

STEPS, BATCH, SEQ_LEN = 8, 4, 64
KEYS = {"step", "loss", "tokens", "tokens_per_second", "grad_norm", "lr", "generation", "layout"}  # the contract
KEYS |= {"positions", "mfu", "expert_balance", "memory_bytes"}
EXACT = ("step", "loss", "grad_norm", "lr", "tokens", "positions", "auxiliary_loss", "expert_balance")


def arguments(dataset: Path, run: Path, **changes: object) -> list[str]:
    plan: dict[str, object] = {
        "train__steps": STEPS,
        "train__eval_every": 4,
        "checkpoint__every": 2,
        "checkpoint__keep": 9,
    }
    return ["pretrain", *tiny(dataset, run, **{**plan, **changes})]


@pytest.fixture(scope="module")
def untouched(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "untouched"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CUDA_VISIBLE_DEVICES", "")
        assert dispatch(arguments(dataset, run)) == 0
    return run


def kinds(run: Path) -> list[str]:
    return [event["kind"] for event in read_events(run / "events.jsonl")]


def final_state(run: Path) -> dict[str, torch.Tensor]:
    return dict(read_tensors(list_commits(run / "checkpoints")[-1]))


def assert_same_history(run: Path, truth: Path) -> None:
    """Every number of every step, and at the end every weight and moment, bit for bit."""
    ours, theirs = read_metrics(run), read_metrics(truth)
    assert [{key: row[key] for key in EXACT} for row in ours] == [{key: row[key] for key in EXACT} for row in theirs]
    mine, other = final_state(run), final_state(truth)
    assert mine.keys() == other.keys()
    assert [name for name in mine if not torch.equal(mine[name], other[name])] == []


def assert_close_history(run: Path, truth: Path) -> None:
    ours, theirs = read_metrics(run), read_metrics(truth)
    assert [row["positions"] for row in ours] == [row["positions"] for row in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        for key in ("loss", "grad_norm", "auxiliary_loss", "validation_loss"):
            assert mine.get(key) == (pytest.approx(other[key], rel=1e-4) if key in other else None)


def test_a_run_leaves_what_the_contract_promises(untouched: Path) -> None:
    rows = [json.loads(line) for line in (untouched / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["positions"] for row in rows] == [[n * BATCH, (n + 1) * BATCH] for n in range(STEPS)]
    assert all(row.keys() >= KEYS for row in rows)
    assert [row["step"] for row in rows if "validation_loss" in row] == [4, 8]
    optimizer = load_config(str(untouched / "config.toml"), {}).optimizer
    assert [row["lr"] for row in rows] == [learning_rate(step, STEPS, optimizer) for step in range(STEPS)]
    assert rows[-1]["loss"] < rows[0]["loss"]
    for row in rows:
        assert 0 < row["tokens"] <= BATCH * SEQ_LEN
        assert 0 < row["mfu"] < 1
        assert len(row["expert_balance"]) == 1, "one MoE layer"
        assert 1 <= row["expert_balance"][0] <= 8
    commits = list_commits(untouched / "checkpoints")
    assert [commit.path.name for commit in commits] == [f"step-{step:09d}" for step in (2, 4, 6, 8)]
    assert not any(verify(commit) for commit in commits)
    assert commits[1].manifest.metadata["data"]["position"] == 4 * BATCH
    found = kinds(untouched)
    assert found[:2] == ["start", "begin"]
    assert found[-1] == "end"
    assert found.count("commit") == 4
    board = EventAccumulator(str(untouched / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("loss")] == list(range(1, STEPS + 1))


def test_the_first_loss_is_that_of_the_initial_weights_on_the_first_batch(untouched: Path, dataset: Path) -> None:
    config = load_config(str(untouched / "config.toml"), {})
    decoder = Decoder(config.model)
    initialise(decoder, config.train.seed)
    lanes = {"seq_len": SEQ_LEN, "global_batch": BATCH, "seed": 0, "lanes": range(BATCH)}
    batch = Stream(Dataset.open(dataset), "train", **lanes).batch(0)  # type: ignore[arg-type]
    with torch.no_grad():
        logits = decoder(batch.tokens_BT, batch.positions_BT, batch.documents_BT)
    truth = F.cross_entropy(logits.flatten(0, 1), batch.targets_BT.flatten()).item()
    first = read_metrics(untouched)[0]
    assert first["loss"] == pytest.approx(truth, rel=1e-5)
    assert first["tokens"] == (batch.targets_BT != -100).sum()


def test_the_validation_loss_is_that_of_the_whole_split(untouched: Path, dataset: Path) -> None:
    """Each shard in windows of seq_len tokens, every piece of a document computed alone, with torch's cross-entropy."""
    decoder, _ = load_run(untouched, pytest.fail)
    loss, count = 0.0, 0
    for shard in Dataset.open(dataset).splits["validation"]:
        samples = list(webdataset.WebDataset(str(dataset / shard.name), shardshuffle=False).decode())
        tokens = torch.from_numpy(np.concatenate([sample["tokens.npy"] for sample in samples]).astype(np.int64))
        lengths = np.concatenate([np.diff(sample["ends.npy"], prepend=0) for sample in samples])
        edges = torch.from_numpy(np.cumsum(lengths))
        for start in range(0, len(tokens) - 1, SEQ_LEN):
            window = tokens[start : start + SEQ_LEN + 1]
            inside = edges[(edges > start) & (edges < start + len(window))] - start
            for piece in window.tensor_split(inside):
                with torch.no_grad():
                    loss += F.cross_entropy(decoder(piece[None, :-1])[0], piece[1:], reduction="sum").item()
                count += len(piece) - 1
    assert count > 1000
    assert read_metrics(untouched)[-1]["validation_loss"] == pytest.approx(loss / count, rel=1e-5)


# Sends itself a real signal at a known moment: the weights are those of the step, nobody has noted or committed it.
SIGNALLED = """
import os, sys
import moray.jobs.training.trainer
from moray.jobs.cli import main

number, at, take_step = int(sys.argv.pop(1)), int(sys.argv.pop(1)), moray.jobs.training.trainer.take_step

def take_step_and_be_signalled(training, batch):
    row = take_step(training, batch)
    if training.step == at:
        os.kill(os.getpid(), number)
    return row

moray.jobs.training.trainer.take_step = take_step_and_be_signalled
main()
"""


def run_signalled(number: signal.Signals, at: int, words: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SIGNALLED, str(int(number)), str(at), *words]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)


def environment() -> dict[str, str]:
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def test_sigterm_finishes_the_step_commits_and_says_that_it_can_go_on(
    dataset: Path, untouched: Path, tmp_path: Path
) -> None:
    words = arguments(dataset, tmp_path)
    stopped = run_signalled(signal.SIGTERM, 3, words)
    assert stopped.returncode == 75, stopped.stderr
    assert "stopped on request; what was done is committed, and the same command resumes" in stopped.stderr
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    assert [commit.step for commit in list_commits(tmp_path / "checkpoints")] == [2, 3]
    assert dispatch(words) == 0
    assert_same_history(tmp_path, untouched)
    assert kinds(tmp_path).count("resume") == 1


def test_sigkill_loses_no_committed_step_and_changes_no_later_one(
    dataset: Path, untouched: Path, tmp_path: Path
) -> None:
    words = arguments(dataset, tmp_path)
    killed = run_signalled(signal.SIGKILL, 6, words)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    assert dispatch(words) == 0
    assert_same_history(tmp_path, untouched)
    (resumed,) = [event for event in read_events(tmp_path / "events.jsonl") if event["kind"] == "resume"]
    assert resumed["step"] in (2, 4), "4, unless the kill came while it was being written"
    assert resumed["position"] == resumed["step"] * BATCH


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer__kind": "muon", "train__recompute": "full"},
        {"optimizer__moments": "bfloat16"},
        {"train__compile": True, "train__micro_batch": 4, "model__n_layers": 1, "model__moe__n_dense_layers": 0},
    ],
    ids=["muon", "bfloat16", "compiled"],
)
def test_no_way_of_computing_tells_of_a_kill(dataset: Path, tmp_path: Path, settings: dict[str, object]) -> None:
    words = arguments(dataset, tmp_path / "killed", **settings)
    assert run_signalled(signal.SIGKILL, 6, words).returncode == -signal.SIGKILL
    assert dispatch(words) == 0
    assert dispatch(arguments(dataset, tmp_path / "untouched", **settings)) == 0
    assert_same_history(tmp_path / "killed", tmp_path / "untouched")


def committed_step(run: Path) -> int:
    """The last step that events.jsonl calls committed; every attempt in it goes on where a commit ended."""
    committed = 0
    for event in read_events(run / "events.jsonl"):
        if event["kind"] in ("begin", "resume"):
            assert (event["step"], event["position"]) == (committed, committed * BATCH)
        elif event["kind"] == "commit":
            assert event["step"] > committed
            committed = event["step"]
    return committed


def test_steps_that_a_kill_undid_leave_no_trace_in_the_history(dataset: Path, tmp_path: Path) -> None:
    """Committed at 3, killed at 8, resumed, stopped at 5: the run's last step is 5, and nothing says 6 or 7."""
    plan = {"checkpoint__every": 100, "train__eval_every": 0}
    assert dispatch(arguments(dataset, tmp_path, train__steps=3, **plan)) == 0
    words = arguments(dataset, tmp_path, train__steps=20, **plan)
    assert run_signalled(signal.SIGKILL, 8, words).returncode == -signal.SIGKILL
    assert read_metrics(tmp_path)[-1]["step"] == 7
    assert run_signalled(signal.SIGTERM, 5, words).returncode == 75
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["generation"] for row in rows] == [1, 1, 1, 3, 3], "no two attempts of a run share a number"
    assert [row["positions"] for row in rows] == [[n * BATCH, (n + 1) * BATCH] for n in range(5)]
    assert committed_step(tmp_path) == 5
    assert ledger_problems(tmp_path) == []


def test_a_second_ctrl_c_is_one_line_and_exit_code_130(dataset: Path, tmp_path: Path) -> None:
    script = SIGNALLED.replace("os.kill(os.getpid(), number)", "[os.kill(os.getpid(), number) for _ in range(2)]")
    command = [sys.executable, "-c", script, str(int(signal.SIGINT)), "2", *arguments(dataset, tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("moray: interrupted; ")


def test_two_drivers_on_one_folder(dataset: Path, tmp_path: Path) -> None:
    """The second one is refused while the first, a real run that stands still, goes on afterwards as if nothing was."""
    script = SIGNALLED.replace("os.kill(os.getpid(), number)", "print('here', flush=True); sys.stdin.readline()")
    words = arguments(dataset, tmp_path)
    first = subprocess.Popen(
        [sys.executable, "-c", script, "0", "3", *words],
        env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert first.stdout
        assert first.stdout.readline() == "here\n"
        with pytest.raises(ValueError, match=rf"run\.dir={tmp_path} is in use by pid {first.pid} on "):
            dispatch(words)
        _, complaints = first.communicate("\n", timeout=60)
        assert first.returncode == 0, complaints
    finally:
        first.kill()
        first.wait()
    assert len(read_metrics(tmp_path)) == STEPS


def torchrun(words: list[str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "moray"]
    process = subprocess.Popen(
        [*command, *words], env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        _, complaints = process.communicate(timeout=120)
        assert process.returncode == 0, complaints
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_two_processes_compute_what_one_does(dataset: Path, untouched: Path, tmp_path: Path) -> None:
    torchrun(arguments(dataset, tmp_path, cluster__launcher="torchrun"))
    assert_close_history(tmp_path, untouched)
    assert {row["layout"] for row in read_metrics(tmp_path)} == {"dp_replicate=1 dp_shard=2 tp=1 ep=1"}
    found = status_of(tmp_path)
    assert (found.state, found.launcher, found.workers, found.step) == ("done", "torchrun", 2, STEPS)


def forget(run: Path, after: int) -> None:
    """Takes the run back to an earlier commit."""
    for commit in list_commits(run / "checkpoints"):
        if commit.step > after:
            shutil.rmtree(commit.path)


def test_a_run_goes_on_under_other_layouts(dataset: Path, untouched: Path, tmp_path: Path) -> None:
    """One process, then two that share the experts, then one again."""
    run = tmp_path / "run"
    shutil.copytree(untouched, run)
    forget(run, after=4)
    torchrun(arguments(dataset, run, cluster__launcher="torchrun", layout__ep=2))
    assert_close_history(run, untouched)
    # What `moray generate` reads, of two ranks and of one.
    (ours, _), (theirs, _) = load_run(run, pytest.fail), load_run(untouched, pytest.fail)
    prompt = torch.arange(300, 340)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(prompt), theirs(prompt), rtol=0, atol=1e-3)
    forget(run, after=6)
    assert dispatch(arguments(dataset, run)) == 0
    assert_close_history(run, untouched)
    resumes: list[dict[str, Any]] = [e for e in read_events(run / "events.jsonl") if e["kind"] == "resume"]
    assert [(event["step"], event["layout"][-4:]) for event in resumes] == [(4, "ep=2"), (6, "ep=1")]


def test_a_commit_holds_each_weight_once_and_takes_the_room_that_its_disk_was_asked_for(untouched: Path) -> None:
    """fp32 weights and two moments; beside them the count of steps, the routing bias, and the files' headers."""
    config = load_config(str(untouched / "config.toml"), {})
    assert config.model.tied_embeddings
    weights = list(Decoder(config.model).parameters())
    n_weights = sum(weight.numel() for weight in weights)
    state = final_state(untouched)
    assert "model.embedding.weight" in state
    assert "model.head.weight" not in state
    n_bytes = sum(tensor.nbytes for tensor in state.values())
    assert n_bytes == 12 * n_weights + 4 + 4 * 8
    files = list((untouched / "checkpoints" / "step-000000008").glob("*.safetensors"))
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in files)
    assert sum(path.stat().st_size for path in files) == n_bytes + headers
    said = training_state_bytes(config.model)  # what a start asks its disk for
    assert said.weights + said.optimizer == 12 * n_weights


def test_a_commit_that_holds_a_tied_head_beside_its_embedding_is_read_alike(
    dataset: Path, untouched: Path, tmp_path: Path
) -> None:
    """As commits did once: the run goes on from it, and what is generated from it and exported is the same."""
    run, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(untouched, run)
    forget(run, after=6)
    shutil.copytree(run, other)
    newest, state = list_commits(run / "checkpoints")[-1], final_state(run)
    state["model.head.weight"] = state["model.embedding.weight"].clone()
    shutil.rmtree(newest.path)
    checkpointer = Checkpointer(run / "checkpoints", keep=9, keep_every=None, on_event=lambda kind, fields: None)
    checkpointer.save(newest.step, state, newest.manifest.metadata)
    checkpointer.finish()
    with torch.no_grad():
        ours, theirs = (load_run(folder, pytest.fail)[0](torch.arange(300, 340)[None]) for folder in (run, other))
    assert torch.equal(ours, theirs)
    exported = []
    for folder in (run, other):
        assert dispatch(["export", str(folder), "--out", f"{folder}-exported"]) == 0
        exported.append({path.name: path.read_bytes() for path in Path(f"{folder}-exported").iterdir()})
    assert exported[0] == exported[1]
    assert dispatch(arguments(dataset, run)) == 0
    assert_same_history(run, untouched)


def test_a_damaged_commit_is_refused_loudly_and_the_one_before_it_taken(
    dataset: Path, untouched: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(untouched, run)
    (file,) = (run / "checkpoints" / "step-000000008").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert dispatch(arguments(dataset, run)) == 0
    told = " ".join(capfd.readouterr().err.split())
    assert "refused the damaged commit of step 8" in told
    assert file.name in told
    assert_same_history(run, untouched)
    resumes = [event["step"] for event in read_events(run / "events.jsonl") if event["kind"] == "resume"]
    assert resumes == [6]


@pytest.mark.parametrize("steps", [STEPS, STEPS - 2])
def test_a_finished_run_says_so_and_changes_nothing(
    dataset: Path, untouched: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], steps: int
) -> None:
    run = tmp_path / "run"
    shutil.copytree(untouched, run)
    assert dispatch(arguments(dataset, run, train__steps=steps)) == 0
    told = capfd.readouterr().err
    assert told == f"run.dir={run} has committed step {STEPS} of train.steps={steps}: nothing to do\n"
    there, here = ({path.relative_to(top): path for path in top.rglob("*")} for top in (untouched, run))
    assert here.keys() == there.keys() | {Path(".lock")}
    assert all(path.is_dir() or path.read_bytes() == here[name].read_bytes() for name, path in there.items())


def test_a_longer_run_goes_on_from_the_end_and_says_what_changes(
    dataset: Path, untouched: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(untouched, run)
    changes = {"train__steps": STEPS + 2, "optimizer__schedule": "wsd", "train__micro_batch": 1}
    assert dispatch(arguments(dataset, run, **changes)) == 0
    told = capfd.readouterr().err.splitlines()[0]
    assert told.startswith(f"going on from step {STEPS} with train.steps={STEPS + 2} (there: {STEPS}), ")
    assert told.endswith("train.micro_batch=1 (there: 2), optimizer.schedule=wsd (there: cosine)")
    positions = [row["positions"] for row in read_metrics(run)]
    assert positions == [[n * BATCH, (n + 1) * BATCH] for n in range(STEPS + 2)]


def test_bf16_and_a_dense_model_train_too(dataset: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    changes = {"train__steps": 3, "optimizer__warmup_steps": 1, "train__dtype": "bfloat16", "model__moe": "none"}
    assert dispatch(arguments(dataset, tmp_path, recovery__snapshot_every=1, **changes)) == 0
    assert "recovery.snapshot_every=1 has no effect" in capfd.readouterr().err, "as there is nothing but this process"
    rows = read_metrics(tmp_path)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert [row["expert_balance"] for row in rows] == [[]] * 3
    assert final_state(tmp_path)["model.blocks.1.ffn.gate.weight"].dtype == torch.float32, "master weights"


def test_a_fault_before_the_first_generation_has_no_number(tmp_path: Path) -> None:
    """An agent that did not start ended a driver in a traceback."""
    log = EventLog(tmp_path / "events.jsonl")
    log.write("fault", generation=None, reason="an agent did not start")
    assert next_generation(log.path) == 1
    log.write("start", generation=3)
    assert next_generation(log.path) == 4
