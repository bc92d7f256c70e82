"""The Mixture-of-Experts layer: Router -> Dispatcher -> Experts -> Dispatcher, each replaceable alone."""

# Shapes: B sequences, T tokens of each on this rank, D model width, E experts, K experts per token, M rows sent.

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moray import UserError
from moray.model.config.architecture import ModelConfig
from moray.model.context import Context
from moray.model.feedforward import FeedForward
from moray.model.moe.balance import Statistics, statistics_of
from moray.model.moe.capacity import capacity_of, most_of_expert, within_capacity
from moray.model.moe.dispatch import LocalDispatcher, assigned
from moray.model.moe.experts import Experts
from moray.model.moe.router import Router, Routing
from moray.model.recompute import once


class MoE(nn.Module):
    """Routed experts, and shared ones that every token passes (DeepSeekMoE, 2024).

    Shapes: x_BTD -> [B, T, D], and while training what the auxiliary losses are made of (else None).
    Raises UserError in training where the config's router draws and the context has nothing to draw from.
    """

    tokens_E: Tensor
    dropped: Tensor
    z_2: Tensor
    slots_E: Tensor | None

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.moe
        self.moe, self.layer = config.moe, layer
        self.router = Router(config)
        self.experts = Experts(config.n_experts, config.d_model, config.moe.expert_width, config.expert_ffn)
        shared_width = config.moe.n_shared * config.moe.expert_width
        self.shared = FeedForward(config.d_model, shared_width, config.expert_ffn) if shared_width else None
        self.shared_gate = nn.Linear(config.d_model, 1, bias=False) if config.moe.shared_gate else None
        self.dispatcher = LocalDispatcher()
        # Where each expert is among the stacked weights, which `parallel.placement` may change; None: in order.
        self.register_buffer("slots_E", None, persistent=False)
        # Since the last optimizer step, on this rank, in training alone: tokens that chose each expert, how many of
        # these choices found it full; the sum of the tokens' squared log-sum-exps of the logits, and the tokens.
        self.register_buffer("tokens_E", torch.zeros(config.n_experts, dtype=torch.int64), persistent=False)
        self.register_buffer("dropped", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("z_2", torch.zeros(2, dtype=torch.float64), persistent=False)

    def forward(self, x_BTD: Tensor, context: Context) -> tuple[Tensor, Statistics | None]:
        routing = self.router(x_BTD, self.keys(context), self._replayed(context))
        if context.routes is not None:
            context.routes.chosen[self.layer] = self.dispatcher.whole(routing.chosen_BTK)
        kept_BTK, statistics, limit = routing.drawn_BTK, None, None
        if self.training:
            self._check_groups(len(x_BTD))
            if self.moe.capacity_factor is not None:
                kept_BTK = once(partial(self._within_capacity, routing, context.documents.valid_BT))
                limit = most_of_expert(self.moe, *context.documents.valid_BT.shape)
            valid_BT = self.dispatcher.own(context.documents.valid_BT)
            statistics = statistics_of(routing, valid_BT, self.moe)
            once(partial(self._count, statistics.counts_GE, routing.z_BT1.detach(), valid_BT))
            statistics = statistics.total(self.dispatcher.total)
        sent = self.send(x_BTD, routing.chosen_BTK, kept_BTK, routing.gates_BTK, limit)
        # What needs no token of others is computed while they travel.
        shared_BTD = None if self.shared is None else self._shared(self.shared, x_BTD, context)
        out_BTD = self.through_experts(sent).view_as(x_BTD)
        return out_BTD if shared_BTD is None else out_BTD + shared_BTD, statistics

    def send(
        self, x_BTD: Tensor, chosen_BTK: Tensor, kept_BTK: Tensor | None, gates_BTK: Tensor, limit: int | None
    ) -> Any:
        """Tokens leave for their experts, which have at most `limit` of them; returns what `through_experts` wants."""
        kept_NK = None if kept_BTK is None else kept_BTK.flatten(0, 1)
        place_NK = chosen_BTK.flatten(0, 1)
        if self.slots_E is not None:
            place_NK = self.slots_E[place_NK]
        assignments = assigned(place_NK, kept_NK, gates_BTK.flatten(0, 1), self.moe.n_experts, limit)
        return self.dispatcher.send(x_BTD.flatten(0, 1), assignments, self.moe.n_experts)

    def through_experts(self, sent: Any) -> Tensor:
        """What has left arrives, passes its experts and comes back: each token's gate-weighted sum, [N, D]."""
        rows_MD, counts_E = self.dispatcher.receive(sent)
        return self.dispatcher.combine(self.experts(rows_MD, counts_E), sent)

    def _count(self, counts_GE: Tensor, z_BT1: Tensor, valid_BT: Tensor) -> None:
        self.tokens_E += counts_GE.sum(0).to(torch.int64)
        self.z_2 += torch.stack(((z_BT1 * valid_BT[..., None]).sum(), valid_BT.sum()))

    def forget_counts(self) -> None:
        """Begins to count routed tokens anew, and what travels for them."""
        for count in (self.tokens_E, self.dropped, self.z_2):
            count.zero_()
        self.dispatcher.forget_traffic()

    def _shared(self, experts: FeedForward, x_BTD: Tensor, context: Context) -> Tensor:
        shared_BTD = experts(x_BTD, context)
        return shared_BTD if self.shared_gate is None else shared_BTD * self.shared_gate(x_BTD).sigmoid()

    def keys(self, context: Context) -> Tensor | None:
        """What this rank's tokens draw their random numbers with."""
        if not (self.training and self.moe.is_random):
            return None
        if context.randomness is None:
            raise UserError(
                f"model.moe (noisy={self.moe.noisy}, jitter={self.moe.jitter}, second_expert={self.moe.second_expert}) "
                "draws random numbers in training: pass randomness=Randomness(seed, step, sequences) to Decoder.loss"
            )
        valid_BT = context.documents.valid_BT
        positions_BT = torch.arange(valid_BT.shape[1], device=valid_BT.device).expand(valid_BT.shape)
        return context.randomness.keys(f"router {self.layer}", self.dispatcher.own(positions_BT))

    def _replayed(self, context: Context) -> Tensor | None:
        """The experts that this rank's tokens are to choose, [B, T, K]; -1 where they are free to."""
        if context.routes is None or not context.routes.is_replayed:
            return None
        return self.dispatcher.own(context.routes.recorded[self.layer])

    def _within_capacity(self, routing: Routing, valid_BT: Tensor) -> Tensor:
        """Which assignments are kept, [B, T, K]; counts those that are dropped."""
        moe, own = self.moe, self.dispatcher.own
        taken_BTK = own(valid_BT)[..., None].expand(routing.chosen_BTK.shape)
        if routing.drawn_BTK is not None:
            taken_BTK = taken_BTK & routing.drawn_BTK
        # A queue is as long as its sequences, whatever part of them this rank routes.
        kept_BTK = own(
            within_capacity(
                self.dispatcher.whole(routing.chosen_BTK),
                self.dispatcher.whole(routing.gates_BTK.detach()),
                self.dispatcher.whole(taken_BTK),
                capacity_of(moe, valid_BT.unflatten(0, (-1, moe.group_size)).sum((1, 2))),
                moe.drop_by,
            )
        )
        self.dropped += (taken_BTK & ~kept_BTK).sum()
        return kept_BTK

    def _check_groups(self, sequences: int) -> None:
        size = self.moe.group_size
        if sequences % size:
            fits = [n for n in range(1, sequences + 1) if sequences % n == 0]
            raise UserError(
                f"model.moe.group_size={size} must divide the {sequences} sequences of a forward pass; "
                f"try one of {fits}"
            )
