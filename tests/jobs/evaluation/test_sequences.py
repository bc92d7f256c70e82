"""Where a context ends and what is scored, in tokens by hand."""

from pathlib import Path

import pytest
import torch
from vocabularies import gpt2, qwen

from moray import UserError
from moray.data.tokenizer import load_tokenizer
from moray.jobs.evaluation.scoring import Model
from moray.jobs.evaluation.sequences import Continuation, continuations, encode
from moray.model import Decoder, ModelConfig


@pytest.fixture
def model(tmp_path: Path) -> Model:
    """GPT-2's kind of tokenizer: no BOS before a text by default, and one by name."""
    return model_of(tmp_path)


def model_of(folder: Path, kind: object = gpt2, max_seq_len: int = 64, vocab_size: int = 400) -> Model:
    sizes = {"n_layers": 1, "d_model": 8, "ffn": {"width": 8}}
    heads = {"n_heads": 1, "n_kv_heads": 1, "head_dim": 8}
    config = ModelConfig.preset("demo-dense", **sizes, attention=heads, max_seq_len=max_seq_len, vocab_size=vocab_size)
    with torch.device("meta"):
        decoder = Decoder(config)
    return Model(decoder, load_tokenizer(kind(folder)), 1000)  # type: ignore[operator]


def scored(model: Model, before: str, after: str) -> tuple[str, str]:
    """The context and what is scored after it, as texts."""
    ((sequence, _),) = continuations(model, [Continuation("FILE, line 7", before, after)])
    tokens, decode = sequence.tokens.tolist(), model.tokenizer.decode
    return decode(tokens[: -sequence.n_scored]), decode(tokens[-sequence.n_scored :])


def refusal(model: Model, before: str, after: str) -> str:
    with pytest.raises(UserError) as raised:
        continuations(model, [Continuation("FILE, line 7", before, after)])
    return str(raised.value)


def test_a_token_that_reaches_over_the_border_is_scored_whole(model: Model) -> None:
    """lattice#1545, trl#2209: in two pieces a lone space would end the context, as in no training text."""
    assert len(model.tokenizer.encode(" whale")) == 1
    assert scored(model, "The ", "whale") == ("The", " whale")
    assert scored(model, "The", " whale") == ("The", " whale")
    assert scored(model, "The wha", "le") == ("The", " whale")


def test_white_space_before_is_scored_whether_a_token_joins_it_or_not(model: Model) -> None:
    """Else one choice would pay for the space, and another would be given it."""
    assert scored(model, "The ", "Xe") == ("The", " Xe")
    assert scored(model, "The\n", "Xe") == ("The", "\nXe")


def test_a_context_that_merges_whole_leaves_bos_alone(model: Model) -> None:
    assert len(model.tokenizer.encode("The")) == 1
    assert scored(model, "Th", "e") == ("<|endoftext|>", "The")


def test_without_bos_something_must_stand_before(tmp_path: Path) -> None:
    model = model_of(tmp_path, qwen)
    assert scored(model, "The", " whale") == ("The", " whale")
    assert refusal(model, "Th", "e") == (
        "FILE, line 7: nothing stands before 'e', and the tokenizer has no BOS that could"
    )


def test_what_is_too_long_loses_the_beginning_of_its_context(tmp_path: Path) -> None:
    model = model_of(tmp_path, max_seq_len=4)
    for count in range(1, 7):
        ((sequence, cut),) = continuations(model, [Continuation("", " whale" * count, " the sea")])
        assert model.tokenizer.decode(sequence.tokens.tolist()) == " whale" * min(count, 3) + " the sea"
        assert sequence.n_scored == 2
        assert cut == (count > 3)


def test_a_continuation_longer_than_the_model_is_refused(tmp_path: Path) -> None:
    model = model_of(tmp_path, max_seq_len=4)
    assert scored(model, "The", " whale" * 4) == ("The", " whale" * 4)
    assert refusal(model, "The", " whale" * 5) == (
        "FILE, line 7: ' whale whale whale whale whale' … has 5 tokens; the model takes max_seq_len=4"
    )


def test_a_continuation_of_no_tokens_is_refused(model: Model) -> None:
    line = "FILE, line 7: '' has no tokens of its own; leave it out, or write what is to be scored"
    assert refusal(model, "The", "") == line


def test_a_special_token_that_is_written_in_a_text_is_text(model: Model) -> None:
    """transformers#29279: it became a control token."""
    (ids,) = encode(model, ["The<|endoftext|> whale"], ())
    assert model.tokenizer.eos_id not in ids.tolist()
    assert model.tokenizer.decode(ids.tolist()) == "The<|endoftext|> whale"


def test_a_tokenizer_of_another_model_is_told(tmp_path: Path) -> None:
    model = model_of(tmp_path, vocab_size=300)
    with pytest.raises(
        UserError, match=r"a text holds token 3\d\d and the model's vocab_size=300: another's tokenizer"
    ):
        list(encode(model, ["The whale and the sea"], ()))
