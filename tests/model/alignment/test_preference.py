"""DPO and IPO of packed pairs against each sequence alone: by hand in float64, and by TRL."""

import math
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from answered import Answered, Pair, alone, batch_of, decoder_of, random_pairs
from torch import Tensor, nn

from moray.model import Decoder
from moray.model.alignment.preference import Preference
from moray.model.objective import Objective

PAIRS = random_pairs(7)
LANES = PAIRS[:3], PAIRS[3:4], PAIRS[4:]
POLICY, REFERENCE = decoder_of(0), decoder_of(1).requires_grad_(False)


def learnt(objective: Objective[Any], *lanes: list[Pair], policy: Decoder = POLICY) -> tuple[dict[str, float], Tensor]:
    """Each sum by its count, and the gradient of the loss."""
    policy.zero_grad()
    batch = batch_of(*lanes)
    sums = objective.sums(policy, batch)
    assert not any(metric.requires_grad for metric in sums[1:])
    values = [total / count for total, count in zip(sums, objective.counts(batch), strict=True)]
    values[0].backward()
    gradient = torch.cat([weight.grad.flatten() for weight in policy.parameters() if weight.grad is not None])
    return dict(zip(objective.names, (value.item() for value in values), strict=True)), gradient


def by_hand(loss_of: Callable[[Tensor, Tensor], Tensor]) -> tuple[float, Tensor]:
    """The mean over pairs of a function of both gains, [tokens] each, of sequences that are computed one by one."""
    POLICY.zero_grad()
    losses = []
    for pair in PAIRS:
        gains = [alone(POLICY, side) - alone(REFERENCE, side) for side in pair]
        losses.append(loss_of(*gains))
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss.item(), torch.cat([weight.grad.flatten() for weight in POLICY.parameters() if weight.grad is not None])


OBJECTIVES = [
    (Preference(REFERENCE, beta=0.3), lambda w, r: -(0.3 * (w.sum() - r.sum())).sigmoid().log()),
    (
        Preference(REFERENCE, beta=0.3, label_smoothing=0.2),
        lambda w, r: (
            -0.8 * (0.3 * (w.sum() - r.sum())).sigmoid().log() - 0.2 * (0.3 * (r.sum() - w.sum())).sigmoid().log()
        ),
    ),
    (Preference(REFERENCE, "ipo", beta=0.3), lambda w, r: (w.sum() - r.sum() - 1 / 0.6) ** 2),
    (
        Preference(REFERENCE, "ipo", beta=0.3, length_normalised=True),
        lambda w, r: (w.mean() - r.mean() - 1 / 0.6) ** 2,
    ),
]


@pytest.mark.parametrize(("objective", "equation"), OBJECTIVES)
def test_packed_pairs_are_each_sequence_alone(
    objective: Preference, equation: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Also ms-swift 9925 (IPO divided by the packed row's length) and OpenRLHF 294 (a prompt in the loss)."""
    values, gradient = learnt(objective, *LANES)
    loss, expected = by_hand(equation)
    assert values["loss"] == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
    gains = [[(alone(POLICY, side) - alone(REFERENCE, side)).detach() for side in pair] for pair in PAIRS]
    if not objective.length_normalised:
        margins = [(chosen.sum() - rejected.sum()).item() for chosen, rejected in gains]
        assert values["margin"] == pytest.approx(0.3 * np.mean(margins), rel=1e-12)
        assert values["accuracy"] == pytest.approx(np.mean([margin > 0 for margin in margins]), rel=1e-12)
    chosen = [alone(POLICY, pair[0]).sum().item() for pair in PAIRS]
    assert values["chosen_logp"] == pytest.approx(np.mean(chosen), rel=1e-12)
    ratios = torch.cat([ratio for pair in gains for ratio in pair])
    assert values["kl"] == pytest.approx((torch.exp(-ratios) - 1 + ratios).mean().item(), rel=1e-10)


class Answers(nn.Module):
    """A decoder as TRL asks one: padded sequences, of which it wants the log-probabilities of labels."""

    is_gradient_checkpointing = False

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, input_ids: Tensor, labels: Tensor, **_: Any) -> SimpleNamespace:
        logp = self.decoder(input_ids).log_softmax(-1)[:, :-1]
        scored = labels[:, 1:] != -100
        found = logp.gather(2, labels[:, 1:].clamp(min=0)[..., None])[..., 0] * scored
        unused = torch.zeros_like(found)
        return SimpleNamespace(log_probs=found, entropy=unused, mean_logits=unused, is_top1=unused.bool())


def by_trl(kind: str, pairs: list[Pair], label_smoothing: float = 0.0) -> tuple[float, Tensor]:
    trl = pytest.importorskip("trl")
    policy, same = Answers(POLICY), lambda x: x
    trainer = SimpleNamespace(
        model=policy,
        ref_model=Answers(REFERENCE),
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        beta=0.3,
        label_smoothing=label_smoothing,
        loss_types=[kind],
        loss_weights=[1.0],
        f_divergence_type="reverse_kl",
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=False,
        use_weighting=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    sequences = [pair[side] for side in range(2) for pair in pairs]
    width = max(len(sequence.tokens) for sequence in sequences)
    ids, mask, attention = (torch.zeros(len(sequences), width, dtype=torch.int64) for _ in range(3))
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence.tokens)] = torch.tensor(sequence.tokens)
        mask[row, len(sequence.asked) : len(sequence.tokens)] = 1
        attention[row, : len(sequence.tokens)] = 1
    POLICY.zero_grad()
    inputs = {"input_ids": ids, "attention_mask": attention, "completion_mask": mask}
    loss = trl.DPOTrainer._compute_loss(trainer, policy, inputs, return_outputs=False)
    loss.backward()
    return loss.item(), torch.cat([weight.grad.flatten() for weight in POLICY.parameters() if weight.grad is not None])


@pytest.mark.parametrize(
    ("kind", "pairs", "objective"),
    [
        ("sigmoid", PAIRS, Preference(REFERENCE, beta=0.3)),
        ("ipo", PAIRS, Preference(REFERENCE, "ipo", beta=0.3, length_normalised=True)),
        # TRL has Mitchell's smoothing where it sorts a batch first: of a lone pair, there is nothing to sort.
        ("aot", PAIRS[:1], Preference(REFERENCE, beta=0.3, label_smoothing=0.2)),
    ],
)
def test_losses_and_gradients_are_those_of_trl(kind: str, pairs: list[Pair], objective: Preference) -> None:
    values, gradient = learnt(objective, *([pair] for pair in pairs))
    loss, expected = by_trl(kind, pairs, objective.label_smoothing)
    assert values["loss"] == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


def test_at_the_start_the_loss_is_ln_2_and_nothing_is_preferred() -> None:
    """open-instruct 1900 began with 6 ln 2. A tie is no success, and there is a gradient all the same."""
    same = decoder_of(0).requires_grad_(False)
    values, gradient = learnt(Preference(same), *LANES)
    assert np.float32(values["loss"]) == np.float32(math.log(2))
    assert values["loss"] == pytest.approx(math.log(2), rel=4e-16)
    assert (values["margin"], values["accuracy"], values["kl"]) == (0, 0, 0)
    assert gradient.abs().max() > 1e-3


def test_pairs_that_differ_in_their_first_token_alone_teach() -> None:
    """MiniMind 621, fw-ai/cookbook 388: the first token of an answer was left out."""
    asked = [3, 4, 5]
    pair = Answered(asked, [6, 9]), Answered(asked, [7, 9])
    _, gradient = learnt(Preference(REFERENCE), [pair])
    assert gradient.abs().max() > 1e-3
    same = Answered(asked, [6, 9]), Answered(asked, [6, 9])
    _, nothing = learnt(Preference(REFERENCE), [same])
    assert nothing.abs().max() < 1e-15


def test_neighbours_in_a_row_do_not_matter() -> None:
    """TRL 1230, AReaL 1442: packed answers saw each other. A pair's margin is the same to the bit beside any other."""
    policy = decoder_of(0)
    found = []
    for other in (PAIRS[1], random_pairs(1, seed=5)[0]):
        values = []
        batch = batch_of([PAIRS[0], other])
        gains = batch.per_side(policy.logprobs(batch.tokens_BT, batch.targets_BT, batch.positions_BT, batch.documents))
        values.append(gains[0].tolist())
        found.append(values)
    assert found[0] == found[1]


def test_a_lane_without_pairs_adds_nothing() -> None:
    objective = Preference(REFERENCE)
    batch = batch_of([])
    assert batch.n_pairs == 0
    assert not any(total.item() for total in objective.sums(POLICY, batch))
    assert [*objective.counts(batch)] == [0] * 6
