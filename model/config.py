"""ModelConfig: a frozen, validated description of an architecture. A family is data, never a subclass."""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator


class ModelConfig(BaseModel):
    """A decoder-only GPT: pre-norm RMSNorm, RoPE, grouped-query attention, SwiGLU, optionally with MoE layers.

    Raises ValueError (pydantic's, which is one) naming the field, its value and what would be right.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    vocab_size: int = 6400
    """Rows of the embedding; at least the tokenizer's vocabulary."""
    n_layers: int = 8
    d_model: int = 768
    """Width of the residual stream."""
    n_heads: int = 8
    """Query heads."""
    n_kv_heads: int = 4
    """Key and value heads; each serves n_heads / n_kv_heads query heads (grouped-query attention)."""
    head_dim: int = 96
    d_ff: int = 2432
    """Width of a dense layer's SwiGLU."""
    max_seq_len: int = 32768
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    qk_norm: bool = True
    """RMSNorm over each query and key head, as in Qwen3."""
    tied_embeddings: bool = True
    init_std: float = 0.02

    n_experts: int = 0
    """Routed experts of a MoE layer; 0: every layer is dense."""
    top_k: int = 1
    """Experts per token."""
    d_expert: int = 2432
    """Width of one expert's SwiGLU; fine-grained experts are narrower than d_ff (DeepSeekMoE)."""
    n_shared_experts: int = 0
    """Experts that every token passes, computed as one SwiGLU of width n_shared_experts * d_expert."""
    n_dense_layers: int = 0
    """The first layers that stay dense."""
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    normalise_gates: bool = True
    """Whether a token's top-k gates are divided by their sum."""
    gate_scale: float = 1.0
    """What the gates are multiplied with at the end (DeepSeek's routed scaling factor)."""
    n_expert_groups: int = 1
    """Groups of neighbouring experts among which device-limited routing chooses."""
    top_k_groups: int = 1
    """Groups that a token's experts may come from."""
    group_score: Literal["max", "top2"] = "top2"
    """What ranks a group: its best score (DeepSeek-V2) or the sum of its two best (DeepSeek-V3)."""
    balance_loss: float = 0.0
    """Factor of the sequence-wise balance loss (DeepSeek-V3, eqs. 17-20)."""
    bias_update_rate: float = 0.0
    """Step of the routing bias after each optimizer step (DeepSeek-V3, section 2.1.2); 0: no bias."""

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """The named architecture with some fields changed. Raises ValueError with the nearest name if there is none."""
        from model.presets import preset_fields

        return cls(**{**preset_fields(name), **changes})

    def is_moe_layer(self, layer: int) -> bool:
        return self.n_experts > 0 and layer >= self.n_dense_layers

    @property
    def n_moe_layers(self) -> int:
        return sum(self.is_moe_layer(layer) for layer in range(self.n_layers))

    @model_validator(mode="after")
    def _check(self) -> Self:
        positive = ("vocab_size", "n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff", "max_seq_len")
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)} must be at least 1")
        for name in ("rope_theta", "norm_eps", "init_std", "gate_scale"):
            if getattr(self, name) <= 0:
                raise ValueError(f"model.{name}={getattr(self, name)} must be more than 0")
        if self.n_heads % self.n_kv_heads:
            fits = [n for n in range(1, self.n_heads + 1) if self.n_heads % n == 0]
            raise ValueError(
                f"model.n_kv_heads={self.n_kv_heads} must divide n_heads={self.n_heads}; try one of {fits}"
            )
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim={self.head_dim} must be even: RoPE turns pairs of channels")
        if self.n_experts < 0:
            raise ValueError(f"model.n_experts={self.n_experts} must be 0 (dense) or more")
        if self.n_experts:
            self._check_experts()
        return self

    def _check_experts(self) -> None:
        experts, groups = self.n_experts, self.n_expert_groups
        for name in ("top_k", "d_expert", "n_expert_groups", "top_k_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)} must be at least 1")
        for name in ("n_shared_experts", "balance_loss", "bias_update_rate"):
            if getattr(self, name) < 0:
                raise ValueError(f"model.{name}={getattr(self, name)} must be 0 or more")
        for name in ("d_model", "d_expert"):
            value = getattr(self, name)
            if value % 8:
                raise ValueError(
                    f"model.{name}={value} must be a multiple of 8 in a model with experts, or the rows of their bf16 "
                    f"weights are no multiple of 16 bytes, as grouped matrix products need; try {value + -value % 8}"
                )
        if not 0 <= self.n_dense_layers < self.n_layers:
            raise ValueError(
                f"model.n_dense_layers={self.n_dense_layers} must lie between 0 and n_layers - 1 = {self.n_layers - 1}"
            )
        if experts % groups:
            fits = [n for n in range(1, experts + 1) if experts % n == 0]
            raise ValueError(f"model.n_expert_groups={groups} must divide n_experts={experts}; try one of {fits}")
        if self.top_k_groups > groups:
            raise ValueError(f"model.top_k_groups={self.top_k_groups} must be at most n_expert_groups={groups}")
        reachable = experts // groups * self.top_k_groups
        if self.top_k > reachable:
            raise ValueError(
                f"model.top_k={self.top_k} must be at most {reachable}, the experts in "
                f"{self.top_k_groups} of {groups} groups of n_experts={experts}"
            )
        if groups > 1 and self.group_score == "top2" and experts // groups < 2:
            raise ValueError(
                f"model.group_score=top2 needs two experts a group; n_expert_groups={groups} leaves one: use max"
            )
