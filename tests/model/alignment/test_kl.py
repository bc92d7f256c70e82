"""KL estimators by enumeration of a vocabulary: their means, and the means of their gradients."""

import math

import pytest
import torch
from torch import Tensor

from moray.model.alignment.kl import KLEstimator, kl_estimate, kl_term

DRAW = torch.Generator().manual_seed(0)
WEIGHTS_V, OLD_V, REFERENCE_V = torch.randn(3, 7, generator=DRAW, dtype=torch.float64)
P, OLD, Q = (x.softmax(0) for x in (WEIGHTS_V, OLD_V, REFERENCE_V))
KL = sum(p * math.log(p / q) for p, q in zip(P.tolist(), Q.tolist(), strict=True))
GRADIENT = P * ((P / Q).log() - KL)
"""Of KL(p | q) by the logits of p: p_i (log(p_i / q_i) - KL)."""


def mean_and_gradient(estimator: KLEstimator, drawn_by: Tensor, corrected: bool) -> tuple[float, Tensor]:
    """Over all tokens, each as often as `drawn_by` draws it."""
    weights_V = WEIGHTS_V.clone().requires_grad_()
    logp_V = weights_V.log_softmax(0)
    if corrected:
        values_V = kl_term(logp_V, drawn_by.log(), Q.log(), estimator)
    else:
        values_V = kl_estimate(logp_V, Q.log(), estimator)
    mean = (drawn_by * values_V).sum()
    mean.backward()
    assert weights_V.grad is not None
    return mean.item(), weights_V.grad


@pytest.mark.parametrize("drawn_by", [P, OLD], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_in_a_loss_every_estimator_has_the_gradient_of_the_divergence(estimator: KLEstimator, drawn_by: Tensor) -> None:
    value, gradient = mean_and_gradient(estimator, drawn_by, corrected=True)
    torch.testing.assert_close(gradient, GRADIENT, rtol=1e-12, atol=1e-14)
    if estimator != "k2":
        assert value == pytest.approx(KL, rel=1e-12)


def test_k3_alone_has_another_gradient() -> None:
    """TRL 4967 and 6594: that of KL(q | p), p - q, though its mean is KL(p | q)."""
    value, gradient = mean_and_gradient("k3", P, corrected=False)
    assert value == pytest.approx(KL, rel=1e-12)
    torch.testing.assert_close(gradient, P - Q, rtol=1e-12, atol=1e-14)
    assert (gradient - GRADIENT).norm() > 0.1 * GRADIENT.norm()


def test_k1_alone_knows_of_no_reference() -> None:
    """open-instruct 534: a mean gradient of 0."""
    value, gradient = mean_and_gradient("k1", P, corrected=False)
    assert value == pytest.approx(KL, rel=1e-12)
    torch.testing.assert_close(gradient, torch.zeros(7, dtype=torch.float64), rtol=0, atol=1e-15)


def test_estimates_of_a_token() -> None:
    """Schulman's, at p = 1/2 and q = 1/4."""
    logp, reference_logp = torch.tensor([0.5, 0.25]).double().log()
    assert kl_estimate(logp, reference_logp, "k1").item() == pytest.approx(math.log(2), rel=1e-15)
    assert kl_estimate(logp, reference_logp, "k2").item() == pytest.approx(math.log(2) ** 2 / 2, rel=1e-15)
    assert kl_estimate(logp, reference_logp, "k3").item() == pytest.approx(0.5 - 1 + math.log(2), rel=1e-15)
    assert kl_estimate(logp, logp, "k3").item() == 0
