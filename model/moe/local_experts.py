"""The mixture of local experts of 1991, of which today's routed layers descend: small networks that share out a task.

Its point is the loss. If the experts' blend is compared with the target, each expert must cancel what the others leave
over, and they cooperate on every case; if each expert is compared with it alone, the one that does best on a case is
taught most about it, and they specialise.
"""

# Shapes: N cases, I inputs, O outputs, E experts.

import torch
from torch import Tensor, nn


class LocalExperts(nn.Module):
    """E linear experts and a linear gate with a softmax, all of which see the same input.

    Shapes: x_NI -> outputs_NEO, and the log of the gate's proportions, [N, E].
    Source: Jacobs, Jordan, Nowlan and Hinton, 1991, figure 1.
    """

    def __init__(self, n_experts: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.n_experts = n_experts
        self.experts = nn.Linear(inputs, n_experts * outputs)
        self.gate = nn.Linear(inputs, n_experts)

    def forward(self, x_NI: Tensor) -> tuple[Tensor, Tensor]:
        return self.experts(x_NI).unflatten(-1, (self.n_experts, -1)), self.gate(x_NI).log_softmax(-1)


def cooperative_loss(outputs_NEO: Tensor, log_gates_NE: Tensor, targets_NO: Tensor) -> Tensor:
    """The squared error of the blend, ||d - sum_i p_i o_i||^2, of each case: [N].

    Source: Jacobs et al., 1991, eq. 1.1.
    """
    blend_NO = (log_gates_NE.exp()[..., None] * outputs_NEO).sum(1)
    return (targets_NO - blend_NO).square().sum(-1)


def competitive_loss(outputs_NEO: Tensor, log_gates_NE: Tensor, targets_NO: Tensor) -> Tensor:
    """The negative log probability of the target, each expert being the mean of a Gaussian that the gate may draw:
    -log sum_i p_i exp(-||d - o_i||^2 / 2), of each case: [N].

    Its gradient to an expert is weighted with the posterior probability that this expert made the target.
    Source: Jacobs et al., 1991, eq. 1.3.
    """
    distance_NE = (targets_NO[:, None] - outputs_NEO).square().sum(-1)
    return -torch.logsumexp(log_gates_NE - distance_NE / 2, dim=-1)
