"""The MoE part of a ModelConfig: experts, how tokens are routed to them, and what keeps them balanced."""

from typing import Literal, Self

from pydantic import model_validator

from moray import UserError
from moray.model.config.parts import Part, above_zero, at_least


class MoEConfig(Part):
    """A Mixture-of-Experts layer. Every published router is a choice of these fields; docs/models.md lists them."""

    n_experts: int
    """Routed experts of a layer."""
    top_k: int = 1
    """Experts per token."""
    expert_width: int
    """Width of one expert; fine-grained experts are narrower than ffn.width (DeepSeekMoE)."""
    gated: bool | None = None
    """Whether experts have a gate; by default as ffn.gated says (GLaM: dense layers have, experts have not)."""
    n_shared: int = 0
    """Experts that every token passes, computed as one of width n_shared * expert_width."""
    shared_gate: bool = False
    """Whether the shared experts' output is multiplied with sigmoid(w x) (Qwen2-MoE)."""
    n_dense_layers: int = 0
    """The first layers that stay dense."""
    every: int = 1
    """Of the others, layers every - 1, 2 every - 1, … have experts (Switch, GLaM: every second)."""

    score: Literal["softmax", "sigmoid"] = "softmax"
    normalise_gates: bool = True
    """Whether a token's top-k gates are divided by their sum; for softmax scores that is a softmax after the top-k."""
    gate_scale: float = 1.0
    """What the gates are multiplied with at the end (DeepSeek's routed scaling factor)."""
    n_groups: int = 1
    """Groups of neighbouring experts (the paper's devices) among which device-limited routing chooses."""
    top_k_groups: int = 1
    """Groups that a token's experts may come from."""
    group_score: Literal["max", "top2"] = "top2"
    """What ranks a group: its best score (DeepSeek-V2) or the sum of its two best (DeepSeek-V3)."""
    bias_update_rate: float = 0.0
    """Step of the routing bias after each optimizer step (DeepSeek-V3, section 2.1.2); 0: it stays as it is."""

    device_bias_update_rate: float = 0.0
    """The same step for all experts of a group together, beside each one's own: down where the group has more than its
    share of the tokens, up where it has less."""

    noisy: bool = False
    """Noisy top-k: normal noise of learned deviation on the logits while training (Shazeer et al., 2017, eqs. 3-5)."""
    jitter: float = 0.0
    """The router's input is multiplied with uniform noise in [1 - jitter, 1 + jitter] while training (Switch)."""
    second_expert: Literal["always", "random"] = "always"
    """random: the second expert is kept with probability min(1, 2 * its gate) while training (GShard, algorithm 1)."""

    group_size: int = 1
    """Neighbouring sequences of a batch that share capacity and balance statistics."""
    capacity_factor: float | None = None
    """While training, an expert takes at most ceil(capacity_factor * top_k * tokens / n_experts) of a routing group's
    tokens, padding not counted; the others' assignments are dropped, and the residual stream passes them on. By default
    nothing is dropped."""
    drop_by: Literal["position", "gate"] = "position"
    """Which are dropped: those that come last (all first choices before second ones), or those of the smallest gate,
    among gates that agree to 12 bits those that come last."""

    balance_loss: float = 0.0
    """Factor of sum_i f_i P_i, f_i = n_experts / (top_k * tokens) * those that chose expert i, P_i its mean share of
    the scores (Switch, eqs. 4-6; DeepSeek-V2, eqs. 23-25; DeepSeek-V3, eqs. 17-20)."""
    balance_counts: Literal["all", "first"] = "all"
    """first: f_i counts each token's first choice alone, without the division by top_k (GShard)."""
    balance_over: Literal["layer", "model"] = "layer"
    """model: f_i and P_i are means over all MoE layers together (Mixtral)."""
    device_loss: float = 0.0
    """Factor of DeepSeek-V2's device-level balance loss (eqs. 26-28)."""
    communication_loss: float = 0.0
    """Factor of DeepSeek-V2's communication balance loss (eqs. 29-31)."""
    importance_loss: float = 0.0
    """Factor of the squared coefficient of variation of the experts' summed gates (Shazeer et al., 2017, eqs. 6-7);
    before anything is dropped."""
    load_loss: float = 0.0
    """The same of their expected loads under the noise (Shazeer et al., 2017, eqs. 8-11)."""
    router_z_loss: float = 0.0
    """Factor of the mean squared log-sum-exp of the router's logits (ST-MoE, eq. 5)."""

    @property
    def is_random(self) -> bool:
        """Whether routing draws random numbers while training."""
        return self.noisy or self.jitter > 0 or self.second_expert == "random"

    def check_same_function(self, why: str) -> None:
        """Raises UserError, for the reason `why`, naming a setting by which training computes another function of a
        sequence than evaluation: one that drops tokens, or draws.
        """
        same = {"capacity_factor": None, "noisy": False, "jitter": 0.0, "second_expert": "always"}
        for name, right in same.items():
            if (value := getattr(self, name)) != right:
                raise UserError(f"model.moe.{name}={value} must be {str(right).lower()}: {why}")

    @property
    def has_moving_bias(self) -> bool:
        """Whether training moves the routing bias."""
        return self.bias_update_rate > 0 or self.device_bias_update_rate > 0

    def is_moe_layer(self, layer: int) -> bool:
        return layer >= self.n_dense_layers and (layer + 1) % self.every == 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        prefix = "model.moe"
        at_least(
            self, prefix, 1, "n_experts", "top_k", "expert_width", "every", "n_groups", "top_k_groups", "group_size"
        )
        at_least(self, prefix, 0, "n_shared", "n_dense_layers", "bias_update_rate", "device_bias_update_rate")
        losses = [name for name in type(self).model_fields if name.endswith("_loss")]
        at_least(self, prefix, 0, *losses)
        above_zero(self, prefix, "gate_scale", "capacity_factor")
        if not 0 <= self.jitter < 1:
            raise UserError(f"{prefix}.jitter={self.jitter} must be 0 (none) or more, and less than 1")
        if self.expert_width % 8:
            raise UserError(
                f"{prefix}.expert_width={self.expert_width} must be a multiple of 8, or the rows of the experts' bf16 "
                f"weights are no multiple of 16 bytes, as grouped matrix products need; "
                f"try {self.expert_width + -self.expert_width % 8}"
            )
        self._check_groups(prefix)
        self._check_combinations(prefix)
        return self

    def _check_groups(self, prefix: str) -> None:
        experts, groups = self.n_experts, self.n_groups
        if experts % groups:
            fits = [n for n in range(1, experts + 1) if experts % n == 0]
            raise UserError(f"{prefix}.n_groups={groups} must divide n_experts={experts}; try one of {fits}")
        if self.top_k_groups > groups:
            raise UserError(f"{prefix}.top_k_groups={self.top_k_groups} must be at most n_groups={groups}")
        reachable = experts // groups * self.top_k_groups
        if self.top_k > reachable:
            raise UserError(
                f"{prefix}.top_k={self.top_k} must be at most {reachable}, the experts in "
                f"{self.top_k_groups} of {groups} groups of n_experts={experts}"
            )
        if groups > 1 and self.group_score == "top2" and experts // groups < 2:
            raise UserError(
                f"{prefix}.group_score=top2 needs two experts a group; n_groups={groups} leaves one: use max"
            )

    def _check_combinations(self, prefix: str) -> None:
        if self.second_expert == "random" and self.top_k != 2:
            raise UserError(f"{prefix}.second_expert=random is GShard's top-2 routing; top_k={self.top_k} must be 2")
        if self.load_loss and not (self.noisy and self.top_k < self.n_experts):
            raise UserError(
                f"{prefix}.load_loss={self.load_loss} is the expected load under noise: it needs noisy=true and fewer "
                f"experts a token than there are; noisy={self.noisy}, top_k={self.top_k}, n_experts={self.n_experts}"
            )
        if self.load_loss and (self.top_k_groups < self.n_groups or self.has_moving_bias):
            raise UserError(
                f"{prefix}.load_loss={self.load_loss} knows the noise alone: it needs top_k_groups={self.top_k_groups} "
                f"to be n_groups={self.n_groups}, and bias_update_rate={self.bias_update_rate} and "
                f"device_bias_update_rate={self.device_bias_update_rate} to be 0"
            )
        if self.noisy and (self.score != "softmax" or not self.normalise_gates):
            raise UserError(
                f"{prefix}.noisy=true is a softmax over the top-k: it needs score=softmax, normalise_gates=true"
            )
        if self.shared_gate and not self.n_shared:
            raise UserError(f"{prefix}.shared_gate=true needs a shared expert; n_shared=0")
        for name in ("device_loss", "communication_loss", "device_bias_update_rate"):
            if getattr(self, name) and self.n_groups == 1:
                raise UserError(
                    f"{prefix}.{name}={getattr(self, name)} balances groups of experts: it needs n_groups > 1"
                )
