"""What keeps experts evenly loaded: the balance loss by hand-counted examples, and the routing bias by its effect."""

import pytest
import torch

from model import Decoder, ModelConfig, initialise
from model.moe import LocalDispatcher, MoE, sequence_balance, updated_bias

# Five tokens, three experts, top-1: the example of the notes.
GATES = [[0.7, 0.2, 0.1], [0.8, 0.1, 0.1], [0.2, 0.6, 0.2], [0.3, 0.3, 0.4], [0.9, 0.05, 0.05]]
SWITCH_LOSS = 3 / 5 * 2.9 / 5 + 1 / 5 * 1.25 / 5 + 1 / 5 * 0.85 / 5  # without the factor E = 3


def balance_of(chosen: list, scores: list, valid: list) -> tuple[float, list[int]]:
    """Of sequences [B][T][K], their scores [B][T][E] and valid flags [B][T]."""
    value, counts = sequence_balance(
        torch.tensor(chosen), torch.tensor(scores, dtype=torch.float64), torch.tensor(valid), LocalDispatcher()
    )
    return value.item(), counts.tolist()


def test_the_worked_example() -> None:
    assert pytest.approx(0.432) == SWITCH_LOSS
    value, counts = balance_of([[[0], [0], [1], [2], [0]]], [GATES], [[True] * 5])
    assert value == pytest.approx(3 * 0.432)
    assert counts == [3, 1, 1]


def test_all_tokens_on_one_expert_is_the_worst_there_is() -> None:
    value, counts = balance_of([[[1]] * 5], [[[0.0, 1.0, 0.0]] * 5], [[True] * 5])
    assert value == pytest.approx(3 * 1.0)
    assert counts == [0, 5, 0]


@pytest.mark.parametrize("k", [1, 2])
def test_perfect_balance_is_1_for_every_k(k: int) -> None:
    chosen = [[[(token + i) % 4 for i in range(k)] for token in range(8)]]
    assert balance_of(chosen, [[[0.25] * 4] * 8], [[True] * 8])[0] == pytest.approx(1.0)


def test_scores_count_by_their_share() -> None:
    """Sigmoid scores do not sum to 1 (DeepSeek-V3, eq. 19 divides them): their common scale must not matter."""
    chosen, valid = [[[0], [0], [1], [2], [0]]], [[True] * 5]
    scaled = [[score * factor for score in row] for row, factor in zip(GATES, (0.1, 1, 2, 0.5, 3), strict=True)]
    assert balance_of(chosen, [scaled], valid)[0] == pytest.approx(3 * 0.432)


def test_sequences_are_judged_alone_and_summed() -> None:
    """Two sequences that are each collapsed, on different experts, do not balance each other."""
    chosen, scores = [[[0]] * 4, [[1]] * 4], [[[1.0, 0.0]] * 4, [[0.0, 1.0]] * 4]
    value, counts = balance_of(chosen, scores, [[True] * 4] * 2)
    assert value == pytest.approx(2 + 2)
    assert counts == [4, 4]


def test_padding_counts_nowhere() -> None:
    chosen, scores = [[[0], [0], [1], [2], [0], [1], [1]]], [[*GATES, [0.0, 1.0, 0.0], [0.0, 0.9, 0.1]]]
    value, counts = balance_of(chosen, scores, [[True] * 5 + [False] * 2])
    assert value == pytest.approx(3 * 0.432)
    assert counts == [3, 1, 1]


def test_a_sequence_of_padding_alone_adds_nothing() -> None:
    chosen, scores = [[[0], [0], [1], [2], [0]], [[1]] * 5], [GATES, [[0.0, 1.0, 0.0]] * 5]
    value, counts = balance_of(chosen, scores, [[True] * 5, [False] * 5])
    assert value == pytest.approx(3 * 0.432)
    assert counts == [3, 1, 1]


def test_a_decoder_counts_no_padding() -> None:
    config = ModelConfig.preset(
        "minimind-3-moe", n_layers=2, d_model=16, n_heads=2, n_kv_heads=1, head_dim=8, d_expert=16, vocab_size=32
    )
    decoder = Decoder(config)
    initialise(decoder, 0.2, seed=0)
    tokens = torch.randint(32, (2, 10), generator=torch.Generator().manual_seed(0))
    documents = torch.zeros(2, 10, dtype=torch.int64)
    documents[0, 6:] = -1
    balance = decoder.loss(tokens, tokens, documents_BT=documents).balance
    assert [block.ffn.tokens_E.sum().item() for block in decoder.blocks] == [16, 16]
    alone = decoder.loss(tokens[:1, :6], tokens[:1, :6]).balance + decoder.loss(tokens[1:], tokens[1:]).balance
    torch.testing.assert_close(balance, alone, rtol=1e-5, atol=0)


def test_only_training_counts_tokens() -> None:
    config = ModelConfig(n_experts=4, d_expert=16, d_model=16, top_k=2)
    moe = MoE(config)
    initialise(moe, 0.2, seed=0)
    x, valid = torch.randn(1, 5, 16), torch.ones(1, 5, dtype=torch.bool)
    moe.eval()(x, valid)
    assert moe.tokens_E.sum() == 0
    moe.train()(x, valid)
    moe(x, valid)
    assert moe.tokens_E.sum() == 2 * 5 * 2


def test_the_bias_moves_by_the_sign_alone() -> None:
    bias = torch.tensor([0.5, -0.25, 0.0, 0.0])
    moved = updated_bias(bias, torch.tensor([100, 2, 9, 9]), rate=0.25)  # the mean is 30
    assert moved.tolist() == [0.25, 0.0, 0.25, 0.25]
    assert updated_bias(bias, torch.tensor([7, 7, 7, 7]), rate=0.25).tolist() == bias.tolist()
    assert updated_bias(bias, torch.tensor([100, 2, 9, 9]), rate=0.0).tolist() == bias.tolist()


def test_the_bias_balances_a_skewed_router() -> None:
    """A router whose first experts are far ahead: within 500 steps of 0.002 every expert has its share, within 10%."""
    torch.manual_seed(0)
    config = ModelConfig(n_experts=8, top_k=2, d_expert=16, d_model=16, score_function="sigmoid")
    router = MoE(config).router
    initialise(router, 0.5, seed=0)
    x = torch.randn(1, 2000, 16)
    x[..., 0] = 1.0
    with torch.no_grad():
        router.linear.weight[:, 0] = torch.linspace(4, -4, 8)

    def load() -> torch.Tensor:
        return torch.bincount(router(x).chosen_NK.flatten(), minlength=8)

    assert load().max() > 3 * 500
    assert load().min() < 0.1 * 500
    with torch.no_grad():
        for _ in range(500):
            router.bias_E.copy_(updated_bias(router.bias_E, load(), 0.002))
    assert load().max() < 1.1 * 500
    assert load().min() > 0.9 * 500
