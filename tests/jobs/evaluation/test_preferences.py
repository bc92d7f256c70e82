"""Pairs of answers, against transformers; and what tasks share with a dataset, by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from moray.jobs.cli import dispatch
from moray.jobs.datasets.config import PrepareConfig
from moray.jobs.datasets.prepare import prepare

Moray = Callable[..., "Outcome"]  # type: ignore[name-defined]  # noqa: F821 - of conftest.py
PAIRS = [
    {"prompt": f"Say {n}", "chosen": "yes " * (n + 1), "rejected": "no, never: " + "x" * n, "id": n} for n in range(6)
] + [
    {
        "conversations": [
            {"from": "human", "value": "first"},
            {"from": "gpt", "value": "an answer of before"},
            {"from": "human", "value": "second"},
        ],
        "chosen": {"from": "gpt", "value": "def"},
        "rejected": {"from": "gpt", "value": "class"},
        "id": "long",
    }
]


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs") / "run"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CUDA_VISIBLE_DEVICES", "")
        assert dispatch(["pretrain", *tiny(dataset, folder, train__steps=2, train__eval_every=0)]) == 0
    return folder


def lines(path: Path, items: list[Any]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def evaluated(moray: Moray, run: Path, out: Path, *words: object) -> dict[str, Any]:
    outcome = moray("evaluate", run, *words, "--out", out, "--items")
    assert outcome.code == 0, outcome.err
    (task,) = json.loads(out.read_text())["tasks"]
    return dict(task, printed=outcome.out)


def test_pairs_are_scored_as_transformers_scores_them(moray: Moray, run: Path, tmp_path: Path) -> None:
    """The last answer and the token that ends it, given all before; ties are not preferred."""
    task = evaluated(moray, run, tmp_path / "found.json", "--tasks", lines(tmp_path / "pairs.jsonl", PAIRS))
    assert moray("export", run, "--out", tmp_path / "hf").code == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    preferred = []
    for pair, item in zip(PAIRS, task["items"], strict=True):
        said = pair.get("conversations") or [{"from": "human", "value": pair["prompt"]}]
        asked = [
            {"role": {"human": "user", "gpt": "assistant"}[each["from"]], "content": each["value"]}  # type: ignore[index]
            for each in said  # type: ignore[attr-defined]
        ]
        found = []
        for side in ("chosen", "rejected"):
            answer = pair[side]["value"] if isinstance(pair[side], dict) else pair[side]  # type: ignore[index, call-overload]
            whole = tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": answer}])["input_ids"]
            start = len(tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"])
            end = len(whole) - 1  # but for the line end behind the turn
            with torch.no_grad():
                logp = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            found.append(sum(float(logp[i - 1, whole[i]]) for i in range(start, end)))
        assert item["log_likelihoods"] == pytest.approx(found, rel=1e-4)
        preferred.append(found[0] > found[1])
        assert item["preferred"] == preferred[-1]
    assert task["metrics"]["acc"]["value"] == pytest.approx(sum(preferred) / len(PAIRS))
    assert (task["kind"], task["n"]) == ("preference", 7)


def test_pairs_that_cannot_be_scored(moray: Moray, run: Path, tmp_path: Path) -> None:
    for record, message in (
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "line 1: both answers are the same"),
        ({"prompt": "q", "chosen": "a", "rejected": 3}, "line 1: field 'rejected' must be a list of messages, not '3'"),
        ({"prompt": "q", "chosen": "x y " * 3000, "rejected": "b"}, "tokens; the model takes max_seq_len=2048"),
    ):
        outcome = moray("evaluate", run, "--tasks", lines(tmp_path / "pairs.jsonl", [record]))
        assert outcome.code == 2
        assert message in outcome.err
    outcome = moray("evaluate", run, "--tasks", lines(tmp_path / "pairs.jsonl", PAIRS), "--shots", 1)
    assert "shots=1 must be 0" in outcome.err


SENTENCE = "the quick brown fox jumps over the lazy dog and then it sleeps for a while"


def test_items_that_share_words_with_the_data(moray: Moray, run: Path, tmp_path: Path) -> None:
    """Runs of 13 words, or of all of 8 to 12; fewer tell nothing. Case and punctuation do not count."""
    documents = [{"text": f"{number} other words. {SENTENCE.title()}!"} for number in range(3)]
    documents += [{"text": f"Nothing of it {number}"} for number in range(20)]
    source = lines(tmp_path / "x.jsonl", documents)
    prepare(PrepareConfig(sources=(source,), out=tmp_path / "data", vocab_size=300, validation=0.05))
    items = [
        {"query": "the quick, brown fox jumps over the lazy dog and then it", "choices": ["eats", "sleeps"], "gold": 1},
        {"query": "the quick, brown fox jumps over the lazy dog and then it", "choices": ["eats", "sleeps"], "gold": 0},
        {"query": "brown fox jumps over the lazy", "choices": ["dog and", "cat and"], "gold": 0},
        {"query": "brown fox jumps over the lazy", "choices": ["dog", "cat"], "gold": 0},
    ]
    words = ["--tasks", lines(tmp_path / "t.jsonl", items), "--overlap", tmp_path / "data"]
    task = evaluated(moray, run, tmp_path / "found.json", *words)
    assert task["overlap"] == {"judged": 3, "overlapping": 2, "lines": [1, 3]}
    assert "t.jsonl: 2 of 3 items that are long enough share a run of 8 to 13 words with the data" in task["printed"]


def test_dialogues_that_were_learnt_from_are_found(moray: Moray, run: Path, tmp_path: Path) -> None:
    records = [
        {"instruction": SENTENCE, "output": "yes"},
        *({"instruction": f"q {n}", "output": "a"} for n in range(9)),
    ]
    source = lines(tmp_path / "x.jsonl", records)
    config = PrepareConfig(
        sources=(source,), out=tmp_path / "data", vocab_size=300, validation=0.2, kind="chat", seed=1
    )
    prepare(config)
    task = lines(tmp_path / "t.jsonl", [{"query": SENTENCE, "choices": ["yes", "no"], "gold": 0}])
    outcome = moray("evaluate", run, "--tasks", task, "--overlap", tmp_path / "data")
    assert "1 of 1 items that are long enough share" in outcome.out
    assert "has no index.json" in moray("evaluate", run, "--tasks", task, "--overlap", tmp_path).err
