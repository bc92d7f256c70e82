"""Scores and greedy tokens of batches against the same sequences alone, in fp64, in every architecture."""

import numpy as np
import pytest
import torch
from architectures import MODELS, PIECES
from vocabularies import gpt2

from moray.data.tokenizer import Tokenizer, load_tokenizer
from moray.jobs.evaluation.greedy import continue_greedily
from moray.jobs.evaluation.ranks import Ranks
from moray.jobs.evaluation.scoring import Model, Scored, score
from moray.jobs.evaluation.sequences import windows
from moray.model import Decoder, ModelConfig, initialise

CONFIGS = {**MODELS, **{name: config for name, (config, _) in PIECES.items()}}
STOP = 0  # of the tokenizer `gpt2`


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    found = load_tokenizer(gpt2(tmp_path_factory.mktemp("gpt2")))
    assert found.stop_ids == (STOP,)
    return found


def model_of(config: ModelConfig, tokenizer: Tokenizer, batch_tokens: int) -> Model:
    decoder = Decoder(config).double().eval()
    initialise(decoder, seed=4)
    return Model(decoder, tokenizer, batch_tokens)


def random_tokens(config: ModelConfig, *lengths: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(1, config.vocab_size, length, dtype=np.uint16) for length in lengths]


def alone(model: Model, sequence: Scored) -> tuple[float, bool]:
    """By the logits of the sequence alone, token by token."""
    tokens = sequence.tokens.tolist()
    total, greedy = 0.0, True
    with torch.no_grad():
        logits_TV = model.decoder(torch.tensor([tokens[:-1]]))[0]
    for place in range(len(tokens) - sequence.n_scored, len(tokens)):
        total += float(logits_TV[place - 1].log_softmax(-1)[tokens[place]])
        greedy &= int(logits_TV[place - 1].argmax()) == tokens[place]
    return total, greedy


@pytest.mark.parametrize("name", CONFIGS)
def test_a_score_does_not_depend_on_batch_mates_or_padding(name: str, tokenizer: Tokenizer) -> None:
    """Megatron-LM#4168, verl#6280: a batch's shape changed routing. OpenRLHF#1332: the ragged tail was left out."""
    model = model_of(CONFIGS[name], tokenizer, batch_tokens=40)
    lengths = (3, 12, 2, 12, 7, 16, 5)  # the last batch is ragged, and one batch is all of one length
    sequences = [Scored(tokens, min(4, len(tokens) - 1)) for tokens in random_tokens(model.decoder.config, *lengths)]
    for found, sequence in zip(score(model, sequences), sequences, strict=True):
        total, greedy = alone(model, sequence)
        assert found.log_likelihood == pytest.approx(total, abs=1e-5)
        assert found.is_greedy == greedy


@pytest.mark.parametrize("name", CONFIGS)
def test_prompts_go_on_in_a_batch_as_they_do_alone(name: str, tokenizer: Tokenizer) -> None:
    """trlx#508, OpenRLHF#217: padding on the left moved positions, learned ones too."""
    model = model_of(CONFIGS[name], tokenizer, batch_tokens=48)
    prompts, new = random_tokens(model.decoder.config, 5, 3, 9, 5, 1), 6
    expected = []
    for prompt in prompts:
        tokens = prompt.tolist()
        for _ in range(new):
            with torch.no_grad():
                tokens.append(int(model.decoder(torch.tensor([tokens]))[0, -1].argmax()))
            if tokens[-1] == STOP:
                tokens.pop()
                break
        expected.append(tokens[len(prompt) :])
    assert continue_greedily(model, prompts, new) == expected


def test_a_stop_token_ends_a_row_and_no_other(tokenizer: Tokenizer) -> None:
    """One that a row writes third is made the stop: that row has two tokens, others go on until they write it."""
    model = model_of(CONFIGS["moe-deepseek"], tokenizer, batch_tokens=1000)
    prompts = random_tokens(model.decoder.config, 5, 3, 9)
    free = continue_greedily(model, prompts, 8)
    stop = next(token for token in free[0] if token not in free[1])
    stopping = Model(model.decoder, Tokenizer(**{**vars(tokenizer), "stop_ids": (stop,)}), 1000)
    expected = [row[: row.index(stop)] if stop in row else row for row in free]
    assert continue_greedily(stopping, prompts, 8) == expected != free


def test_scored_tokens_that_are_greedy_are_told_from_others(tokenizer: Tokenizer) -> None:
    model = model_of(CONFIGS["dense"], tokenizer, batch_tokens=100)
    (prompt,) = random_tokens(model.decoder.config, 5)
    (written,) = continue_greedily(model, [prompt], 3)
    right = np.concatenate([prompt, np.array(written, prompt.dtype)])
    wrong = right.copy()
    wrong[-2] = (wrong[-2] + 1) % model.decoder.config.vocab_size
    found = score(model, [Scored(right, 3), Scored(wrong, 3), Scored(wrong, 1)])
    assert [each.is_greedy for each in found][:2] == [True, False]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_passes_hold_every_sequence_once_within_the_limit(size: int) -> None:
    """And the ranks, side by side, have equally many, of equal shapes."""
    lengths = [5, 1, 9, 3, 3, 40, 2]
    of_ranks = [list(Ranks(rank, size, tp=2).passes(lengths, 12)) for rank in range(size)]
    assert len({len(passes) for passes in of_ranks}) == 1
    own = {tuple(side[mine].indices) for passes in of_ranks for side, mine in passes}
    assert sorted(index for indices in own for index in indices) == list(range(len(lengths)))
    assert (5,) in own, "too long for the limit: alone"
    for passes in of_ranks:
        for side, _ in passes:
            for each in side:
                assert (each.rows, each.width) == (side[0].rows, side[0].width)
                assert each.width % 2 == 0
                assert each.indices == [5] or len(each.indices) * max(lengths[i] for i in each.indices) <= 12
    assert list(Ranks(0, size).passes([], 12)) == []


@pytest.mark.parametrize("length", [2, 16, 17, 18, 33, 50])
def test_windows_predict_each_token_but_the_first_once(length: int, tokenizer: Tokenizer) -> None:
    model = model_of(CONFIGS["dense"].but(max_seq_len=16), tokenizer, batch_tokens=100)
    tokens = np.arange(length)
    parts = windows(model, tokens)
    assert [token for part in parts for token in part.tokens[1:]] == list(range(1, length))
    assert all(2 <= len(part.tokens) <= 17 and part.n_scored == len(part.tokens) - 1 for part in parts)


def test_weights_that_are_no_numbers_are_an_error_and_no_score(tokenizer: Tokenizer) -> None:
    model = model_of(CONFIGS["dense"], tokenizer, batch_tokens=100)
    with torch.no_grad():
        model.decoder.embedding.weight[7] = torch.nan
    (tokens,) = random_tokens(model.decoder.config, 5)
    with pytest.raises(FloatingPointError, match="log-likelihoods reach nan"):
        score(model, [Scored(tokens, 2)])
    with pytest.raises(FloatingPointError, match="logits reach nan"):
        continue_greedily(model, [tokens], 2)
