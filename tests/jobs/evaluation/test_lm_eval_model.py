"""What lm-eval gets of a model by way of moray, against what it gets of the same folder by its own way (HFLM)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate", reason="lm-eval's own way needs it")

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from vocabularies import gpt2, llama2

from moray import UserError
from moray.jobs.evaluation.lm_eval_model import MorayLM

LONGEST = 128
PAIRS = [
    ("The whale", " the ship; and the sea again"),
    ("The whale", " sea"),
    ("The sea, said the old man. " * 40, "Again"),
    ("", "The whale"),
    ("def whale(", "folder: Path"),
]
TEXTS = ["The whale, the ship.", "The old man and the sea, again.\n" * 30]


@pytest.fixture(scope="module", params=[gpt2, llama2], ids=lambda kind: str(kind.__name__))
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[MorayLM, Any]:
    kind: Callable[[Path], Path] = request.param
    folder = kind(tmp_path_factory.mktemp("published"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=LONGEST, initializer_range=0.3, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CUDA_VISIBLE_DEVICES", "")
        theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)
        return MorayLM(folder, batch_tokens=300), theirs


def instances(kind: Any, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, each, n) for n, each in enumerate(arguments)]


def test_log_likelihoods(models: tuple[MorayLM, Any]) -> None:
    ours, theirs = (model.loglikelihood(instances("loglikelihood", *PAIRS), disable_tqdm=True) for model in models)
    for (one, one_greedy), (two, two_greedy) in zip(ours, theirs, strict=True):
        assert one == pytest.approx(two, abs=1e-4)
        assert one_greedy == two_greedy


def test_rolling_log_likelihoods(models: tuple[MorayLM, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Their own way puts BOS before a text whose tokenizer has done so already, unless told not to ask it."""
    monkeypatch.setattr(models[1], "add_bos_token", False)
    asked = instances("loglikelihood_rolling", *[(text,) for text in TEXTS])
    ours, theirs = (model.loglikelihood_rolling(asked, disable_tqdm=True) for model in models)
    assert ours == pytest.approx(theirs, abs=1e-3)


def test_texts_up_to_a_stop(models: tuple[MorayLM, Any]) -> None:
    settings = [
        {"until": ["\n"], "max_gen_toks": 20, "do_sample": False},
        {"until": ["e", "a"], "max_gen_toks": 12, "do_sample": False},
    ]
    asked = instances("generate_until", *[(before, each) for each in settings for before, _ in PAIRS[:3]])
    ours, theirs = (model.generate_until(asked, disable_tqdm=True) for model in models)
    assert ours == theirs


def test_draws_are_refused(models: tuple[MorayLM, Any]) -> None:
    with pytest.raises(UserError, match="request 0 asks for draws"):
        models[0].generate_until(instances("generate_until", ("The", {"do_sample": True, "temperature": 0.7})))
