"""Laws 2 to 4 on a real Ray: workers and drivers are killed with SIGKILL, and no later step can tell."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import chaos.worker
import poison
import pytest
import torch
from chaos.check import state_digest
from ray.cluster_utils import Cluster
from rich.console import Console
from tiny import tiny, tiny_from

from moray import UserError
from moray.cluster.events import read_events
from moray.cluster.group import Group
from moray.cluster.worker import WorkerError
from moray.jobs.config.arguments import parse_settings
from moray.jobs.config.load import load_config
from moray.jobs.config.run import RunConfig
from moray.jobs.generation.generate import load_run
from moray.jobs.runs.ledger import ledger_problems
from moray.jobs.runs.status import status_of
from moray.jobs.runs.watcher import Listener
from moray.jobs.training.drive import drive
from moray.jobs.training.metrics import read_metrics
from moray.parallel.checkpoint.commits import list_commits

STEPS, EVERY = 12, 3
ON_FOUR = {
    "cluster__launcher": "ray",
    "cluster__workers": 4,
    "layout__ep": 2,
    "train__steps": STEPS,
    "train__eval_every": 6,
    "checkpoint__every": EVERY,
    "train__global_batch": 8,
}


def arguments(data: Path, run: Path, **changes: object) -> list[str]:
    return tiny(data, run, **{**ON_FOUR, **changes})


def config(data: Path, run: Path, **changes: object) -> RunConfig:
    return load_config(*parse_settings(arguments(data, run, **changes)))


def ledger_is_whole(run: Path, steps: int = STEPS) -> None:
    """The positions trained on in the history: from 0 to the end, each once, in order. Checked by hand."""
    assert ledger_problems(run) == []
    assert [row["positions"] for row in read_metrics(run)] == [[8 * step, 8 * step + 8] for step in range(steps)]
    committed = 0
    for event in read_events(run / "events.jsonl"):
        if event["kind"] in ("begin", "resume"):
            # Every attempt goes on exactly where the last commit ended, or a snapshot after it.
            assert event["position"] == event["step"] * 8
            assert event["position"] >= committed
            # A kill may fall between a commit and the line that tells of it.
            assert event["source"] == "memory" or event["position"] in (committed, committed + 8 * EVERY)
            committed = event["position"] if event["source"] == "commit" else committed
        elif event["kind"] == "commit":
            assert event["step"] * 8 > committed
            committed = event["step"] * 8
    assert committed == steps * 8


def rows_written(run: Path) -> int:
    """How often a step was computed, be it undone or not."""
    return (run / "metrics.jsonl").read_text().count('{"step"')


def computed(run: Path) -> list[tuple[Any, ...]]:
    keys = ("step", "loss", "grad_norm", "validation_loss", "expert_balance", "tokens", "positions")
    return [tuple(row.get(key) for key in keys) for row in read_metrics(run)]


@pytest.fixture(scope="module")
def untouched(ray_cluster: str, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("untouched") / "run"
    assert drive(config(dataset, run), Console(quiet=True)) == 0
    return run


class KillOneWorker(Listener):
    def __init__(self) -> None:
        self.pids: dict[int, int] = {}
        self.killed = False

    def on_event(self, kind: str, fields: dict[str, Any]) -> None:
        if kind == "start" and not self.pids:
            self.pids = {entry["rank"]: entry["pid"] for entry in fields["ranks"]}

    def on_status(self, rank: int, step: int, status: dict[str, Any]) -> None:
        if step >= 5 and not self.killed:
            self.killed = True
            os.kill(self.pids[1], signal.SIGKILL)


@pytest.mark.parametrize("snapshot_every", [0, 1])
def test_a_killed_worker_changes_no_later_step(
    untouched: Path, dataset: Path, tmp_path: Path, snapshot_every: int
) -> None:
    run, killer = tmp_path / "run", KillOneWorker()
    changes = {"recovery__snapshot_every": snapshot_every}
    assert drive(config(dataset, run, **changes), Console(quiet=True), killer) == 0
    assert killer.killed
    events = list(read_events(run / "events.jsonl"))
    kinds = [event["kind"] for event in events]
    assert kinds.count("fault") == kinds.count("recovered") == kinds.count("resume") == 1
    (resume,) = (event for event in events if event["kind"] == "resume")
    assert resume["source"] == ("memory" if snapshot_every else "commit")
    # Of two snapshots one is always whole; what was computed after it, and was told before the kill, is done again.
    assert rows_written(run) - STEPS <= (2 if snapshot_every else EVERY)
    assert (resume["snapshot_bytes"] > 0) == bool(snapshot_every)
    (fault,) = (event for event in events if event["kind"] == "fault")
    assert (fault["rank"], fault["pid"]) == (1, killer.pids[1])
    assert computed(run) == computed(untouched)
    ledger_is_whole(run)
    ledger_is_whole(untouched)
    token = os.environ["RAY_AUTH_TOKEN"].encode()
    assert [path for path in run.rglob("*") if path.is_file() and token in path.read_bytes()] == []
    found = status_of(run)
    (recovered,) = (event for event in events if event["kind"] == "recovered")
    assert (found.state, found.launcher, found.workers, found.generation) == ("done", "ray", 4, 2)
    assert (found.faults, found.fault_seconds, found.steps_again) == (
        1,
        recovered["seconds"],
        rows_written(run) - STEPS,
    )
    phases = recovered["phases"]
    assert list(phases)[:4] == ["killing", "placing", "forking", "starting"]
    assert [name for name in phases if name in ("building", "loading", "step")] == ["building", "loading", "step"]
    assert sum(phases.values()) == pytest.approx(recovered["seconds"], abs=0.01)


def test_a_killed_worker_changes_no_adapter(ray_cluster: str, dataset: Path, tmp_path: Path) -> None:
    """Snapshots hold adapters alone; the base is read again."""

    def train(words: list[str], listener: Listener | None = None) -> None:
        assert drive(load_config(*parse_settings(words)), Console(quiet=True), listener) == 0

    base = tmp_path / "base"
    train(tiny(dataset, base, train__steps=2))
    changes = {**ON_FOUR, "cluster__workers": 2, "train__eval_every": 0, "checkpoint__every": 100, "lora__rank": 8}
    train(tiny_from(base, dataset, tmp_path / "untouched", **changes))
    train(tiny_from(base, dataset, tmp_path / "killed", **changes, recovery__snapshot_every=1), KillOneWorker())
    (resume,) = (event for event in read_events(tmp_path / "killed" / "events.jsonl") if event["kind"] == "resume")
    assert resume["source"] == "memory"
    (commit,) = list_commits(tmp_path / "killed" / "checkpoints")
    assert resume["snapshot_bytes"] < 2 * sum(file.size for file in commit.manifest.files.values())
    assert computed(tmp_path / "killed") == computed(tmp_path / "untouched")
    assert state_digest(tmp_path / "killed") == state_digest(tmp_path / "untouched")


def test_a_killed_driver_and_the_same_command_again(untouched: Path, dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "moray", "pretrain", *arguments(dataset, run)]
    driver = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        until = time.monotonic() + 50
        while len(read_metrics(run)) < 5:
            assert driver.poll() is None, driver.stderr and driver.stderr.read()
            assert time.monotonic() < until
            time.sleep(0.005)
    finally:
        driver.kill()
        driver.communicate()
    assert len(read_metrics(run)) < STEPS
    found = status_of(run)
    assert (found.state, found.pid, found.exit_code) == ("lost", driver.pid, 75)
    again = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert again.returncode == 0, again.stderr
    assert computed(run) == computed(untouched)
    ledger_is_whole(run)
    found = status_of(run)
    assert (found.state, found.faults, found.steps_again) == ("done", 0, rows_written(run) - STEPS)


def test_another_layout_resumes_and_computes_the_same(untouched: Path, dataset: Path, tmp_path: Path) -> None:
    """Four workers with ep=2 train half-way; two with tp=2 take over: rounding is all that differs."""
    run = tmp_path / "run"
    half = StopAt(STEPS // 2)
    assert drive(config(dataset, run), Console(quiet=True), half) == 75
    stopped = read_metrics(run)[-1]["step"]
    assert STEPS // 2 <= stopped < STEPS
    assert drive(config(dataset, run, cluster__workers=2, layout__ep=1, layout__tp=2), Console(quiet=True)) == 0
    assert computed(run)[:stopped] == computed(untouched)[:stopped]
    for row, expected in zip(read_metrics(run)[stopped:], read_metrics(untouched)[stopped:], strict=True):
        assert row["layout"] != expected["layout"]
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert row["positions"] == expected["positions"]
    ledger_is_whole(run)


def poisoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **plan: Any) -> Path:
    """The folder of a run in which something goes wrong, as poison.py has it."""
    monkeypatch.setattr("moray.jobs.training.drive.train", poison.train)
    run = tmp_path / "run"
    run.mkdir(parents=True)
    (run / "poison.json").write_text(json.dumps(plan))
    return run


def test_a_worker_killed_behind_a_skipped_batch_changes_nothing(
    ray_cluster: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch 3 is bad for both workers, in every generation. What was computed twice was the same both times."""
    run = poisoned(tmp_path, monkeypatch, nan=[3], killed_after=5)
    changes = {"cluster__workers": 2, "train__steps": 8, "train__eval_every": 0, "train__on_bad_step": "skip"}
    changes["recovery__snapshot_every"] = 0
    assert drive(config(dataset, run, **changes, train__max_skipped=1), Console(quiet=True)) == 0
    assert [event["reason"] for event in read_events(run / "events.jsonl") if event["kind"] == "fault"] == [
        "was killed by SIGKILL"
    ]
    assert ledger_problems(run) == []
    assert [row["positions"][0] // 8 for row in read_metrics(run)] == [0, 1, 2, 4, 5, 6, 7, 8]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (place,) = (i for i, row in enumerate(rows) if "resumed_from" in row)
    step = rows[place]["resumed_from"]
    assert step in (0, 3), "the commit of step 3, if it was there already"
    undone = rows[step:place]
    again = rows[place + 1 : place + 1 + len(undone)]
    assert any("skipped" in row for row in undone)
    for key in ("step", "loss", "grad_norm", "positions", "expert_balance", "skipped"):
        assert [row.get(key) for row in undone] == [row.get(key) for row in again]


def test_a_commit_that_death_cut_off_is_made_up_for(
    ray_cluster: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on from memory, at the step that was to be committed: else the interval would be twice as long."""
    monkeypatch.setattr("moray.jobs.training.drive.train", chaos.worker.train)
    run = tmp_path / "run"
    run.mkdir()
    for name in ("hurry", "trap-manifest"):
        (run / name).touch()
    changes = {"cluster__workers": 2, "recovery__snapshot_every": 1, "checkpoint__every": 4}
    assert drive(config(dataset, run, **changes), Console(quiet=True)) == 0
    events = list(read_events(run / "events.jsonl"))
    (resume,) = (event for event in events if event["kind"] == "resume")
    commits = [event["step"] for event in events if event["kind"] == "commit"]
    assert resume["source"] == "memory"
    assert commits == [max(4, resume["step"] + 1), 8, 12]
    ledger_is_whole(run)


def test_wrong_numbers_are_not_gone_on_from_in_memory(
    ray_cluster: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that is bad every time: the one retry is from the commit, though a newer snapshot had been taken."""
    run = poisoned(tmp_path, monkeypatch, nan=[5])
    changes = {"cluster__workers": 2, "train__steps": 8, "train__eval_every": 0, "recovery__snapshot_every": 1}
    with pytest.raises(WorkerError, match="failed alike"):
        drive(config(dataset, run, **changes), Console(quiet=True))
    (resume,) = (event for event in read_events(run / "events.jsonl") if event["kind"] == "resume")
    assert (resume["step"], resume["source"]) == (3, "commit")


def test_memory_that_cannot_hold_snapshots_is_a_mistake_told_before_the_first_step(
    ray_cluster: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = poisoned(tmp_path, monkeypatch, free_bytes=100_000)
    said = r"^recovery\.snapshot_every=1 needs 1 MiB of memory on .* but 0 MiB are free"
    with pytest.raises(UserError, match=said):
        drive(config(dataset, run, cluster__workers=2, recovery__snapshot_every=1), Console(quiet=True))
    assert not {"begin", "ready"} & {event["kind"] for event in read_events(run / "events.jsonl")}


class LoseANode(Listener):
    """All at once, with its ranks, and another one joins; not the head, without which there is no Ray."""

    def __init__(self, nodes: Cluster, joins: bool = True) -> None:
        self._nodes, self._joins = nodes, joins
        self.ranks: list[int] = []

    def on_status(self, rank: int, step: int, status: dict[str, Any]) -> None:
        if step >= 5 and not self.ranks:
            of_rank = {rank: raylet_of(pid) for rank, pid in self._pids.items()}
            of_node = {node: node.all_processes["raylet"][0].process.pid for node in self._nodes.worker_nodes}
            node = next(node for node, raylet in of_node.items() if raylet in of_rank.values())
            self.ranks = [rank for rank, raylet in of_rank.items() if raylet == of_node[node]]
            self._nodes.remove_node(node, allow_graceful=False)
            if self._joins:
                self._nodes.add_node(num_cpus=2)

    def on_event(self, kind: str, fields: dict[str, Any]) -> None:
        if kind == "start" and not self.ranks:
            self._pids = {entry["rank"]: entry["pid"] for entry in fields["ranks"]}


def raylet_of(pid: int) -> int:
    """The process that stands for a worker's node; Ray tells the worker's agent, which is the parent."""
    agent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return int(Path(f"/proc/{agent}/environ").read_text().partition("RAY_RAYLET_PID=")[2].partition("\0")[0])


def test_a_lost_node_is_recovered_from_the_memory_of_the_one_that_stands_in(
    two_nodes: Cluster, untouched: Path, dataset: Path, tmp_path: Path
) -> None:
    """Half of the state is gone with the node, and there is no commit yet: only the other node's copy has it."""
    run, killer = tmp_path / "run", LoseANode(two_nodes)
    changes = {"recovery__snapshot_every": 1, "checkpoint__every": STEPS}
    assert drive(config(dataset, run, **changes), Console(quiet=True), killer) == 0
    events = list(read_events(run / "events.jsonl"))
    (fault,) = (event for event in events if event["kind"] == "fault")
    assert "was lost" in fault["reason"]
    assert killer.ranks in ([0, 1], [2, 3])
    (resume,) = (event for event in events if event["kind"] == "resume")
    assert (resume["source"], resume["digest"]) == ("memory", None)
    assert rows_written(run) - STEPS <= 2
    assert computed(run) == computed(untouched)
    ledger_is_whole(run)


def test_a_node_that_computes_wrongly_is_found_and_set_aside(
    two_nodes: Cluster, untouched: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bit of one gradient, in the audited step 3: the step is not applied, and the rest is computed elsewhere."""
    # Two steps have one forward pass each; in the third, the first one is that of another rank's micro-batch.
    run = poisoned(tmp_path, monkeypatch, flipped=[2, 3])
    spare = two_nodes.add_node(num_cpus=2)
    try:
        settings = config(dataset, run, train__audit_every=3)
        assert drive(settings, Console(quiet=True)) == 0
    finally:
        two_nodes.remove_node(spare)
    events = list(read_events(run / "events.jsonl"))
    wrong, fault, aside = (
        next(event for event in events if event["kind"] == kind) for kind in ("wrong_result", "fault", "node_set_aside")
    )
    assert (wrong["step"], [one["rank"] for one in wrong["ranks"]]) == (3, [2])
    assert fault["suspects"] == [2]
    assert (aside["node_id"], aside["why"]) == (fault["node_id"], "it computed wrongly")
    assert computed(run) == computed(untouched)
    ledger_is_whole(run)


class Tide(Listener):
    """Nodes leave and join whenever all workers are at work again, so often: 4 slots, 2, 8, 3 and 4."""

    def __init__(self, nodes: Cluster, run: Path, turns: int) -> None:
        (self._newest,) = nodes.worker_nodes
        self._nodes, self._run = nodes, run
        self._begun = self._done = 0
        tide = [self._lose, partial(self._join, 1, 5), self._lose, partial(self._join, 1)]
        self._plan = [*tide[:turns], self._hurry]

    def _lose(self) -> None:
        self._nodes.remove_node(self._newest, allow_graceful=False)

    def _join(self, *sizes: int) -> None:
        for size in sizes:
            self._newest = self._nodes.add_node(num_cpus=size)

    def _hurry(self) -> None:
        (self._run / "hurry").touch()

    def on_event(self, kind: str, fields: dict[str, Any]) -> None:
        if kind in ("ready", "recovered"):
            self._begun += 1

    def on_status(self, rank: int, step: int, status: dict[str, Any]) -> None:
        if step and self._done < min(self._begun, len(self._plan)):
            self._done += 1
            self._plan[self._done - 1]()


@pytest.mark.parametrize(("exact", "turns"), [(True, 2), (False, 4)], ids=["exact", "fp64"])
def test_a_run_goes_on_with_the_workers_that_there_are(
    two_nodes: Cluster, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact: bool, turns: int
) -> None:
    """The slots change from 4 to 2, 8, 3 (one is spare) and 4, and the losses are those of one process all along: to
    1e-10 where all is computed in fp64, and to the last bit in exact mode.
    """
    monkeypatch.setattr("moray.cluster.ray.resizing.WORTH", 0.1)
    steps, ep = 48, 1 if exact else 2
    # A validation between is left out where a generation is asked to stop meanwhile; the one at the end never is.
    changes = {"train__steps": steps, "train__micro_batch": 1, "train__exact": exact, "train__eval_every": 0}
    alone = poisoned(tmp_path / "alone", monkeypatch, fp64=not exact)
    of_one = {"cluster__launcher": "local", "cluster__workers": 1, "layout__ep": 1}
    assert drive(config(dataset, alone, **changes, **of_one), Console(quiet=True)) == 0
    run = poisoned(tmp_path / "tide", monkeypatch, fp64=not exact, pause_s=1.0)
    asked = config(dataset, run, **changes, cluster__workers="2:8", layout__ep=ep)
    assert drive(asked, Console(quiet=True), Tide(two_nodes, run, turns)) == 0
    resizes = [event for event in read_events(run / "events.jsonl") if event["kind"] == "resize"]
    assert [event["workers"] for event in resizes] == [[4, 2], [2, 8], [8, 2], [2, 4]][:turns]
    wide, narrow = (f"dp_replicate=1 dp_shard={n} tp=1 ep={ep}" for n in (4, 2))
    assert (resizes[0]["from"], resizes[0]["to"]) == (wide, narrow)
    if exact:
        assert computed(run) == computed(alone)
        assert state_digest(run) == state_digest(alone)
    for row, expected in zip(read_metrics(run), read_metrics(alone), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-10)
    ledger_is_whole(run, steps)


class StopAt(Listener):
    """Ctrl-C of a person, once a step is done."""

    def __init__(self, step: int) -> None:
        self.step: int | None = step

    def on_status(self, rank: int, step: int, status: dict[str, Any]) -> None:
        if self.step and step >= self.step:
            self.step = None
            os.kill(os.getpid(), signal.SIGTERM)


def test_more_workers_than_there_will_ever_be(ray_cluster: str, dataset: Path, tmp_path: Path) -> None:
    from moray.cluster.ray.supervisor import supervise
    from moray.jobs.training.trainer import train

    settings = config(dataset, tmp_path / "run", cluster__workers=16, train__global_batch=16)
    with pytest.raises(ValueError, match=r"cluster\.workers=16"):
        supervise(train, settings, Group(workers=16, placement_timeout_s=1))


def test_a_loss_that_is_never_finite_ends_in_one_line(
    ray_cluster: str, dataset: Path, tmp_path: Path, moray: Callable[..., Any]
) -> None:
    """The traceback is where it can be read at leisure; no Python of the driver's is of interest."""
    run = tmp_path / "run"
    changes = {"cluster__launcher": "ray", "cluster__workers": 2, "optimizer__lr": 1e30, "train__steps": 9}
    outcome = moray("pretrain", *tiny(dataset, run, **changes))
    assert outcome.code == 1
    assert "Traceback" not in outcome.err
    last = outcome.err.splitlines()[-1]
    assert last.startswith("moray: rank ")
    assert "FloatingPointError: step " in last
    assert last.endswith(f"; the traceback is in {run}/events.jsonl")
    faults = [event for event in read_events(run / "events.jsonl") if event["kind"] == "fault"]
    found = status_of(run)
    assert (found.state, found.exit_code) == ("failed", 1)
    assert f"moray: {found.why}" == last
    assert len(faults) == 2, "one retry is justified: a GPU may flip a bit"
    assert all("pass_over" in fault["traceback"] for fault in faults)


def test_rows_tell_what_experts_and_devices_got(untouched: Path) -> None:
    """8 experts on two devices, of two choices a token; two such groups. At 200 steps or fewer each row has loads."""
    for row in read_metrics(untouched):
        (load,), (devices,), (sent,) = row["expert_load"], row["device_load"], row["rows_sent"]
        assert sum(load) == 2 * 8 * 64, "each of 8 sequences of 64 tokens"
        assert devices == [sum(load[:4]), sum(load[4:])]
        assert row["device_balance"] == [pytest.approx(max(devices) / 512, rel=1e-5)]
        assert all(0 < rows <= 8 * 64 / 2 for rows in sent), "a token travels at most once, to the other device"
        # Tokens and gradients of sums, 32 numbers each, and as much back for what the other one got.
        assert all(bytes_in >= 4 * 32 * 2 * sum(sent) for bytes_in in row["bytes_sent"])
        assert row["router_z"][0] > 0


@pytest.fixture(scope="module")
def placed(ray_cluster: str, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("placed") / "run"
    assert drive(config(dataset, run, layout__placement="balanced"), Console(quiet=True)) == 0
    return run


def test_experts_that_move_change_nothing_but_rounding(
    untouched: Path, placed: Path, dataset: Path, tmp_path: Path
) -> None:
    """Of what is computed, of what a commit holds for others, and for one process that goes on from it."""
    moves = [event for event in read_events(placed / "events.jsonl") if event["kind"] == "placed"]
    assert {event["step"] for event in moves} <= {3, 6, 9}
    assert moves
    assert all(event["after"] < event["before"] for event in moves)
    for ours, theirs in zip(read_metrics(placed), read_metrics(untouched), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["expert_balance"] == pytest.approx(theirs["expert_balance"], rel=0.05)
    newest = list_commits(placed / "checkpoints")[-1]
    assert newest.manifest.metadata["placement"].keys() == {"blocks.1.ffn"}
    (ours, _), (theirs, _) = load_run(placed, pytest.fail), load_run(untouched, pytest.fail)
    prompt = torch.arange(300, 340)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(prompt), theirs(prompt), rtol=0, atol=1e-3)
    run = tmp_path / "run"
    shutil.copytree(placed, run)
    for commit in list_commits(run / "checkpoints"):
        if commit.step > 6:
            shutil.rmtree(commit.path)
    alone = {"cluster__launcher": "local", "cluster__workers": 1, "layout__ep": 1}
    assert drive(config(dataset, run, **alone), Console(quiet=True)) == 0
    for one, four in zip(read_metrics(run), read_metrics(placed), strict=True):
        assert one["loss"] == pytest.approx(four["loss"], rel=1e-4)


@pytest.mark.parametrize("snapshot_every", [0, 1])
def test_a_kill_changes_nothing_in_where_experts_move(
    placed: Path, dataset: Path, tmp_path: Path, snapshot_every: int
) -> None:
    run, killer = tmp_path / "run", KillOneWorker()
    changes = {"recovery__snapshot_every": snapshot_every, "layout__placement": "balanced"}
    assert drive(config(dataset, run, **changes), Console(quiet=True), killer) == 0
    assert killer.killed
    assert computed(run) == computed(placed)
    assert state_digest(run) == state_digest(placed)
    ours, theirs = (list_commits(folder / "checkpoints")[-1].manifest.metadata for folder in (run, placed))
    assert ours["placement"] == theirs["placement"]
    assert ours["expert_load"] == theirs["expert_load"]


def test_a_run_that_goes_on_with_fixed_experts_moves_none(ray_cluster: str, dataset: Path, tmp_path: Path) -> None:
    """Though its commit has counted their tokens since they were placed."""
    run = tmp_path / "run"
    balanced = {"checkpoint__every": STEPS - 1, "layout__placement": "balanced"}
    assert drive(config(dataset, run, **balanced), Console(quiet=True), StopAt(4)) == 75
    (commit,) = list_commits(run / "checkpoints")
    assert commit.step < STEPS - 1
    assert commit.manifest.metadata["expert_load"]
    assert drive(config(dataset, run, checkpoint__every=STEPS - 1), Console(quiet=True)) == 0
    assert [event for event in read_events(run / "events.jsonl") if event["kind"] == "placed"] == []
