"""Drawing tokens against probabilities made by hand, and text that is shown a whole character at a time."""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from vocabularies import KINDS, llama2

from moray.data.tokenizer import Tokenizer, load_tokenizer
from moray.jobs.generation.generate import Sampling, draw, generate_tokens, stream_text
from moray.model import Decoder, ModelConfig, initialise

PROBABILITIES = [0.1, 0.4, 0.05, 0.25, 0.2]
DRAWS = 4000


def assert_drawn_as(sampling: Sampling, expected: list[float]) -> None:
    """Frequencies within 5 standard deviations; what has no probability never comes."""
    logits, generator = torch.tensor(PROBABILITIES).log(), torch.Generator().manual_seed(0)
    found = Counter(draw(logits, sampling, generator) for _ in range(DRAWS))
    for token, probability in enumerate(expected):
        assert abs(found[token] / DRAWS - probability) <= 5 * math.sqrt(probability * (1 - probability) / DRAWS), token


def test_at_temperature_1_tokens_come_as_often_as_the_model_says() -> None:
    assert_drawn_as(Sampling(temperature=1), PROBABILITIES)


def test_temperature_raises_probabilities_to_a_power() -> None:
    squares = [p**2 for p in PROBABILITIES]
    assert_drawn_as(Sampling(temperature=0.5), [square / sum(squares) for square in squares])


def test_top_k_draws_among_the_k_likeliest() -> None:
    assert_drawn_as(Sampling(temperature=1, top_k=2), [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0])
    assert_drawn_as(Sampling(temperature=1, top_k=1), [0, 1, 0, 0, 0])
    assert_drawn_as(Sampling(temperature=1, top_k=99), PROBABILITIES)


def test_top_p_draws_among_the_fewest_that_reach_p() -> None:
    assert_drawn_as(Sampling(temperature=1, top_p=0.6), [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0])
    assert_drawn_as(Sampling(temperature=1, top_p=0.66), [0, 0.4 / 0.85, 0, 0.25 / 0.85, 0.2 / 0.85])
    assert_drawn_as(Sampling(temperature=1, top_p=0.01), [0, 1, 0, 0, 0])


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 0.6), (2, 0.65), (4, 0.9), (99, 0.5), (1, 0.1)])
def test_top_k_and_top_p_together_are_what_transformers_makes_of_them(top_k: int, top_p: float) -> None:
    """The nucleus is cut from the k likeliest as if there were no others."""
    warpers = [TemperatureLogitsWarper(0.8), TopKLogitsWarper(top_k), TopPLogitsWarper(top_p)]
    scores = torch.tensor([PROBABILITIES]).log()
    for warper in warpers:
        scores = warper(torch.tensor([[0]]), scores)
    assert_drawn_as(Sampling(0.8, top_k, top_p), scores.softmax(-1)[0].tolist())


def test_temperature_0_takes_the_likeliest_whatever_else_is_set() -> None:
    assert_drawn_as(Sampling(temperature=0, top_k=3, top_p=0.9), [0, 1, 0, 0, 0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, r"temperature=-0\.1 must be 0 \(greedy\) or more"),
        ({"top_k": -1}, r"top_k=-1 must be 0 \(all\) or more"),
        ({"top_p": 0.0}, r"top_p=0\.0 must lie above 0 and at most at 1"),
        ({"temperature": math.nan}, r"temperature=nan must be 0"),
        ({"seed": -1}, r"seed=-1 must be 0 or more"),
        ({"top_p": 1.5}, r"top_p=1\.5 must lie above 0 and at most at 1"),
    ],
)
def test_sampling_that_makes_no_sense_is_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    config = ModelConfig.preset(
        "demo-moe",
        n_layers=2,
        d_model=32,
        max_seq_len=32,
        vocab_size=64,
        attention={"n_heads": 4, "n_kv_heads": 2, "head_dim": 8},
        ffn={"width": 48},
        moe={"expert_width": 16},
        init={"std": 0.3},
    )
    module = Decoder(config).eval()
    initialise(module, seed=0)
    return module


def test_greedy_tokens_equal_computing_everything_anew(decoder: Decoder) -> None:
    tokens = [3, 1, 4]
    with torch.no_grad():
        for _ in range(29):
            tokens.append(int(decoder(torch.tensor([tokens]))[0, -1].argmax()))
    assert list(generate_tokens(decoder, [3, 1, 4], 29, Sampling(temperature=0))) == tokens[3:]


def test_the_seed_decides_on_the_draws(decoder: Decoder) -> None:
    first, again, other = (
        list(generate_tokens(decoder, [3, 1, 4], 20, Sampling(temperature=1, seed=seed))) for seed in (0, 0, 1)
    )
    assert first == again != other


def test_without_a_number_of_tokens_there_are_as_many_as_the_model_has_room_for(decoder: Decoder) -> None:
    assert len(list(generate_tokens(decoder, [3] * 12, None, Sampling()))) == 32 - 12


@pytest.mark.parametrize(
    ("prompt", "new", "message"),
    [
        ([3] * 20, 13, "20 prompt tokens and max_new_tokens=13 exceed max_seq_len=32"),
        ([], 3, "the prompt is empty"),
        ([3, 10**6], 3, "the prompt holds token 1000000 and the model's vocab_size="),
        ([3], 0, "max_new_tokens=0 must be at least 1"),
        ([3], -5, "max_new_tokens=-5 must be at least 1"),
        ([3] * 32, None, "32 prompt tokens leave no room for others: max_seq_len=32"),
    ],
)
def test_what_cannot_be_generated_is_refused_at_once(
    decoder: Decoder, prompt: list[int], new: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate_tokens(decoder, prompt, new, Sampling())


@pytest.fixture(scope="module")
def tokenizer(dataset: Path) -> Tokenizer:
    return load_tokenizer(dataset)


TEXT = "def fish():  # 🐟 é 漢\n    return '\ufffd'\n"


def test_streamed_text_never_shows_half_a_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    assert len(tokenizer.encode("🐟")) > 1, "the fish takes several tokens, or this tests nothing"
    pieces = list(stream_text(tokenizer, iter(ids)))
    assert "".join(pieces) == TEXT, "what was shown too early could not be taken back"
    assert sum(bool(piece) for piece in pieces) > 10, "it streams"


def test_eos_ends_the_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one")
    assert "".join(stream_text(tokenizer, iter([*ids, tokenizer.eos_id, *ids]))) == "one"
    assert "".join(stream_text(tokenizer, iter([tokenizer.eos_id]))) == ""


def test_every_stop_token_ends_the_text(tokenizer: Tokenizer) -> None:
    ids, (eos, turn) = tokenizer.encode("one"), tokenizer.stop_ids
    assert tokenizer.decode([eos, turn]) == "<|eos|><|im_end|>"
    assert "".join(stream_text(tokenizer, iter([*ids, turn, *ids]))) == "one"


def test_a_temperature_next_to_nothing_takes_the_likeliest() -> None:
    for temperature in (1e-9, 1e-40, 5e-324):
        assert_drawn_as(Sampling(temperature), [0, 1, 0, 0, 0])


@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize("logits", [[0.1, math.nan, 0.2], [0.1, math.inf, 0.2], [math.nan] * 3])
def test_logits_that_are_no_numbers_are_an_error_and_no_token(temperature: float, logits: list[float]) -> None:
    with pytest.raises(FloatingPointError, match=r"logits reach (nan|inf): its weights are damaged"):
        draw(torch.tensor(logits), Sampling(temperature), torch.Generator())


def test_a_character_that_never_completes_is_shown_as_such_at_the_end(tokenizer: Tokenizer) -> None:
    half = [*tokenizer.encode("a"), tokenizer.encode("🐟")[0]]
    assert "".join(stream_text(tokenizer, iter(half))) == "a\ufffd"


def test_streaming_decodes_each_token_a_few_times_however_long_the_text(tokenizer: Tokenizer) -> None:
    """Counted, not timed: to decode everything anew at each of n tokens would be n^2 / 2."""
    decoded = 0

    class Counting(Tokenizer):
        def decode(self, ids: Iterable[int]) -> str:
            nonlocal decoded
            decoded += len(list(ids))
            return super().decode(ids)

    ids = tokenizer.encode(TEXT * 50)
    counting = Counting(**{field.name: getattr(tokenizer, field.name) for field in fields(tokenizer)})
    assert "".join(stream_text(counting, iter(ids))) == TEXT * 50
    assert decoded < 20 * len(ids)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", ["The whale", "The whale,", "so é漢🐟", "a ", ""])
def test_text_goes_on_where_the_prompt_ends(kind: Callable[[Path], Path], prompt: str, tmp_path: Path) -> None:
    """What is shown is what transformers' text of all tokens has after that of the prompt's."""
    ours, theirs = load_tokenizer(kind(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    before = theirs(prompt, add_special_tokens=False).input_ids
    after = theirs(" and the sea 🐟🐟 漢, again", add_special_tokens=False).input_ids
    whole = theirs.decode([*before, *after])
    shown = "".join(stream_text(ours, iter(after), ours.encode(prompt)))
    assert whole.endswith("and the sea 🐟🐟 漢, again")
    assert theirs.decode(before) + shown == whole


def test_half_a_character_after_whole_ones_does_not_show_them_again(tmp_path: Path) -> None:
    """A decoder that takes bytes together finds all of them wrong where one is."""
    ours = load_tokenizer(llama2(tmp_path))
    fish, half, more = ours.encode("🐟")[1:], ours.encode("é")[1:2], ours.encode("sea")
    assert ours.decode([*fish, *half, *more]) == "\ufffd" * 5 + " sea"
    assert "".join(stream_text(ours, iter([*fish, *half, *more]))) == "🐟\ufffd sea"
