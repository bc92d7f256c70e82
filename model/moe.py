"""The Mixture-of-Experts layer: Router -> Dispatcher -> Experts -> Dispatcher, each replaceable alone."""

# Shapes: B sequences, T tokens of each on this rank, N = B * T, D model width, F expert width, E experts,
# K experts per token, M = N * K rows sent to experts (before any exchange).

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.balance import TINY, Statistics, statistics_of
from model.config import ModelConfig
from model.context import Context
from model.feedforward import FeedForward
from model.grouped import grouped_linear
from model.sharded import local


class Routing(NamedTuple):
    """chosen_NK: expert ids, int64. gates_NK: how much each counts. scores_NE: every expert's score, at least fp32."""

    chosen_NK: Tensor
    gates_NK: Tensor
    scores_NE: Tensor


class Router(nn.Module):
    """Chooses K of E experts for each token and says how much each counts.

    Scores are fp32 whatever the model's dtype: in bf16, near-ties flip between layouts and break law 1.

    Shapes: x_BTD -> Routing over the N = B * T tokens.
    Source: DeepSeek-V3, section 2.1.2, eqs. 13-16; groups: DeepSeek-V2, section 2.2.2.
    """

    bias_E: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.moe
        self.moe = config.moe
        self.linear = nn.Linear(config.d_model, config.n_experts, bias=False)
        self.register_buffer("bias_E", torch.zeros(config.n_experts))

    def forward(self, x_BTD: Tensor) -> Routing:
        moe = self.moe
        logits_NE = self.linear(x_BTD.to(self.linear.weight.dtype)).flatten(0, 1)
        logits_NE = logits_NE.to(torch.promote_types(logits_NE.dtype, torch.float32))
        scores_NE = logits_NE.sigmoid() if moe.score == "sigmoid" else logits_NE.softmax(-1)
        # The bias steers which experts are chosen, never how much they count (eq. 16).
        ranking_NE = limit_to_groups(
            scores_NE.detach() + self.bias_E, moe.n_groups, moe.top_k_groups, moe.group_score
        )
        chosen_NK = ranking_NE.topk(moe.top_k, dim=-1).indices
        gates_NK = scores_NE.gather(-1, chosen_NK)
        if moe.normalise_gates:
            gates_NK = gates_NK / (gates_NK.sum(-1, keepdim=True) + TINY)
        return Routing(chosen_NK, gates_NK * moe.gate_scale, scores_NE)


def limit_to_groups(scores_NE: Tensor, groups: int, top_k_groups: int, group_score: str) -> Tensor:
    """Hides (with -inf) the experts outside each token's best `top_k_groups` groups of neighbouring experts.

    A group is ranked by its best score (`max`, DeepSeek-V2) or the sum of its two best (`top2`, DeepSeek-V3).
    """
    if top_k_groups == groups:
        return scores_NE
    scores_NGe = scores_NE.unflatten(-1, (groups, -1))
    strength_NG = scores_NGe.amax(-1) if group_score == "max" else scores_NGe.topk(2, dim=-1).values.sum(-1)
    kept = strength_NG.topk(top_k_groups, dim=-1).indices
    hidden_NG = torch.ones_like(strength_NG, dtype=torch.bool).scatter(-1, kept, False)
    return scores_NGe.masked_fill(hidden_NG[..., None], -torch.inf).flatten(-2)


class Permute(torch.autograd.Function):
    """Rows in another order. Both directions are gathers: deterministic, and no scatter with atomics.

    Shapes: x [M, D], order [M] and its inverse -> x[order].
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x_MD: Tensor, order_M: Tensor, inverse_M: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_M)
        return x_MD[order_M]

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_MD: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (inverse_M,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad_MD[inverse_M], None, None


class Spread(torch.autograd.Function):
    """Each token's row K times, in the order of the experts; its gradient sums the K copies.

    Shapes: x_ND, order [M], inverse [M], K -> [M, D].
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x_ND: Tensor, order_M: Tensor, inverse_M: Tensor, k: int
    ) -> Tensor:
        ctx.save_for_backward(inverse_M)
        ctx.k = k  # type: ignore[attr-defined]
        return x_ND[order_M // k]

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_MD: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (inverse_M,) = ctx.saved_tensors  # type: ignore[attr-defined]
        k = ctx.k  # type: ignore[attr-defined]
        grad_MD = grad_MD[inverse_M]
        return (grad_MD if k == 1 else grad_MD.unflatten(0, (-1, k)).sum(1)), None, None, None


def invert(order_M: Tensor) -> Tensor:
    """The permutation that undoes another: inverse[order[i]] = i."""
    inverse = torch.empty_like(order_M)
    inverse[order_M] = torch.arange(len(order_M), device=order_M.device)
    return inverse


@dataclass(frozen=True)
class Sorted:
    """Rows in the order of their experts; counts_E (int64): rows of each; inverse_M undoes the order."""

    rows_MD: Tensor
    counts_E: Tensor
    inverse_M: Tensor


def sort_by_expert(x_ND: Tensor, chosen_NK: Tensor, n_experts: int) -> Sorted:
    """Copies each token to its K experts' places. The sort is stable, so tokens keep their order within an expert."""
    flat_M = chosen_NK.flatten()
    order_M = flat_M.argsort(stable=True)
    inverse_M = invert(order_M)
    rows_MD = Spread.apply(x_ND, order_M, inverse_M, chosen_NK.shape[1])
    # bincount would make a GPU wait to learn how many bins there are.
    counts_E = flat_M.new_zeros(n_experts).scatter_add_(0, flat_M, torch.ones_like(flat_M))
    return Sorted(rows_MD, counts_E, inverse_M)


def unsort(rows_MD: Tensor, inverse_M: Tensor, gates_NK: Tensor) -> Tensor:
    """Brings each token's K results back together, weighted by its gates. Shapes: [M, D], [M], [N, K] -> [N, D]."""
    order_M = invert(inverse_M)
    rows_NKD = Permute.apply(rows_MD, inverse_M, order_M).unflatten(0, gates_NK.shape)
    weighted_NKD = rows_NKD * gates_NK[..., None].to(rows_MD.dtype)
    return weighted_NKD.sum(1)


class LocalDispatcher:
    """Moves tokens to experts that all live on this rank, and back.

    `parallel.expert.AllToAllDispatcher` has the same methods for experts spread over ranks.
    """

    def dispatch(self, x_ND: Tensor, chosen_NK: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Sorted]:
        """Returns the rows for this rank's experts, ordered by expert, their counts, and what `combine` needs."""
        plan = sort_by_expert(x_ND, chosen_NK, n_experts)
        return plan.rows_MD, plan.counts_E, plan

    def combine(self, rows_MD: Tensor, plan: Sorted, gates_NK: Tensor) -> Tensor:
        """Returns each token's gate-weighted sum over its experts, [N, D]."""
        return unsort(rows_MD, plan.inverse_M, gates_NK)

    def own(self, x_BT: Tensor) -> Tensor:
        """The part of a [B, T] tensor whose tokens this rank routes: here, all of it."""
        return x_BT

    def total(self, x: Tensor) -> Tensor:
        """Sums a statistic over the ranks that hold parts of the same sequences: here, one rank holds them whole."""
        return x


class Experts(nn.Module):
    """E SwiGLUs whose weights are stacked, so that one grouped matrix product runs them all.

    Shapes: rows_MD ordered by expert, counts_E -> [M, D]. Under expert parallelism E is this rank's share.
    """

    def __init__(self, n_experts: int, d_model: int, width: int) -> None:
        super().__init__()
        self.gate_EFD = nn.Parameter(torch.empty(n_experts, width, d_model))
        self.up_EFD = nn.Parameter(torch.empty(n_experts, width, d_model))
        self.down_EDF = nn.Parameter(torch.empty(n_experts, d_model, width))

    def forward(self, rows_MD: Tensor, counts_E: Tensor) -> Tensor:
        gate_EFD, up_EFD, down_EDF = local(self.gate_EFD), local(self.up_EFD), local(self.down_EDF)
        hidden_MF = F.silu(grouped_linear(rows_MD, gate_EFD, counts_E)) * grouped_linear(rows_MD, up_EFD, counts_E)
        return grouped_linear(hidden_MF, down_EDF, counts_E)


class MoE(nn.Module):
    """Routed experts, and shared ones that every token passes (DeepSeekMoE, 2024).

    Shapes: x_BTD -> [B, T, D], and while training what the auxiliary losses are made of (else None).
    """

    tokens_E: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.moe
        self.moe = config.moe
        self.router = Router(config)
        self.experts = Experts(config.n_experts, config.d_model, config.moe.expert_width)
        shared_width = config.moe.n_shared * config.moe.expert_width
        self.shared = FeedForward(config.d_model, shared_width, config.ffn) if shared_width else None
        self.dispatcher = LocalDispatcher()
        # Tokens each expert was chosen for since the last optimizer step, on this rank, in training alone.
        self.register_buffer("tokens_E", torch.zeros(config.n_experts, dtype=torch.int64), persistent=False)

    def forward(self, x_BTD: Tensor, context: Context) -> tuple[Tensor, Statistics | None]:
        batch_shape = x_BTD.shape[:2]
        routing = self.router(x_BTD)
        statistics = None
        if self.training:
            statistics = statistics_of(
                routing.chosen_NK.unflatten(0, batch_shape),
                routing.scores_NE.unflatten(0, batch_shape),
                self.dispatcher.own(context.documents.valid_BT),
                self.moe.group_size,
            )
            self.tokens_E += statistics.counts_GE.sum(0).to(torch.int64)
            statistics = statistics.total(self.dispatcher.total)
        rows_MD, counts, plan = self.dispatcher.dispatch(x_BTD.flatten(0, 1), routing.chosen_NK, self.moe.n_experts)
        out_ND = self.dispatcher.combine(self.experts(rows_MD, counts), plan, routing.gates_NK)
        out_BTD = out_ND.view_as(x_BTD)
        return (out_BTD if self.shared is None else out_BTD + self.shared(x_BTD, context)), statistics


def updated_bias(bias_E: Tensor, tokens_E: Tensor, rate: float) -> Tensor:
    """The routing bias after one optimizer step: up for experts below the mean load, down for those above.

    `tokens_E` counts the whole global batch. Source: DeepSeek-V3, section 2.1.2; Wang et al., 2024, algorithm 1.
    """
    load_E = tokens_E.to(bias_E.dtype)
    return bias_E + rate * (load_E.mean() - load_E).sign()
