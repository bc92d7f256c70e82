"""`moray align --method grpo`, end to end: what it learns, that a kill changes nothing, and what it refuses."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from killed import kill_when
from tiny import tiny, tiny_from, tiny_rl

from moray.jobs.datasets.config import PrepareConfig
from moray.jobs.datasets.prepare import prepare
from moray.jobs.runs.ledger import ledger_problems
from moray.jobs.training.metrics import read_metrics
from moray.parallel.checkpoint.commits import list_commits

Moray = Callable[..., "Outcome"]  # type: ignore[name-defined]  # noqa: F821 - of conftest.py


def words(base: Path, prompts: Path, run: Path, **changes: object) -> list[str]:
    return tiny_rl(base, prompts, run, **{"method": "grpo", **changes})


def test_rewards_rise(moray: Moray, base: Path, prompts: Path, tmp_path: Path) -> None:
    """One of the four words is worth something: in the end hardly anything else is said, to held-out prompts either."""
    (tmp_path / "mine.py").write_text("def colour(sample):\n    return float(sample.answer == 'blue')\n")
    changes = {"rl__rewards": "mine:colour=1,exact=0", "rl__folder": tmp_path, "train__global_batch": 8}
    outcome = moray(*words(base, prompts, tmp_path / "run", train__steps=40, rl__group_size=8, **changes))
    assert outcome.code == 0, outcome.err
    left_out = re.findall(r"(\d+) left out, which leave no room for an answer", outcome.err)
    assert sum(map(int, left_out)) == 3
    rows = read_metrics(tmp_path / "run")
    assert rows[0]["reward"] < 0.5 < 0.8 < rows[-1]["reward"]
    assert rows[-1]["validation_reward"] > 0.8
    assert rows[-1]["ended"] > 0.8
    assert 0.1 < rows[-1]["reward/exact"] < 0.5, "it is told, and counts for nothing"
    for row in rows:
        assert row["updates"] == (row["dead_groups"] < 8)
        if row["updates"]:
            assert row["ratio"] == pytest.approx(1, abs=1e-12)
            assert row["rollout_dlogp_max"] < 1e-4
            assert row["rollout_flips"] == 0


NUMBERS = ("step", "loss", "reward", "grad_norm", "positions", "validation_reward", "rollout_dlogp", "entropy", "kl")


def told(run: Path) -> list[dict[str, Any]]:
    return [{name: row.get(name) for name in NUMBERS} for row in read_metrics(run)]


def test_a_kill_changes_nothing(moray: Moray, base: Path, prompts: Path, tmp_path: Path) -> None:
    """TRL 3148, open-instruct 1523, verl 7401: in RL a resume lost or repeated data. Two updates of two minibatches a
    step, and a KL term.
    """
    changes = {"checkpoint__every": 2, "rl__epochs": 2, "rl__minibatches": 2, "rl__kl_coefficient": 0.1}
    changes |= {"train__eval_every": 3, "train__steps": 12}
    run = tmp_path / "killed"
    kill_when(lambda: bool(list_commits(run / "checkpoints")), words(base, prompts, run, **changes))
    assert 2 <= len(read_metrics(run)) < 12
    for name in ("killed", "whole"):
        outcome = moray(*words(base, prompts, tmp_path / name, **changes))
        assert outcome.code == 0, outcome.err
    assert told(run) == told(tmp_path / "whole")
    assert any(row["kl"] > 0 for row in read_metrics(tmp_path / "whole"))


def test_kills_at_marked_instants_change_nothing(moray: Moray, base: Path, prompts: Path, tmp_path: Path) -> None:
    """In a reward, while a commit is written, and between two updates of a step; each time the same command goes on."""
    hold = tmp_path / "hold"
    (tmp_path / "mine.py").write_text(
        "import os, time\n"
        "def slow(sample):\n"
        f"    if os.path.exists({str(hold)!r}):\n"
        f"        os.rename({str(hold)!r}, {str(hold)!r} + '.seen')\n"
        "        time.sleep(60)\n"
        "    return len(sample.answer) / 10\n"
    )
    changes = {"rl__rewards": "mine:slow=1", "rl__folder": tmp_path, "rl__reward_timeout_s": 90, "rl__epochs": 2}
    changes |= {"checkpoint__every": 2, "train__steps": 8, "rl__kl_coefficient": 0.05}
    run = tmp_path / "killed"

    def in_a_reward() -> bool:
        return Path(f"{hold}.seen").exists()

    def in_a_commit() -> bool:
        return any(run.glob("checkpoints/.generation-*/*"))

    def within_a_step() -> bool:
        """Half a step, by the clock, behind one that is done."""
        rows = read_metrics(run)
        return len(rows) > 4 and time.time() - (run / "metrics.jsonl").stat().st_mtime > rows[-1]["seconds"] * 0.7

    for instant in (in_a_reward, in_a_commit, within_a_step):
        if instant is in_a_reward:
            hold.touch()
        kill_when(instant, words(base, prompts, run, **changes))
    assert in_a_reward()
    for name in ("killed", "whole"):
        outcome = moray(*words(base, prompts, tmp_path / name, **changes))
        assert outcome.code == 0, outcome.err
    assert told(tmp_path / "killed") == told(tmp_path / "whole")
    assert not ledger_problems(run)


def test_groups_that_are_all_alike_teach_nothing(moray: Moray, base: Path, prompts: Path, tmp_path: Path) -> None:
    """No step is taken, and it is counted: the weights are those that it began with."""
    (tmp_path / "mine.py").write_text("def same(sample):\n    return 0.3\n")
    changes = {"rl__rewards": "mine:same=1", "rl__folder": tmp_path, "train__steps": 2}
    outcome = moray(*words(base, prompts, tmp_path / "run", **changes))
    assert outcome.code == 0, outcome.err
    for row in read_metrics(tmp_path / "run"):
        assert (row["updates"], row["dead_groups"], row["loss"]) == (0, 4, 0)
        assert row["reward"] == pytest.approx(0.3)
    for folder in (base, tmp_path / "run"):
        assert moray("export", folder, "--out", tmp_path / "hf" / folder.parent.name).code == 0
    one, other = sorted((tmp_path / "hf").iterdir())
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_a_reward_that_is_no_number_names_its_sample(moray: Moray, base: Path, prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def wrong(sample):\n    return float('nan')\n")
    outcome = moray(*words(base, prompts, tmp_path / "run", rl__rewards="mine:wrong=1", rl__folder=tmp_path))
    assert outcome.code != 0
    assert "rl.rewards: mine:wrong on sample " in outcome.err
    assert not read_metrics(tmp_path / "run")


def test_what_it_refuses(moray: Moray, base: Path, prompts: Path, dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for arguments, message in (
        (words(base, dataset, run), "is of kind text, which `moray pretrain` learns from; train.objective=grpo wants"),
        (words(base, prompts, run, rl__rewards=""), "rl.rewards is missing"),
        (words(base, prompts, run, rl__rewards="gsm9k=1"), "rl.rewards=gsm9k=1"),
        (words(base, prompts, run, rl__rewards="none:such=1"), "rl.rewards=none:such=1"),
        (words(base, prompts, run, rl__group_size=1), "rl.group_size=1: answers are compared with others"),
        (words(base, prompts, run, rl__groups_per_batch=3), "rl.groups_per_batch=3 must divide the 4 prompts"),
        (words(base, prompts, run, rl__minibatches=3), "rl.minibatches=3 must divide the train.global_batch=4"),
        (words(base, prompts, run, rl__max_new_tokens=64), "rl.max_new_tokens=64 leaves no room for a prompt"),
        (words(base, prompts, run, rl__max_new_tokens=60), "no prompt of the train split of data.path"),
        (words(base, prompts, run, train__exact="true"), "train.exact=True must be false with train.objective=grpo"),
        (words(base, prompts, run, train__on_bad_step="skip", train__max_skipped=1), "train.on_bad_step=skip must be"),
        (words(base, prompts, run, rl__kl_estimator="k1", rl__kl_correction="false"), "has no gradient"),
        (words(base, prompts, run, rl__temperature=0), "rl.temperature=0"),
        (["pretrain", *tiny(dataset, run, rl__group_size=4)], "rl.… settings are of `moray align`"),
    ):
        outcome = moray(*arguments)
        assert outcome.code == 2, (arguments, outcome.err)
        assert message in outcome.err
    assert not run.exists()


def test_a_reward_model_judges(
    moray: Moray, base: Path, prompts: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a relative path, beside a function; a resume takes the commit that it began with, though the run went on."""
    pairs = [{"prompt": f"Say {w} {n}", "chosen": "blue", "rejected": w} for n in range(40) for w in ("red", "list")]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    given = {"tokenizer": dataset, "validation": 0.1, "kind": "preference"}
    prepare(PrepareConfig(sources=(tmp_path / "pairs.jsonl",), out=tmp_path / "pairs", **given))  # type: ignore[arg-type]
    judge = ["align", *tiny_from(base, tmp_path / "pairs", tmp_path / "judge", method="reward", optimizer__lr=0.01)]
    assert moray(*judge, "--train.steps", "20", "--train.eval_every", "0").code == 0
    monkeypatch.chdir(tmp_path)
    changes = {"rl__rewards": "model:judge=1,exact=0", "train__steps": 3}
    assert moray(*words(base, prompts, tmp_path / "run", **changes)).code == 0
    (commit,) = list_commits(tmp_path / "judge" / "checkpoints")
    rows = read_metrics(tmp_path / "run")
    assert all(row["reward"] == pytest.approx(row[f"reward/model:{commit.path}"]) for row in rows)
    assert len({row["reward"] for row in rows}) == 3
    assert moray(*judge, "--train.steps", "21", "--train.eval_every", "0").code == 0
    outcome = moray(*words(base, prompts, tmp_path / "run", **(changes | {"train__steps": 4})))
    assert outcome.code == 0, outcome.err
    outcome = moray(*words(base, prompts, tmp_path / "other", **(changes | {"rl__rewards": f"model:{base}=1"})))
    assert outcome.code == 2
    assert "must be a reward model" in outcome.err


def test_a_step_is_shown_as_its_prompts(moray: Moray, base: Path, prompts: Path, tmp_path: Path) -> None:
    assert moray(*words(base, prompts, tmp_path / "run", train__steps=2)).code == 0
    outcome = moray("inspect", tmp_path / "run", "--step", "2", "--json")
    assert outcome.code == 0, outcome.err
    lanes = [json.loads(line) for line in outcome.out.splitlines()]
    assert [lane["position"] for lane in lanes] == [4, 5, 6, 7]
    for lane in lanes:
        (document,) = lane["documents"]
        assert "Say " in document["text"]
        assert document["text"].endswith("<|im_start|>assistant\n")
