"""ModelConfig: a frozen, validated description of an architecture. A family is data, never a subclass."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import ValidationError, model_validator

from moray import UserError
from moray.model.config.mistakes import in_one_line
from moray.model.config.moe import MoEConfig
from moray.model.config.parts import (
    AttentionConfig,
    FeedForwardConfig,
    InitConfig,
    NormConfig,
    Part,
    PositionConfig,
    above_zero,
    at_least,
    merge,
)


class ModelConfig(Part):
    """A decoder-only GPT, dense or with Mixture-of-Experts layers.

    Raises UserError naming the field, its value and what would be right: pydantic's, which is one; `of` says it in a
    line.
    """

    vocab_size: int = 6400
    """Rows of the embedding; at least the tokenizer's vocabulary."""
    n_layers: int = 8
    d_model: int = 768
    """Width of the residual stream."""
    max_seq_len: int = 32768
    head: Literal["vocabulary", "scalar"] = "vocabulary"
    """What the last hidden state becomes: logits over the vocabulary, or one number, as reward and value models give.
    Of a scalar head, tied_embeddings, head_bias, final_softcap and z_loss say nothing."""
    tied_embeddings: bool = True
    """Whether the output head's weight is the embedding's."""
    head_bias: bool = False
    embedding_scale: float = 1.0
    """What embeddings are multiplied with (Gemma: sqrt(d_model))."""
    final_softcap: float | None = None
    """Logits l become final_softcap * tanh(l / final_softcap) (Gemma 2)."""
    z_loss: float = 0.0
    """Factor of the mean squared log-sum-exp of the logits (PaLM, section 5)."""
    residual: Literal["sequential", "parallel"] = "sequential"
    """parallel: attention and feed-forward both read the layer's input (GPT-NeoX)."""

    norm: NormConfig = NormConfig()
    position: PositionConfig = PositionConfig()
    attention: AttentionConfig = AttentionConfig()
    ffn: FeedForwardConfig = FeedForwardConfig()
    moe: MoEConfig | None = None
    """By default every layer is dense."""
    init: InitConfig = InitConfig()

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Self:
        """From nested fields. Raises UserError of one line naming the field, its value and what would be right."""
        try:
            return cls(**fields)
        except ValidationError as error:
            raise UserError(in_one_line(error, cls, "model.")) from None

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """The named architecture, some fields changed: `preset("demo-moe", n_layers=2, moe={"top_k": 2})`.

        Raises UserError with the nearest name if there is none.
        """
        from moray.model.presets import preset_fields

        return cls.of(merge(preset_fields(name), changes))

    def but(self, **changes: Any) -> Self:
        """The same architecture with some fields changed, and checked again."""
        return self.of(merge(self.model_dump(), changes))

    @property
    def head_width(self) -> int:
        """Outputs of the head."""
        return self.vocab_size if self.head == "vocabulary" else 1

    @property
    def has_tied_head(self) -> bool:
        return self.tied_embeddings and self.head == "vocabulary"

    @property
    def n_experts(self) -> int:
        """Routed experts of a MoE layer; 0 in a dense model."""
        return self.moe.n_experts if self.moe else 0

    @property
    def expert_ffn(self) -> FeedForwardConfig:
        """What an expert is, but for its width."""
        gated = self.ffn.gated if self.moe is None or self.moe.gated is None else self.moe.gated
        return self.ffn.model_copy(update={"gated": gated})

    def is_moe_layer(self, layer: int) -> bool:
        return self.moe is not None and self.moe.is_moe_layer(layer)

    @property
    def n_moe_layers(self) -> int:
        return sum(self.is_moe_layer(layer) for layer in range(self.n_layers))

    @property
    def rotary_dim(self) -> int:
        """Channels of each head that RoPE turns."""
        if self.attention.latent:
            return self.attention.latent.rope_dim
        return self.position.rotary_dim or self.attention.head_dim

    @model_validator(mode="after")
    def _check(self) -> Self:
        at_least(self, "model", 1, "vocab_size", "n_layers", "d_model", "max_seq_len")
        at_least(self, "model", 0, "z_loss")
        above_zero(self, "model", "embedding_scale", "final_softcap")
        self._check_positions()
        if self.norm.placement != "pre" and self.residual == "parallel":
            raise UserError(f"model.residual=parallel needs model.norm.placement=pre; it is {self.norm.placement}")
        if self.head_bias and self.tied_embeddings:
            raise UserError("model.head_bias=true needs model.tied_embeddings=false")
        if self.moe:
            self._check_moe(self.moe)
        return self

    def _check_positions(self) -> None:
        head_dim = self.attention.head_dim
        if self.position.kind != "rope":
            if self.attention.latent:
                raise UserError(f"model.position.kind={self.position.kind} does not go with latent attention; use rope")
            return
        if self.position.rotary_dim is None and head_dim % 2:
            raise UserError(f"model.attention.head_dim={head_dim} must be even: RoPE turns pairs of channels")
        if self.position.rotary_dim is not None and (self.attention.latent or self.position.rotary_dim > head_dim):
            right = "leave it out with latent attention" if self.attention.latent else f"at most head_dim={head_dim}"
            raise UserError(f"model.position.rotary_dim={self.position.rotary_dim} is too much; {right}")

    def _check_moe(self, moe: MoEConfig) -> None:
        if self.d_model % 8:
            raise UserError(
                f"model.d_model={self.d_model} must be a multiple of 8 in a model with experts, or the rows of their "
                f"bf16 weights are no multiple of 16 bytes, as grouped matrix products need; "
                f"try {self.d_model + -self.d_model % 8}"
            )
        for name in ("conv_width", "adapter_rank"):
            if getattr(self.ffn, name) and self.n_moe_layers == self.n_layers:
                raise UserError(
                    f"model.ffn.{name}={getattr(self.ffn, name)} is of dense layers, and every layer has experts; set "
                    "it to 0, or model.moe.n_dense_layers or every higher"
                )
        if not self.n_moe_layers:
            raise UserError(
                f"model.moe.n_dense_layers={moe.n_dense_layers} and every={moe.every} leave none of "
                f"n_layers={self.n_layers} layers experts; lower them"
            )
