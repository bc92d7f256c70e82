"""`moray align --method ppo`, end to end: policy and critic learn, in one commit, on any layout; what it refuses."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from killed import kill_when
from pool import Pool
from rich.console import Console
from tiny import tiny, tiny_rl
from torch import Tensor

from moray.cluster.events import read_events
from moray.cluster.worker import WorkerContext
from moray.jobs.cli import dispatch
from moray.jobs.config.run import RunConfig
from moray.jobs.config.starting import config_of
from moray.jobs.runs.folder import claimed
from moray.jobs.runs.watcher import Listener
from moray.jobs.training import trainer
from moray.jobs.training.drive import check, drive
from moray.jobs.training.memory import needed
from moray.jobs.training.metrics import read_metrics
from moray.model.accounting.cost import count_parameters
from moray.parallel.checkpoint.commits import ChunkReader, list_commits
from moray.parallel.checkpoint.generations import take_generation

Moray = Callable[..., "Outcome"]  # type: ignore[name-defined]  # noqa: F821 - of conftest.py


def words(base: Path, prompts: Path, run: Path, **changes: object) -> list[str]:
    settings: dict[str, object] = {"method": "ppo", "rl__group_size": 2, "rl__minibatches": 2, "rl__epochs": 2}
    settings |= {"rl__critic_lr": 0.003, "optimizer__lr": 0.001}
    return tiny_rl(base, prompts, run, **(settings | changes))


def stored(run: Path) -> dict[str, Tensor]:
    """Every tensor of a run's newest commit."""
    commit = list_commits(run / "checkpoints")[-1]
    reader, tensors = ChunkReader(commit), commit.manifest.tensors
    return {name: reader.read(name, ((0,) * len(x.shape), x.shape)) for name, x in tensors.items()}


def alike(one: Path, other: Path) -> bool:
    """Bit for bit."""
    ones, others = stored(one), stored(other)
    return ones.keys() == others.keys() and all(torch.equal(ones[name], others[name]) for name in ones)


@pytest.fixture(scope="module")
def learnt(base: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of four words is worth something. One answer a prompt will do: no group is compared."""
    folder = tmp_path_factory.mktemp("learnt")
    (folder / "mine.py").write_text("def colour(sample):\n    return float(sample.answer == 'blue')\n")
    changes = {"rl__rewards": "mine:colour=1", "rl__folder": folder, "rl__group_size": 1, "rl__groups_per_batch": 16}
    changes |= {"train__global_batch": 32, "train__steps": 24, "rl__critic_lr": 0.01, "optimizer__lr": 0.003}
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CUDA_VISIBLE_DEVICES", "")
        assert dispatch(words(base, prompts, folder / "run", **changes)) == 0
    return folder / "run"


def test_rewards_rise_and_the_critic_foresees_them(learnt: Path) -> None:
    rows = read_metrics(learnt)
    assert rows[0]["reward"] < 0.5 < 0.8 < rows[-1]["reward"]
    assert rows[-1]["validation_reward"] > 0.8
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6), "the policy is the reference yet"
    assert rows[-1]["kl"] > 0.01
    assert rows[0]["explained_variance"] < 0.2 < max(row["explained_variance"] for row in rows)
    assert rows[-1]["value"] == pytest.approx(rows[-1]["return"], abs=0.2)
    for row in rows:
        assert row["updates"] == 4
        assert row["value_loss"] >= 0
        assert 0 <= row["value_clipped"] <= 1
        assert row["rollout_dlogp_max"] < 1e-4


def test_a_commit_holds_the_critic_and_readers_see_the_policy(
    moray: Moray, learnt: Path, base: Path, prompts: Path, tmp_path: Path
) -> None:
    """The critic is a whole decoder with a scalar head and moments of its own; nobody who reads the run meets it."""
    found = stored(learnt)
    of_critic = {name.removeprefix("critic."): x for name, x in found.items() if name.startswith("critic.")}
    policy = {name: x for name, x in found.items() if not name.startswith("critic.")}
    assert of_critic["model.head.weight"].shape == (1, 32)
    assert of_critic["optimizer.step"] == policy["optimizer.step"] == 4 * 24
    assert not torch.equal(of_critic["model.embedding.weight"], policy["model.embedding.weight"])
    assert moray("export", learnt, "--out", tmp_path / "hf").code == 0
    said = moray("generate", learnt, "--prompt", "Say", "--max-new-tokens", 3)
    assert said.code == 0, said.err
    # As the start of a run of another method: it is the policy's weights, and has no critic to miss.
    changes = {**GRPO, "rl__kl_coefficient": 0.1, "train__steps": 2}
    outcome = moray(*words(learnt, prompts, tmp_path / "next", method="grpo", **changes))
    assert outcome.code == 0, outcome.err
    assert not any(name.startswith("critic.") for name in stored(tmp_path / "next"))
    assert read_metrics(tmp_path / "next")[0]["kl"] == pytest.approx(0, abs=1e-9), "it begins as its reference"


GRPO = {"rl__critic_lr": 1e-5, "rl__group_size": 4}


def test_a_kill_changes_nothing(moray: Moray, base: Path, prompts: Path, tmp_path: Path) -> None:
    """Neither of what is told nor of a bit of policy, critic, and the moments of both."""
    changes = {"checkpoint__every": 2, "train__eval_every": 3, "train__steps": 12, "rl__critic": base}
    run = tmp_path / "killed"
    kill_when(lambda: bool(list_commits(run / "checkpoints")), words(base, prompts, run, **changes))
    assert 2 <= len(read_metrics(run)) < 12
    for name in ("killed", "whole"):
        outcome = moray(*words(base, prompts, tmp_path / name, **changes))
        assert outcome.code == 0, outcome.err
    assert told(run) == told(tmp_path / "whole")
    assert alike(run, tmp_path / "whole")


NUMBERS = ("step", "loss", "reward", "grad_norm", "positions", "validation_reward", "rollout_dlogp", "entropy", "kl")
NUMBERS += ("value_loss", "value_clipped", "value_grad_norm", "explained_variance", "return")


def told(run: Path) -> list[dict[str, Any]]:
    return [{name: row.get(name) for name in NUMBERS} for row in read_metrics(run)]


def asked(arguments: list[str]) -> RunConfig:
    return config_of("align", arguments[1:])


def train(arguments: list[str]) -> None:
    """As one of a group of workers."""
    rank, size = dist.get_rank(), dist.get_world_size()
    context = WorkerContext(
        rank, size, rank, size, 1, torch.device("cpu"), dist.HashStore, lambda step, status: None, lambda: False
    )
    trainer.run_steps(trainer.set_up(context, asked(arguments)))


SHORT = {"train__steps": 4, "checkpoint__every": 100, "rl__kl_coefficient": 0.1}
ON_TWO = {**SHORT, "cluster__workers": 2, "cluster__launcher": "ray"}


@pytest.fixture(scope="module")
def on_two(base: Path, prompts: Path, pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("on_two") / "run"
    arguments = words(base, prompts, run, **ON_TWO)
    config = asked(arguments)
    with claimed(config, check(config, print), print):
        assert take_generation(run / "checkpoints") == 1
        pool.run(train, 2, arguments)
    return run


def test_two_workers_learn_what_one_does(moray: Moray, base: Path, prompts: Path, on_two: Path, tmp_path: Path) -> None:
    """Law 1: the same answers, and advantages whitened over those of both; policy and critic end alike."""
    assert moray(*words(base, prompts, tmp_path / "one", **SHORT)).code == 0
    rows, others = told(tmp_path / "one"), told(on_two)
    assert len(rows) == len(others) == 4
    for row, other in zip(rows, others, strict=True):
        assert row["reward"] == other["reward"], "the answers are the same"
        numbers = {name: value for name, value in other.items() if isinstance(value, float)}
        assert {name: row[name] for name in numbers} == pytest.approx(numbers, rel=1e-4, abs=1e-6)
    ones, twos = stored(tmp_path / "one"), stored(on_two)
    assert ones.keys() == twos.keys()
    for name, one in ones.items():
        assert (one - twos[name]).norm() <= 1e-5 * one.norm(), name
    # And any layout goes on from any commit.
    shutil.copytree(on_two, tmp_path / "two")
    for name in ("one", "two"):
        assert moray(*words(base, prompts, tmp_path / name, **SHORT | {"train__steps": 5})).code == 0
    row, other = told(tmp_path / "one")[4], told(tmp_path / "two")[4]
    assert row["value_loss"] == pytest.approx(other["value_loss"], rel=1e-4)


class KillOneWorker(Listener):
    """Once, after two steps."""

    def __init__(self) -> None:
        self.pid: int | None = None
        self.killed = False

    def on_event(self, kind: str, fields: dict[str, Any]) -> None:
        if kind == "start" and self.pid is None:
            self.pid = next(entry["pid"] for entry in fields["ranks"] if entry["rank"] == 1)

    def on_status(self, rank: int, step: int, status: dict[str, Any]) -> None:
        if step >= 2 and self.pid and not self.killed:
            self.killed = True
            os.kill(self.pid, signal.SIGKILL)


def test_a_snapshot_holds_the_critic(ray_cluster: str, base: Path, prompts: Path, on_two: Path, tmp_path: Path) -> None:
    """A worker is killed, and the others' memory is all there is to go on from: nothing changes."""
    arguments = words(base, prompts, tmp_path / "run", **ON_TWO, recovery__snapshot_every=1)
    assert drive(asked(arguments), Console(quiet=True), KillOneWorker()) == 0
    (resume,) = (event for event in read_events(tmp_path / "run" / "events.jsonl") if event["kind"] == "resume")
    assert resume["source"] == "memory"
    assert told(tmp_path / "run") == told(on_two)
    assert alike(tmp_path / "run", on_two)


@pytest.mark.parametrize("kind", ["own", "named", "judge"])
def test_what_the_critic_begins_as(base: Path, prompts: Path, tmp_path: Path, kind: str) -> None:
    (newest,) = list_commits(base / "checkpoints")[-1:]
    changes, setting = {
        "own": ({}, "model.from"),
        "named": ({"rl__critic": base}, "rl.critic"),
        "judge": ({"rl__rewards": f"exact=1,model:{base}=1"}, f"rl.rewards=model:{newest.path}"),
    }[kind]
    config = asked(words(base, prompts, tmp_path / "run", **changes))
    assert config.critic == (setting, str(newest.path))
    assert config.rl.kl_coefficient == 0.05, "where nothing is said"
    assert asked(words(base, prompts, tmp_path / "run", method="grpo", **GRPO)).critic is None


def test_memory_counts_the_critic(base: Path, prompts: Path, tmp_path: Path) -> None:
    """Weights, gradients and two moments, 4 bytes each; no more for a backward pass, of which one is at a time."""
    ppo = asked(words(base, prompts, tmp_path / "run", rl__kl_coefficient=0))
    grpo = asked(words(base, prompts, tmp_path / "run", method="grpo", **GRPO))
    both, alone = (needed(config, config.resolved_layout, "float32", 3) for config in (ppo, grpo))
    critic = count_parameters(ppo.model.but(head="scalar")).total
    assert both.weights - alone.weights == 4 * critic
    assert both.gradients - alone.gradients == 4 * critic
    assert both.optimizer - alone.optimizer == 8 * critic
    assert both.activations == alone.activations


def test_what_it_refuses(moray: Moray, base: Path, prompts: Path, dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    other = ["pretrain", *tiny(dataset, tmp_path / "other", train__steps=2, model__vocab_size=416)]
    assert moray(*other).code == 0
    limited = ["pretrain", *tiny(dataset, tmp_path / "limited", train__steps=2, model__moe__capacity_factor=1)]
    assert moray(*limited).code == 0
    for arguments, message in (
        (words(base, prompts, run, rl__variant="grpo"), "rl.variant=grpo is of --method grpo"),
        (words(base, prompts, run, rl__kl_estimator="k2"), "rl.kl_estimator=k2 is of --method grpo"),
        (words(base, prompts, run, method="grpo", rl__group_size=4), "rl.critic_lr=0.003 is of --method ppo"),
        (words(base, prompts, run, rl__critic=tmp_path / "none"), "none is not a run: there is no such folder"),
        (words(base, prompts, run, rl__critic=tmp_path / "other"), "has a vocabulary of 416 tokens"),
        (
            words(base, prompts, run, rl__critic=tmp_path / "limited"),
            "capacity_factor=1.0 must be none: a critic",
        ),
        (words(base, prompts, run, rl__gae_decay=1.5), "rl.gae_decay=1.5"),
        (words(base, prompts, run, rl__rewards=""), "rl.rewards is missing"),
    ):
        outcome = moray(*arguments)
        assert outcome.code == 2, (arguments, outcome.err)
        assert message in outcome.err
    assert not run.exists()
