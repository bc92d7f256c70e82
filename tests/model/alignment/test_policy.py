"""The policy's objective: equal to TRL's, to enumerated expectations, and free of how a batch is cut."""

import math
from collections import defaultdict
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from architectures import MODELS
from torch import Tensor

from moray import UserError
from moray.model import Decoder, initialise
from moray.model.alignment.advantages import group_advantages
from moray.model.alignment.policy import Aggregation, Policy, PolicyBatch, aggregation
from moray.model.attention.documents import Documents

LENGTHS, WIDTH = [5, 1, 3, 7, 2, 4], 7
ANSWERS_ST = torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]
ADVANTAGES_S = torch.tensor([1.3, -0.4, 0.0, -1.7, 0.9, -0.1], dtype=torch.float64)
LOGP_ST, OLD_ST, REFERENCE_ST = (
    -torch.rand(3, *ANSWERS_ST.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.1
) * ANSWERS_ST
EVERY = range(len(LENGTHS))


def batch_of(
    samples: range,
    kind: Aggregation,
    valid: list[bool] | None = None,
    reference: bool = True,
    old_ST: Tensor = OLD_ST,
) -> PolicyBatch:
    """Some of the samples, a row each."""
    rows = slice(samples.start, samples.stop)
    is_valid_S = torch.tensor(valid or [True] * len(LENGTHS))[rows]
    weight_S, count = aggregation(kind, torch.tensor(LENGTHS)[rows], is_valid_S, WIDTH)
    answers_BT = ANSWERS_ST[rows]
    none_BT = torch.zeros_like(answers_BT, dtype=torch.int64)
    return PolicyBatch(
        none_BT,
        torch.where(answers_BT, 1, -100),
        none_BT,
        Documents(None, answers_BT),
        int(answers_BT.sum()),
        old_logp_BT=old_ST[rows],
        advantages_BT=ADVANTAGES_S[rows, None] * answers_BT,
        reference_logp_BT=REFERENCE_ST[rows] if reference else None,
        weights_BT=weight_S[:, None] * answers_BT,
        n_own_count=count,
        n_samples=len(samples),
    )


def learnt(objective: Policy, *batches: PolicyBatch, logp_ST: Tensor = LOGP_ST) -> tuple[dict[str, float], Tensor]:
    """Each sum by its count over micro-batches of consecutive samples, and the loss's gradient by log-probability."""
    own_ST, totals = logp_ST.clone().requires_grad_(), []
    parts = own_ST.split([batch.n_samples for batch in batches])
    for batch, logp_BT in zip(batches, parts, strict=True):
        actor: Any = SimpleNamespace(logprobs=lambda *_, logp_BT=logp_BT: logp_BT)
        sums = objective.sums(actor, batch)
        assert not any(metric.requires_grad for metric in sums[1:])
        totals.append(torch.stack(sums))
    counts = torch.tensor([objective.counts(batch) for batch in batches], dtype=torch.float64).sum(0)
    values = torch.stack(totals).sum(0) / counts
    (gradient_ST,) = torch.autograd.grad(values[0], own_ST)
    return dict(zip(objective.names, values.tolist(), strict=True)), gradient_ST


def by_trl(kind: str, objective: Policy) -> tuple[float, Tensor, dict[str, list[float]]]:
    """Loss, gradient, and what it logs: of a trainer that has nothing but what its loss asks for."""
    trl = pytest.importorskip("trl")
    logp_ST, metrics = LOGP_ST.clone().requires_grad_(), defaultdict[str, list[float]](list)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp_ST, torch.zeros_like(logp_ST), None),
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        args=SimpleNamespace(use_bias_correction_kl=objective.kl_correction, delta=None, steps_per_generation=1),
        beta=objective.kl_coefficient,
        epsilon_low=objective.clip_low,
        epsilon_high=1 + objective.clip_high if kind == "cispo" else objective.clip_high,
        loss_type=kind,
        max_completion_length=WIDTH,
        importance_sampling_level="token",
        current_gradient_accumulation_steps=1,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        _metrics={"train": metrics},
    )
    asked_S1 = torch.ones(len(LENGTHS), 1, dtype=torch.int64)
    inputs = {
        "prompt_ids": asked_S1,
        "prompt_mask": asked_S1,
        "completion_ids": ANSWERS_ST.long(),
        "completion_mask": ANSWERS_ST.long(),
        "advantages": ADVANTAGES_S,
        "old_per_token_logps": OLD_ST,
        "ref_per_token_logps": REFERENCE_ST,
        "num_items_in_batch": ANSWERS_ST.sum(),
    }
    loss = trl.GRPOTrainer._compute_loss(trainer, None, inputs)
    (gradient,) = torch.autograd.grad(loss, logp_ST)
    return loss.item(), gradient, metrics


@pytest.mark.parametrize(
    "objective", [Policy(), Policy(kl_coefficient=0.1), Policy(kl_coefficient=0.1, kl_correction=False)]
)
@pytest.mark.parametrize("clip_high", [0.2, 0.28])
@pytest.mark.parametrize("kind", ["grpo", "bnpo", "dapo", "dr_grpo", "cispo"])
def test_losses_and_gradients_are_those_of_trl(kind: str, clip_high: float, objective: Policy) -> None:
    """Of one micro-batch: its bnpo is then dapo, and divides by what is local on several."""
    surrogate = "cispo" if kind == "cispo" else "clip"
    objective = replace(objective, clip_high=clip_high, surrogate=surrogate)  # type: ignore[arg-type]
    loss, gradient, metrics = by_trl(kind, objective)
    weights: Any = {"bnpo": "dapo", "cispo": "dapo"}.get(kind, kind)
    values, found = learnt(objective, batch_of(EVERY, weights, reference=objective.kl_coefficient > 0))
    assert values["loss"] == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-14)
    if kind != "cispo":
        (low,), (high,) = (metrics[f"clip_ratio/{side}_mean"] for side in ("low", "high"))
        assert (values["clipped_low"], values["clipped_high"]) == pytest.approx((low, high), rel=1e-6)  # in fp32
        assert min(low, high) > 0
    (kl,) = metrics["kl"] if objective.kl_coefficient else [0.0]
    assert values["kl"] == pytest.approx(kl, rel=1e-12)


def test_a_surrogate_is_that_of_a_loop() -> None:
    """Schulman et al., 2017, eq. 7, with two bounds: what is beyond one of them has a gradient where it goes back."""
    objective = Policy(clip_low=0.1, clip_high=0.3)
    values, gradient_ST = learnt(objective, batch_of(EVERY, "dapo", reference=False))
    total, gradients, low, high = 0.0, [], 0, 0
    for s, t in ANSWERS_ST.nonzero().tolist():
        advantage, ratio = ADVANTAGES_S[s].item(), math.exp(LOGP_ST[s, t].item() - OLD_ST[s, t].item())
        bounded = min(max(ratio, 0.9), 1.3)
        total -= min(ratio * advantage, bounded * advantage)
        is_cut = bounded * advantage < ratio * advantage
        gradients.append(0.0 if is_cut else -advantage * ratio / sum(LENGTHS))
        low, high = low + (is_cut and ratio < 1), high + (is_cut and ratio > 1)
    assert min(low, high) > 0
    assert values["loss"] == pytest.approx(total / sum(LENGTHS), rel=1e-12)
    assert gradient_ST[ANSWERS_ST].tolist() == pytest.approx(gradients, rel=1e-12)
    assert (values["clipped_low"], values["clipped_high"]) == (low / sum(LENGTHS), high / sum(LENGTHS))


def test_metrics_are_means_over_answers_tokens() -> None:
    values, _ = learnt(Policy(kl_estimator="k1"), batch_of(EVERY, "grpo"))
    ratios = (LOGP_ST - OLD_ST)[ANSWERS_ST].exp()
    assert values["ratio"] == pytest.approx(ratios.mean().item(), rel=1e-12)
    assert values["kl_old"] == pytest.approx((ratios - 1 - ratios.log()).mean().item(), rel=1e-12)
    assert values["kl"] == pytest.approx((ratios * (LOGP_ST - REFERENCE_ST)[ANSWERS_ST]).mean().item(), rel=1e-12)
    assert values["entropy"] == pytest.approx(-LOGP_ST[ANSWERS_ST].mean().item(), rel=1e-12)


def test_no_token_of_cispo_loses_its_gradient() -> None:
    """MiniMax-M1, eq. 4: a capped weight, not a gradient of 0; its share is told."""
    values, gradient = learnt(Policy(surrogate="cispo", clip_high=0.2), batch_of(EVERY, "dapo", reference=False))
    ratio_ST = (LOGP_ST - OLD_ST).exp()
    expected = -ratio_ST.clamp(max=1.2) * ADVANTAGES_S[:, None] * ANSWERS_ST / sum(LENGTHS)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)
    assert values["clipped_high"] == pytest.approx((ratio_ST[ANSWERS_ST] > 1.2).double().mean().item(), rel=1e-12)
    assert values["clipped_high"] > 0


@pytest.mark.parametrize("kind", ["grpo", "dapo", "dr_grpo"])
def test_micro_batches_change_nothing(kind: Aggregation) -> None:
    """prime-rl 1957, TRL 3021, verl 3994: means of means. Cut so that one part has 3 and another one 17 tokens."""
    objective = Policy(kl_coefficient=0.1)
    valid = [True, True, False, True, True, True]
    truth, gradient = learnt(objective, batch_of(EVERY, kind, valid))
    parts = [range(1), range(1, 2), range(2, 6)]
    values, found = learnt(objective, *(batch_of(part, kind, valid) for part in parts))
    assert values == pytest.approx(truth, rel=1e-12)
    torch.testing.assert_close(found, gradient, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("kind", "weights", "count"),
    [
        ("grpo", [1 / 5, 1.0, 0.0, 1 / 7, 0.0, 1 / 4], 4),
        ("dapo", [1, 1, 0, 1, 0, 1], 5 + 1 + 7 + 4),
        ("dr_grpo", [1, 1, 0, 1, 0, 1], 4 * WIDTH),
    ],
)
def test_what_is_masked_is_in_no_denominator(kind: Aggregation, weights: list[float], count: int) -> None:
    """TRL 6369: dapo's counted truncated samples. Their tokens have no gradient, and the KL none either."""
    valid = [True, True, False, True, False, True]
    weight_S, found = aggregation(kind, torch.tensor(LENGTHS), torch.tensor(valid), WIDTH)
    assert (weight_S.tolist(), found) == (weights, count)
    _, gradient = learnt(Policy(kl_coefficient=0.1), batch_of(EVERY, kind, valid))
    assert gradient[[2, 4]].abs().max() == 0
    assert gradient[[0, 1, 3, 5]][ANSWERS_ST[[0, 1, 3, 5]]].abs().min() > 0


def test_in_the_first_update_the_ratio_is_1() -> None:
    """Then nothing is clipped, and the gradient is -A; that the sum of A * len is not 0 shows in the value alone."""
    values, gradient = learnt(Policy(), batch_of(EVERY, "dapo", old_ST=LOGP_ST))
    assert (values["ratio"], values["kl_old"], values["clipped_low"], values["clipped_high"]) == (1, 0, 0, 0)
    expected = -ADVANTAGES_S[:, None] * ANSWERS_ST / sum(LENGTHS)
    torch.testing.assert_close(gradient, expected, rtol=1e-15, atol=0)
    assert values["loss"] == pytest.approx(-(ADVANTAGES_S @ torch.tensor(LENGTHS).double()).item() / sum(LENGTHS))


@pytest.mark.parametrize("surrogate", ["clip", "cispo"])
def test_dead_groups_have_no_gradient(surrogate: Any) -> None:
    dead = group_advantages(torch.full((2, 3), 0.1, dtype=torch.float64))
    assert dead.n_dead == 2
    advantages_ST = dead.advantages_PG.flatten()[:, None] * ANSWERS_ST
    batch = replace(batch_of(EVERY, "grpo", reference=False), advantages_BT=advantages_ST)
    values, gradient = learnt(Policy(surrogate=surrogate), batch)
    assert values["loss"] == gradient.abs().max() == 0


def test_k1_without_its_correction_is_refused() -> None:
    """open-instruct 534."""
    with pytest.raises(UserError, match="kl_correction=false with kl_estimator=k1"):
        Policy(kl_estimator="k1", kl_correction=False)


@pytest.mark.parametrize("drawn_by_itself", [True, False])
def test_the_gradient_is_that_of_the_expected_reward(drawn_by_itself: bool) -> None:
    """All groups of 3 answers of 1 or 2 tokens (the token 0 ends one), each as often as it is drawn.

    Without a deviation and with a fixed denominator, it is (1 - 1/G) times the reward's, as an answer is part of its
    own baseline (arXiv 2503.20783); of an older policy's answers as well, of one token, while nothing is clipped.
    """
    draw, V, G = torch.Generator().manual_seed(1), 3, 3
    longest = 2 if drawn_by_itself else 1
    first_V, second_VV = torch.randn(V, generator=draw).double(), torch.randn(V, V, generator=draw).double()
    answers = [(0,), *product(range(1, V), range(V))] if longest == 2 else [(token,) for token in range(V)]
    rewards = torch.randn(len(answers), generator=draw).double()

    def logp(weights: Tensor) -> Tensor:
        """Of the tokens of each answer, 0 behind its end."""
        one_V, two_VV = weights[0].log_softmax(0), weights[1:].log_softmax(1)
        rows = [[one_V[a[0]], two_VV[a[0], a[1]] if len(a) == 2 else torch.zeros(()).double()] for a in answers]
        return torch.stack([torch.stack(row) for row in rows])[:, :longest]

    def expected_reward(weights: Tensor) -> Tensor:
        return logp(weights).sum(1).exp() @ rewards

    weights = torch.cat([first_V[None], second_VV])
    old = logp(weights if drawn_by_itself else weights + 0.1 * torch.randn(weights.shape, generator=draw).double())
    chances = old.sum(1).exp()
    assert chances.sum().item() == pytest.approx(1, rel=1e-12)
    learning = weights.clone().requires_grad_()
    logp_AT, loss = logp(learning), torch.zeros(()).double()
    objective, lengths = Policy(clip_low=0.9, clip_high=9.0), torch.tensor([len(a) for a in answers])
    for group in product(range(len(answers)), repeat=G):
        rows = list(group)
        answered = torch.arange(longest) < lengths[rows, None]
        advantages = group_advantages(rewards[rows].view(1, G), None).advantages_PG.view(G, 1)
        weight_S, count = aggregation("dr_grpo", lengths[rows], torch.ones(G).bool(), 1)
        batch = PolicyBatch(
            answered.long(),
            torch.where(answered, 1, -100),
            answered.long(),
            Documents(None, answered),
            int(answered.sum()),
            old_logp_BT=old[rows],
            advantages_BT=advantages * answered,
            reference_logp_BT=None,
            weights_BT=weight_S[:, None] * answered,
            n_own_count=count,
            n_samples=G,
        )
        actor: Any = SimpleNamespace(logprobs=lambda *_, rows=rows: logp_AT[rows])
        loss = loss + chances[rows].prod() * objective.sums(actor, batch)[0] / count
    (gradient,) = torch.autograd.grad(loss, learning)
    step, by_differences = 1e-6, torch.zeros_like(weights)
    for i, j in product(range(len(weights)), range(V)):
        moved = torch.zeros_like(weights)
        moved[i, j] = step
        by_differences[i, j] = (expected_reward(weights + moved) - expected_reward(weights - moved)) / (2 * step)
    torch.testing.assert_close(gradient, -(1 - 1 / G) * by_differences, rtol=1e-7, atol=1e-9)
    exact = torch.autograd.functional.jacobian(expected_reward, weights)
    torch.testing.assert_close(gradient, -(1 - 1 / G) * exact, rtol=1e-12, atol=1e-14)


def test_log_probabilities_are_those_at_the_temperature_of_sampling() -> None:
    """TRL 3029 and 4159, NeMo-Aligner 46, MiniMind: with an answer drawn at T=0.6 the ratio is 1, and not at T=1."""
    decoder = Decoder(MODELS["dense"]).double()
    initialise(decoder, 0)
    tokens_BT = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))
    targets_BT = tokens_BT.roll(-1, 1)
    targets_BT[:, :4] = targets_BT[:, -1] = -100
    answers_BT = targets_BT != -100
    with torch.no_grad():
        logits_BTV = decoder(tokens_BT) / 0.6
    old_BT = logits_BTV.log_softmax(-1).gather(2, targets_BT.clamp(min=0)[..., None])[..., 0] * answers_BT
    batch = PolicyBatch(
        tokens_BT,
        targets_BT,
        torch.arange(12).expand(2, -1),
        Documents(None, torch.ones(2, 12, dtype=torch.bool)),
        int(answers_BT.sum()),
        old_logp_BT=old_BT,
        advantages_BT=answers_BT.double(),
        reference_logp_BT=None,
        weights_BT=answers_BT.double(),
        n_own_count=float(answers_BT.sum()),
        n_samples=2,
    )
    kl_of = Policy.names.index("kl_old")
    assert Policy(temperature=0.6).sums(decoder, batch)[kl_of].item() == pytest.approx(0, abs=1e-20)
    assert Policy(temperature=1.0).sums(decoder, batch)[kl_of].item() > 0.1
    again = replace(batch, old_logp_BT=decoder.logprobs(tokens_BT, targets_BT, temperature=0.6).detach())
    assert Policy(temperature=0.6).sums(decoder, again)[Policy.names.index("ratio")].item() == batch.n_targets
