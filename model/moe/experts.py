"""The experts of a layer: feed-forward networks whose weights are stacked."""

# Shapes: M rows ordered by expert, D model width, F expert width, E experts (under expert parallelism
# this rank's share).

from functools import partial

import torch
from torch import Tensor, nn

from moray.model.config.parts import FeedForwardConfig
from moray.model.feedforward import activated, activation
from moray.model.moe.grouped import grouped_bias, grouped_linear
from moray.model.recompute import cheap
from moray.model.sharded import local


class Experts(nn.Module):
    """E networks down(act(gate(x)) * up(x)), or down(act(up(x))), run by one grouped matrix product a projection.

    Shapes: rows_MD ordered by expert, counts_E (int64, summing to M) -> [M, D].
    """

    MATRICES = ("gate_EFD", "up_EFD", "down_EDF")
    BIASES = ("gate_bias_EF", "up_bias_EF", "down_bias_ED")

    def __init__(self, n_experts: int, d_model: int, width: int, config: FeedForwardConfig) -> None:
        super().__init__()
        self.activation = activation(config.activation)

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(n_experts, *shape))

        self.gate_EFD = weight(width, d_model) if config.gated else None
        self.up_EFD = weight(width, d_model)
        self.down_EDF = weight(d_model, width)
        self.gate_bias_EF = weight(width) if config.gated and config.bias else None
        self.up_bias_EF = weight(width) if config.bias else None
        self.down_bias_ED = weight(d_model) if config.bias else None

    def forward(self, rows_MD: Tensor, counts_E: Tensor) -> Tensor:
        up_MF = self.project(rows_MD, "up_EFD", self.up_bias_EF, counts_E)
        gate_MF = None
        if self.gate_EFD is not None:
            gate_MF = self.project(rows_MD, "gate_EFD", self.gate_bias_EF, counts_E)
        hidden_MF = cheap(partial(activated, self.activation), up_MF, gate_MF)
        return self.project(hidden_MF, "down_EDF", self.down_bias_ED, counts_E)

    def project(self, x_MI: Tensor, name: str, bias_EO: Tensor | None, counts_E: Tensor) -> Tensor:
        """Each expert's linear map, by the matrices of that name, over its own run of rows: [M, I] -> [M, O]."""
        out_MO = grouped_linear(x_MI, local(getattr(self, name)), counts_E)
        return out_MO if bias_EO is None else out_MO + grouped_bias(local(bias_EO), counts_E, len(x_MI))
