"""What is found of every item, against transformers on the same folder, item by item: no batch, no padding."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from vocabularies import KINDS

from moray.jobs.cli import dispatch
from moray.jobs.evaluation.evaluate import Asked, evaluate

LONGEST = 128
CHOICES = [
    {"query": "The whale", "choices": ["sea", "the ship; and the sea again", "é漢🐟"], "gold": 1},
    {"query": "The ", "choices": ["whale", "old man", " ship"], "gold": 0},  # the space joins the choice's first token
    {"query": "def whale(", "choices": ["folder: Path", "None"], "gold": 0},
    {"query": "The sea, said the old man. " * 40, "choices": ["Again", "The ship again, again, again"], "gold": 1},
]
TEXTS = [
    {"text": "The whale, the ship; and the sea again."},
    {"text": "漢🐟 é"},
    {"text": "The old man and the sea.\n" * 40},
    {"text": "from pathlib import Path  "},
]
QUESTIONS = [
    {"question": "How many whales?", "answer": "One whale and one.\n#### 2"},
    {"question": "How many ships are there, and how old is the old man?", "answer": "#### 1,234"},
    {"question": "The ship; " * 60, "answer": "#### -3"},
]


def published(kind: Callable[[Path], Path], folder: Path) -> Path:
    """A random Llama with a tokenizer of the kind, saved as transformers does it."""
    tokenizer = AutoTokenizer.from_pretrained(kind(folder))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=LONGEST, initializer_range=0.3, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    return folder


def trained_moe(folder: Path, dataset: Path) -> tuple[Path, Path]:
    """A run of four steps with experts, and its export."""
    run, out = folder / "run", folder / "out"
    words = tiny(dataset, run, train__steps=4, model__max_seq_len=LONGEST, model__init__std=0.1)
    assert dispatch(["pretrain", *words]) == 0
    assert dispatch(["export", str(run), "--out", str(out)]) == 0
    return run, out


@pytest.fixture(scope="module", params=[*(kind.__name__ for kind in KINDS), "moe"])
def folders(
    request: pytest.FixtureRequest, dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """What is evaluated, and the folder in which transformers finds the same model."""
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CUDA_VISIBLE_DEVICES", "")
        if request.param == "moe":
            return trained_moe(folder, dataset)
    kind = {kind.__name__: kind for kind in KINDS}[request.param]
    return published(kind, folder), folder


class Theirs:
    """transformers' model and tokenizer of a folder."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text).input_ids
        return found

    @torch.no_grad()
    def log_probabilities(self, ids: list[int]) -> torch.Tensor:
        """Of every token after the first, given those before it."""
        logits = self.model(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)
        self.likeliest = logits.argmax(-1).tolist()
        return logits.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]

    def log_likelihood(self, before: str, after: str) -> tuple[float, bool]:
        context, whole = self.ids(before.rstrip()), self.ids(before + after)
        common = 0
        while common < min(len(context), len(whole)) and context[common] == whole[common]:
            common += 1
        n, cut = len(whole) - common, whole[-LONGEST - 1 :]
        total = float(self.log_probabilities(cut)[-n:].sum())
        return total, self.likeliest[-n:] == cut[-n:]


def items_of(folder: Path, task: Path, items: list[dict[str, Any]], **asked: Any) -> list[dict[str, Any]]:
    path = task / "task.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    report = evaluate(folder, Asked((path,), items=True, batch_tokens=400, **asked), pytest.fail)
    found: list[dict[str, Any]] = report["tasks"][0]["items"]
    return found


@pytest.mark.parametrize("shots", [0, 1])
def test_choices(folders: tuple[Path, Path], tmp_path: Path, shots: int) -> None:
    folder, theirs = folders[0], Theirs(folders[1])
    found = items_of(folder, tmp_path, CHOICES, shots=shots)
    example = "The whale the ship; and the sea again\n\n" if shots else ""
    assert [each["line"] for each in found] == [1, 2, 3, 4][shots:]
    for item, result in zip(CHOICES[shots:], found, strict=True):
        query = example + item["query"]
        afters = [
            choice if query.endswith(" ") or choice.startswith(" ") else f" {choice}" for choice in item["choices"]
        ]
        expected = [theirs.log_likelihood(query, after)[0] for after in afters]
        assert result["log_likelihoods"] == pytest.approx(expected, abs=1e-4)
        assert expected[result["chosen"]] == max(expected)
        per_byte = [value / len(choice.encode()) for value, choice in zip(expected, item["choices"], strict=True)]
        assert per_byte[result["chosen_per_byte"]] == max(per_byte)
    assert found[-1]["cut"]


def test_bits_of_texts(folders: tuple[Path, Path], tmp_path: Path) -> None:
    folder, theirs = folders[0], Theirs(folders[1])
    for item, result in zip(TEXTS, items_of(folder, tmp_path, TEXTS), strict=True):
        ids, bare = theirs.ids(item["text"]), theirs.tokenizer(item["text"], add_special_tokens=False).input_ids
        if ids == bare and theirs.tokenizer.bos_token_id is not None:
            ids = [theirs.tokenizer.bos_token_id, *ids]
        nats = 0.0
        for start in range(0, len(ids) - 1, LONGEST):
            nats -= float(theirs.log_probabilities(ids[start : start + LONGEST + 1]).sum())
        assert result["bits"] == pytest.approx(nats / math.log(2), abs=1e-3)
        assert result["bytes"] == len(item["text"].encode())
        assert result["tokens"] == len(ids) - 1


def test_last_words(folders: tuple[Path, Path], tmp_path: Path) -> None:
    folder, theirs = folders[0], Theirs(folders[1])
    parted = [("The whale, the ship; and the sea", " again.", "again."), ("漢🐟", " é", "é"),
              ("The old man and the sea.\n" * 39 + "The old man and the", " sea.", "sea."),
              ("from pathlib import", " Path", "Path")]  # fmt: skip
    for (before, after, word), result in zip(parted, items_of(folder, tmp_path, TEXTS, last_word=True), strict=True):
        total, greedy = theirs.log_likelihood(before, after)
        assert result["word"] == word
        assert result["log_likelihood"] == pytest.approx(total, abs=1e-4)
        assert result["correct"] == greedy


def test_answers(folders: tuple[Path, Path], tmp_path: Path) -> None:
    folder, theirs = folders[0], Theirs(folders[1])
    found = items_of(folder, tmp_path, QUESTIONS)
    told = theirs.model.generation_config.eos_token_id
    stops = {theirs.tokenizer.eos_token_id, *(told if isinstance(told, list) else [told])}
    for item, result in zip(QUESTIONS, found, strict=True):
        prompt = theirs.ids(f"Question: {item['question']}\nAnswer:")[-LONGEST // 2 :]
        written = theirs.model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=LONGEST // 2, eos_token_id=[*stops]
        )[0, len(prompt) :].tolist()
        if written[-1] in stops:
            written.pop()
        assert result["written"] == theirs.tokenizer.decode(written).partition("\nQuestion:")[0]
    assert [each["gold"] for each in found] == ["2", "1,234", "-3"]
    assert [each["cut"] for each in found] == [False, False, True]
