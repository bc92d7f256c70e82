"""`moray align` by preferences, end to end: what it learns, that it goes on after a kill, and what it refuses."""

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import kill_when
from tiny import tiny, tiny_from
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from moray.jobs.cli import dispatch
from moray.jobs.datasets.config import PrepareConfig
from moray.jobs.datasets.prepare import prepare
from moray.jobs.training.metrics import read_metrics
from moray.parallel.checkpoint.commits import list_commits

Moray = Callable[..., "Outcome"]  # type: ignore[name-defined]  # noqa: F821 - of conftest.py
DENSE = {"preset": "demo-dense", "moe": "none"}
COLOURS, TYPES = ("red", "blue", "green"), ("list", "dict", "set")


@pytest.fixture(scope="module")
def pairs(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two words that are asked for, the chosen answer is the colour."""
    draw, folder = random.Random(0), tmp_path_factory.mktemp("pairs")
    with open(folder / "pairs.jsonl", "w") as file:
        for number in range(240):
            colour, kind = draw.choice(COLOURS), draw.choice(TYPES)
            asked = f"{number}: {' or '.join(draw.sample([colour, kind], 2))}" + "?" * draw.randint(1, 9)
            answers = {"chosen": colour, "rejected": " ".join([kind] * draw.randint(1, 3))}
            file.write(json.dumps({"prompt": asked, **answers}) + "\n")
    sources = (folder / "pairs.jsonl",)
    prepare(PrepareConfig(sources=sources, out=folder / "data", tokenizer=dataset, validation=0.2, kind="preference"))
    return folder / "data"


def begun(dataset: Path, folder: Path, **changes: object) -> Path:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CUDA_VISIBLE_DEVICES", "")
        assert (
            dispatch(["pretrain", *tiny(dataset, folder, **{"train__steps": 2, "train__eval_every": 0, **changes})])
            == 0
        )
    return folder


@pytest.fixture(scope="module")
def base(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return begun(dataset, tmp_path_factory.mktemp("base") / "run")


def words(base: Path, pairs: Path, run: Path, **changes: object) -> list[str]:
    settings = {"optimizer__lr": 0.003, "train__steps": 12, "train__eval_every": 0, "method": "dpo", **changes}
    return ["align", *tiny_from(base, pairs, run, **settings)]


@pytest.fixture(scope="module")
def aligned(base: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("aligned") / "run"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CUDA_VISIBLE_DEVICES", "")
        assert dispatch(words(base, pairs, folder, train__steps=60, align__beta=0.5)) == 0
    return folder


def test_it_begins_at_ln_2_and_learns_what_is_preferred(aligned: Path) -> None:
    """No loss balances experts, and no routing bias moves: a policy that changed by itself would leave ln 2."""
    rows = read_metrics(aligned)
    first, last = rows[0], rows[-1]
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-15)
    assert first["margin"] == first["accuracy"] == first["kl"] == 0
    assert last["validation_accuracy"] > 0.95
    assert last["validation_loss"] < 0.2
    assert last["margin"] > 1
    assert last["kl"] > 0
    assert last["chosen_logp"] - first["chosen_logp"] > last["rejected_logp"] - first["rejected_logp"]


NUMBERS = ("step", "loss", "margin", "accuracy", "kl", "agreement", "grad_norm", "positions", "validation_loss")


def told(run: Path) -> list[dict[str, Any]]:
    return [{name: row.get(name) for name in NUMBERS} for row in read_metrics(run)]


@pytest.mark.parametrize("method", ["dpo", "reward", "distill"])
def test_a_kill_changes_nothing(
    moray: Moray, base: Path, pairs: Path, aligned: Path, dataset: Path, tmp_path: Path, method: str
) -> None:
    """NeMo-RL 2955, 3722: a resume took the policy that it found for the reference. Here all numbers stay the same."""
    settings: dict[str, object] = {"method": method, "checkpoint__every": 4, "train__steps": 24}
    settings |= {"align__teacher": aligned} if method == "distill" else {}

    def command(name: str) -> list[str]:
        return words(base, dataset if method == "distill" else pairs, tmp_path / name, **settings)

    kill_when(lambda: bool(list_commits(tmp_path / "killed" / "checkpoints")), command("killed"))
    assert 4 <= len(read_metrics(tmp_path / "killed")) < 24
    for name in ("killed", "whole"):
        outcome = moray(*command(name))
        assert outcome.code == 0, outcome.err
    assert told(tmp_path / "killed") == told(tmp_path / "whole")


def test_another_reference_is_refused(moray: Moray, base: Path, pairs: Path, dataset: Path, tmp_path: Path) -> None:
    """A reference that is trained on is not what it was, but its commit is; another one in that place is refused."""
    reference, run = tmp_path / "reference", tmp_path / "run"
    shutil.copytree(base, reference)
    asked = words(base, pairs, run, align__reference=reference)
    assert moray(*asked).code == 0
    commit = list_commits(begun(dataset, reference, train__steps=3) / "checkpoints")[0]
    assert moray(*words(base, pairs, run, align__reference=reference, train__steps=14)).code == 0
    (other,) = list_commits(begun(dataset, tmp_path / "other", train__seed=1) / "checkpoints")
    shutil.rmtree(commit.path)
    shutil.copytree(other.path, commit.path)
    outcome = moray(*words(base, pairs, run, align__reference=reference, train__steps=16))
    assert outcome.code != 0
    assert f"align.reference={commit.path} is not the model that this run began beside" in outcome.err
    shutil.rmtree(reference)
    outcome = moray(*words(base, pairs, run, align__reference=reference, train__steps=16))
    assert outcome.code == 2
    assert f"align.reference={commit.path} is not there" in outcome.err


def test_the_export_prefers_what_the_run_preferred(
    moray: Moray, aligned: Path, pairs: Path, dataset: Path, tmp_path: Path
) -> None:
    """The log-probabilities of a pair by transformers, from the exported folder, are those of the policy."""
    assert moray("export", aligned, "--out", tmp_path / "hf").code == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for colour, kind in zip(COLOURS, TYPES, strict=True):
        found = []
        for answer in (colour, kind):
            said = [{"role": "user", "content": f"17: {kind} or {colour}?"}, {"role": "assistant", "content": answer}]
            whole = tokenizer.apply_chat_template(
                said, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
            )
            ids, trained = whole["input_ids"], whole["assistant_masks"][0, 1:].bool()
            with torch.no_grad():
                logp = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            found.append(logp[trained].sum().item())
        assert found[0] > found[1] + 1


def test_a_reward_model_learns_and_is_read_by_transformers(
    moray: Moray, base: Path, pairs: Path, dataset: Path, tmp_path: Path
) -> None:
    """And scores with transformers what it scores here; it cannot be asked to write."""
    dense = begun(dataset, tmp_path / "dense", **{f"model__{name}": value for name, value in DENSE.items()})
    run = tmp_path / "run"
    outcome = moray(*words(dense, pairs, run, method="reward", train__steps=60, align__centring=0.01))
    assert outcome.code == 0, outcome.err
    rows = read_metrics(run)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=0.05)
    assert rows[-1]["validation_accuracy"] > 0.95
    assert rows[-1]["validation_margin"] > 1
    assert moray("export", run, "--out", tmp_path / "hf").code == 0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    scores = []
    for answer in ("red", "list"):
        said = [{"role": "user", "content": "17: list or red?"}, {"role": "assistant", "content": answer}]
        whole = tokenizer.apply_chat_template(said, return_dict=True, return_tensors="pt")
        scores.append(model(**whole).logits.item())
    assert scores[0] > scores[1] + 1
    outcome = moray("generate", run, "--prompt", "x")
    assert outcome.code == 2
    assert "this model scores texts" in outcome.err
    outcome = moray(*words(base, pairs, tmp_path / "none", method="reward", eval__tasks=dataset / "x.jsonl"))
    assert "eval.tasks are asked of models that predict tokens" in outcome.err


def test_a_student_comes_near_its_teacher(moray: Moray, dataset: Path, tmp_path: Path) -> None:
    """A dense student of a mixture of experts, of the same vocabulary."""
    teacher = begun(dataset, tmp_path / "teacher", train__steps=50, optimizer__lr=0.01)
    dense = begun(dataset, tmp_path / "dense", **{f"model__{name}": value for name, value in DENSE.items()})
    run = tmp_path / "run"
    asked = words(dense, dataset, run, method="distill", align__teacher=teacher, train__steps=40, align__mix=0.2)
    outcome = moray(*asked)
    assert outcome.code == 0, outcome.err
    rows = read_metrics(run)
    assert rows[-1]["kl"] < 0.5 * rows[0]["kl"]
    assert rows[-1]["agreement"] > rows[0]["agreement"]
    outcome = moray(*words(dense, dataset, tmp_path / "none", method="distill"))
    assert outcome.code == 2
    assert "align.teacher is missing" in outcome.err


def test_what_it_refuses(moray: Moray, base: Path, pairs: Path, dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    wide = begun(dataset, tmp_path / "wide", model__vocab_size=408)
    full = begun(dataset, tmp_path / "full", model__moe__capacity_factor=1.5)
    for arguments, message in (
        (words(base, dataset, run), "is of kind text, which `moray pretrain` learns from; train.objective=dpo wants"),
        (["pretrain", *words(base, pairs, run)[1:-2]], "is of kind preference, which `moray align` learns from"),
        (words(base, pairs, run, method="dop"), "--method dop: did you mean dpo?"),
        (words(base, pairs, run)[:-2], "--method is missing: dpo"),
        (["align", "--method", "dpo", "--data.path", pairs, "--run.dir", run], "model.from is missing"),
        (words(base, pairs, run, align__beta=0), "align.beta=0"),
        (
            words(base, pairs, run, align__length_normalised="true"),
            "align.length_normalised=True is of",
        ),
        (
            words(base, pairs, run, method="ipo", align__label_smoothing=0.1),
            "align.label_smoothing=0.1 is of",
        ),
        (words(base, pairs, run, align__label_smoothing=0.5), "align.label_smoothing=0.5"),
        (words(base, pairs, run, align__reference=tmp_path / "none"), f"align.reference={tmp_path / 'none'}"),
        (words(base, pairs, run, align__reference=wide), "has a vocabulary of 408 tokens, but model.vocab_size=400"),
        (words(full, pairs, run), "model.moe.capacity_factor=1.5 must be none: with train.objective=dpo"),
        (words(base, pairs, run, model__moe__jitter=0.1), "model.moe.jitter=0.1 must be 0.0: with train.objective=dpo"),
        (words(base, pairs, run, train__seq_len=8), "train.seq_len=8 is under every dialogue of the train split"),
        (["pretrain", *tiny(dataset, run, align__beta=0.2)], "align.… settings are of `moray align`"),
    ):
        outcome = moray(*arguments)
        assert outcome.code == 2, (arguments, outcome.err)
        assert message in outcome.err
    assert not run.exists()


def test_a_recipe_says_the_method(moray: Moray, aligned: Path) -> None:
    """The command that `moray submit` gives to a job, of any target, is `moray VERB --recipe FILE`."""
    outcome = moray("align", "--recipe", aligned / "config.toml")
    assert outcome.code == 0, outcome.err
    assert "has committed step 60 of train.steps=60: nothing to do" in outcome.err
    outcome = moray("align", "--recipe", aligned / "config.toml", "--method", "ipo")
    assert "train.objective=ipo (there: dpo)" in outcome.err


def test_it_is_another_run_with_another_method(moray: Moray, aligned: Path, base: Path, pairs: Path) -> None:
    outcome = moray(*words(base, pairs, aligned, train__steps=70, align__beta=0.4))
    assert outcome.code == 2
    assert "holds a different run: align.beta=0.4 (there: 0.5)" in outcome.err
    outcome = moray(*words(base, pairs, aligned, train__steps=70, align__beta=0.5, method="ipo"))
    assert outcome.code == 2
    assert "train.objective=ipo (there: dpo)" in outcome.err


def test_a_step_is_shown_as_the_pairs_that_it_was_taken_on(moray: Moray, aligned: Path) -> None:
    """Both answers of each, and what of them is learnt."""
    outcome = moray("inspect", aligned, "--step", "3", "--lane", "1")
    assert outcome.code == 0, outcome.err
    told = json.loads(moray("inspect", aligned, "--step", "3", "--lane", "1", "--json").out)
    documents = told["documents"]
    assert len(documents) % 2 == 0
    half = len(documents) // 2
    for chosen, rejected in zip(documents[:half], documents[half:], strict=True):
        assert chosen["key"] == rejected["key"]
        answers = [[text for text, is_trained in side["runs"] if is_trained] for side in (chosen, rejected)]
        assert answers[0][0].removesuffix("<|im_end|>") in COLOURS
        assert answers[1][0].split()[0].removesuffix("<|im_end|>") in TYPES
