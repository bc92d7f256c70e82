"""Folders as others publish them: text as transformers' `generate` writes it, and the road from data to export."""

import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import tiny_from
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, PreTrainedModel
from vocabularies import gpt2, llama2, mistral, qwen

from moray.data.dataset import Dataset
from moray.jobs.generation.generate import load_run

Moray = Callable[..., "Outcome"]  # type: ignore[name-defined]  # noqa: F821 - of conftest.py
PROMPT = "The whale"


def publish(kind: Callable[[Path], Path], folder: Path) -> PreTrainedModel:
    """A random Llama with a tokenizer of the kind, saved as transformers does it, and two tokens that end a text.

    The tokenizer pads with a token that the embedding does not have, as many do who fine-tuned Llama 2.
    """
    tokenizer = AutoTokenizer.from_pretrained(kind(folder))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=128, initializer_range=0.5, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = [len(tokenizer) - 1]  # or it would be 2
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    written = model.generate(ids, do_sample=False, max_new_tokens=30)[0, ids.shape[1] :].tolist()
    ends = [token for n, token in enumerate(written) if n > 3 and token not in written[:n]][:2]
    assert len(ends) == 2, "the model repeats itself, and nothing could end"
    model.generation_config.eos_token_id = ends
    model.save_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    return model


def greedy(folder: Path, new: int) -> str:
    """The prompt and what transformers' model and tokenizer make of it, without the token that ends it."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    written = model.generate(ids, do_sample=False, max_new_tokens=new)[0].tolist()
    if written[-1] in model.generation_config.eos_token_id:
        written.pop()
    return PROMPT + tokenizer.decode(written)[len(tokenizer.decode(ids[0])) :] + "\n"


@pytest.mark.parametrize("kind", [llama2, mistral, qwen, gpt2])
def test_a_prompt_goes_on_as_in_transformers(moray: Moray, kind: Callable[[Path], Path], tmp_path: Path) -> None:
    """Token for token and space for space, up to the token that ends it there."""
    publish(kind, tmp_path)
    outcome = moray("generate", tmp_path, "--prompt", PROMPT, "--temperature", 0, "--max-new-tokens", 40)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == greedy(tmp_path, 40) == greedy(tmp_path, 100), "it ends before it must"


def test_bos_before_a_prompt_can_be_chosen(moray: Moray, tmp_path: Path) -> None:
    model = publish(gpt2, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    said = {}
    for bos, start in (("yes", [theirs.bos_token_id]), ("no", [])):
        ids = torch.tensor([[*start, *theirs(PROMPT, add_special_tokens=False).input_ids]])
        text = theirs.decode(model.generate(ids, do_sample=False, max_new_tokens=3)[0, ids.shape[1] :])
        outcome = moray(
            "generate", tmp_path, "--prompt", PROMPT, "--temperature", 0, "--max-new-tokens", 3, "--bos", bos
        )
        assert outcome.out == f"{PROMPT}{text}\n"
        said[bos] = outcome.out
    assert said["yes"] != said["no"], "or it would not matter"


@pytest.mark.parametrize("kind", [qwen, gpt2])
def test_the_whole_road_from_such_a_folder(moray: Moray, kind: Callable[[Path], Path], tmp_path: Path) -> None:
    published, data, run, out = (tmp_path / name for name in ("published", "data", "run", "out"))
    model = publish(kind, published)
    source = Path(sysconfig.get_path("stdlib")) / "wsgiref"
    assert moray("prepare", source, "--out", data, "--tokenizer", published, "--validation", 0.2).code == 0
    dataset, rows = Dataset.open(data), model.config.vocab_size
    assert dataset.vocab_size <= rows == AutoTokenizer.from_pretrained(published).pad_token_id
    assert dataset.pad_id < rows, "what pads a row is looked up like any token"
    outcome = moray("pretrain", *tiny_from(published, data, run, train__steps=1, optimizer__warmup_steps=1))
    assert outcome.code == 0, outcome.err
    assert moray("export", run, "--out", out).code == 0
    theirs, told = AutoTokenizer.from_pretrained(out), GenerationConfig.from_pretrained(out)
    assert {*model.generation_config.eos_token_id} <= {*told.eos_token_id} <= {*told.eos_token_id, theirs.eos_token_id}
    # A run's prompt starts as its documents do, and its export's as well, whatever the tokenizer did of itself.
    start = [] if theirs.bos_token_id is None else [theirs.bos_token_id]
    assert theirs(PROMPT).input_ids == [*start, *theirs(PROMPT, add_special_tokens=False).input_ids]
    for folder in (run, out):
        tokenizer = load_run(folder, pytest.fail)[1]
        assert [*tokenizer.prompt_start] == start
        assert {*tokenizer.stop_ids} == {*told.eos_token_id}
    for folder in (run, out):
        said = moray("generate", folder, "--prompt", PROMPT, "--temperature", 0, "--max-new-tokens", 20).out
        assert said == greedy(out, 20)


def test_a_bos_that_there_is_not_is_refused(moray: Moray, tmp_path: Path) -> None:
    publish(qwen, tmp_path)
    outcome = moray("generate", tmp_path, "--prompt", PROMPT, "--bos", "yes")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == "moray: bos=yes, and the tokenizer has no BOS token; leave it out, or name a bos_token\n"


def test_weights_that_are_no_numbers_are_one_line(moray: Moray, tmp_path: Path) -> None:
    model = publish(llama2, tmp_path)
    with torch.no_grad():
        model.lm_head.weight[7, 3] = torch.nan
    model.save_pretrained(tmp_path)
    for temperature in (0, 1):
        outcome = moray("generate", tmp_path, "--prompt", PROMPT, "--temperature", temperature)
        assert outcome.code == 1
        (line,) = outcome.err.splitlines()
        assert line == "moray: the model's logits reach nan: its weights are damaged, or training diverged"
