"""The reward model's objective, against answers that are scored one by one, and a loss in fp64 by hand."""

import copy
import math

import pytest
import torch
from architectures import MODELS, PIECES
from pairs import LENGTHS, TOKENS, VOCABULARY, answers, packed
from torch import Tensor

from moray.model import Decoder, initialise
from moray.model.alignment.reward_model import RewardModel, ScoredPairs, bradley_terry, pair_ends
from moray.parallel.gradients import accumulate_gradients, evaluate

CONFIGS = {
    "RoPE": MODELS["dense"].but(head="scalar"),
    "learned positions": PIECES["GPT: biases, learned positions, LayerNorm, z-loss"][0].but(head="scalar"),
    "experts": MODELS["moe-deepseek"].but(head="scalar"),
}


@pytest.fixture(scope="module", params=CONFIGS)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    decoder = Decoder(CONFIGS[request.param]).double()
    initialise(decoder, 0)
    return decoder


def scores_alone(decoder: Decoder) -> list[tuple[float, float]]:
    """Of each pair, each answer being a batch of its own; the score of its last token."""
    with torch.no_grad():
        return [
            tuple(decoder.values(tokens_T[None])[0, -1].item() for tokens_T in pair)
            for lane in answers()
            for pair in lane
        ]


def scores(decoder: Decoder, pairs: ScoredPairs) -> Tensor:
    return decoder.values(pairs.tokens_BT, pairs.positions_BT, pairs.documents).flatten()[pairs.ends_P2]


def test_sums_are_those_of_answers_that_are_scored_one_by_one(decoder: Decoder) -> None:
    alone = scores_alone(decoder)
    margins = [0.1 * i for i in range(len(alone))]
    expected = {
        "loss": sum(math.log1p(math.exp(-(w - r - m))) for (w, r), m in zip(alone, margins, strict=True)),
        "centring": sum(0.3 * (w + r) ** 2 for w, r in alone),
        "accuracy": sum(w > r for w, r in alone),
        "margin": sum(w - r for w, r in alone),
        "chosen_score": sum(w for w, _ in alone),
        "rejected_score": sum(r for _, r in alone),
    }
    objective = RewardModel(centring=0.3)
    pairs = packed(answers(), torch.tensor(margins, dtype=torch.float64))
    sums = dict(zip(objective.names, objective.sums(decoder, pairs), strict=True))
    assert {name: value.item() for name, value in sums.items()} == pytest.approx(expected, rel=1e-10)
    assert {name for name, value in sums.items() if value.requires_grad} == {"loss", "centring"}
    assert objective.counts(pairs) == (7,) * 6


def test_padding_and_a_neighbour_change_no_score(decoder: Decoder) -> None:
    """Whatever padding is, also the token that ends an answer: never is anything looked for by its id."""
    expected, objective = None, RewardModel()
    for padding in (0, 5, int(answers()[0][0][0][-1])):
        sums = torch.stack(objective.sums(decoder, packed(answers(), padding=padding))).detach()
        expected = sums if expected is None else expected
        assert torch.equal(sums, expected)
    lanes = answers()
    before = scores(decoder, packed(lanes))
    lanes[1][0] = tuple((tokens + 1) % VOCABULARY for tokens in lanes[1][0])
    after = scores(decoder, packed(lanes))
    changed = ((before - after).abs() > 1e-12).any(1).tolist()  # experts' products are of all rows together
    assert changed == [False, True, False, False, False, False, False]


def test_ends_are_the_last_tokens_of_answers_and_never_padding() -> None:
    documents = torch.tensor([[0, 0, 1, -1], [0, 1, 1, 1], [0, -1, -1, -1], [0, 0, 0, 0]])
    assert pair_ends(documents).tolist() == [[1, 4], [2, 7], [8, 15]]
    assert pair_ends(packed(answers()).documents.valid_BT.long() - 1).shape == (len(LENGTHS), 2)
    with pytest.raises(AssertionError, match="of the same pairs"):  # an answer of no tokens
        pair_ends(torch.tensor([[0, 0, 1, 1], [0, 0, -1, -1]]))


def test_ties_are_mistakes_and_cost_ln_2(decoder: Decoder) -> None:
    decoder = copy.deepcopy(decoder)
    decoder.head.weight.data.zero_()
    objective, pairs = RewardModel(), packed(answers())
    sums = dict(zip(objective.names, objective.sums(decoder, pairs), strict=True))
    assert sums["accuracy"] == 0
    assert sums["loss"].item() == pytest.approx(pairs.n_pairs * math.log(2), rel=1e-15)


def test_far_apart_scores_lose_no_gradient() -> None:
    scores = torch.tensor([[-200.0, 200.0], [200.0, -200.0]], requires_grad=True)
    loss = bradley_terry(scores, torch.tensor([1.0, 0.0]))
    assert loss.tolist() == [401.0, 0.0]
    loss.sum().backward()
    assert scores.grad is not None
    assert scores.grad.tolist() == [[-1.0, 1.0], [0.0, 0.0]]


def test_evaluation_counts_every_pair_once_however_they_are_divided(decoder: Decoder) -> None:
    """Not the mean over batches of their means (OpenRLHF#1332): they have one to five pairs here."""
    lanes = answers()
    whole = evaluate(decoder, [packed(lanes)], RewardModel(0.1))
    parts = evaluate(decoder, [packed(lanes[:1]), packed(lanes[1:3]), packed(lanes[3:])], RewardModel(0.1))
    assert {name: count for name, (_, count) in parts.items()} == dict.fromkeys(RewardModel.names, 7)
    assert {n: x for n, (x, _) in parts.items()} == pytest.approx({n: x for n, (x, _) in whole.items()}, rel=1e-12)


def test_scores_of_a_model_in_bf16_are_not_rounded_to_bf16(decoder: Decoder) -> None:
    decoder, pairs = copy.deepcopy(decoder).bfloat16(), packed(answers())
    found = decoder.values(pairs.tokens_BT, pairs.positions_BT, pairs.documents)
    assert found.dtype == torch.float32
    hidden = decoder.hidden(pairs.tokens_BT, pairs.positions_BT, pairs.documents).float()
    torch.testing.assert_close(found, (hidden * decoder.head.weight.float()[0]).sum(-1))
    assert not torch.equal(found, found.bfloat16().float())


def test_a_model_learns_which_answers_are_better() -> None:
    """Those with more even tokens: of pairs it has never seen, it tells nine in ten."""
    decoder, objective = Decoder(CONFIGS["RoPE"].but(init={"std": 0.05})), RewardModel(centring=0.01)
    initialise(decoder, 0)
    optimizer, draw = torch.optim.AdamW(decoder.parameters(), lr=3e-3), torch.Generator().manual_seed(0)

    def batch() -> ScoredPairs:
        drawn = torch.randint(VOCABULARY, (64, 2, TOKENS), generator=draw)
        even = (drawn % 2 == 0).sum(2)
        better = (even[:, 1] > even[:, 0]).long()
        pairs = [(x[b], x[1 - b]) for x, b in zip(drawn, better, strict=True)]
        unequal = [pair for pair, (one, other) in zip(pairs, even.tolist(), strict=True) if one != other]
        return packed([[pair] for pair in unequal])

    for _ in range(60):
        accumulate_gradients(decoder, [batch()], objective=objective)
        optimizer.step()
        optimizer.zero_grad()
    right, count = evaluate(decoder, [batch() for _ in range(4)], objective)["accuracy"]
    assert right / count > 0.9
