"""How far a policy p is from its reference q, KL(p | q), of tokens that were drawn: values, and their gradient."""

from typing import Literal

import torch
from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]


def kl_estimate(logp: Tensor, reference_logp: Tensor, estimator: KLEstimator) -> Tensor:
    """Of each token that p drew: k1 = log(p/q), k2 = k1^2 / 2, or k3 = q/p - 1 - log(q/p); of any shape.

    The means of k1 and k3 over p are KL(p | q), that of k2 is near it; k2 and k3 are never negative. Their gradients
    are another matter: see `kl_term`. Source: Schulman, "Approximating KL divergence", 2020.
    """
    k1 = logp - reference_logp
    if estimator == "k1":
        return k1
    return k1.square() / 2 if estimator == "k2" else torch.expm1(-k1) + k1


def kl_term(logp: Tensor, old_logp: Tensor, reference_logp: Tensor, estimator: KLEstimator) -> Tensor:
    """`kl_estimate` in a loss: the mean of its gradient over tokens that old_logp's policy drew is that of KL(p | q).

    k1 and k3 are weighted by rho = p / p_old, which has a gradient of its own (DeepSeek-V3.2, section 3.1; TRL's
    `use_bias_correction_kl`): without it, k3's gradient is another divergence's and the mean of k1's is 0, whatever the
    reference. k2 has the right gradient as it is, and so rho without one.
    """
    ratio = torch.exp(logp - old_logp)
    estimate = kl_estimate(logp, reference_logp, estimator)
    return (ratio.detach() if estimator == "k2" else ratio) * estimate
