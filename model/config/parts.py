"""The parts of a ModelConfig that every model has: norms, positions, attention, feed-forward, initial weights."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from moray import UserError


class Part(BaseModel):
    """Frozen, without unknown fields; a value that is not finite is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


def at_least(part: Part, prefix: str, least: float, *names: str) -> None:
    """Raises UserError naming the first of these fields that is set and below `least`."""
    for name in names:
        value = getattr(part, name)
        if value is not None and value < least:
            raise UserError(f"{prefix}.{name}={value} must be at least {least}")


def above_zero(part: Part, prefix: str, *names: str) -> None:
    """Raises UserError naming the first of these fields that is set and not more than 0."""
    for name in names:
        value = getattr(part, name)
        if value is not None and value <= 0:
            raise UserError(f"{prefix}.{name}={value} must be more than 0")


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested fields with some of them replaced; a part that was None starts from nothing."""
    merged = dict(base)
    for name, value in changes.items():
        held = merged.get(name)
        merged[name] = merge(held, value) if isinstance(value, Mapping) and isinstance(held, Mapping) else value
    return merged


class NormConfig(Part):
    """How the residual stream is normalised, and where."""

    kind: Literal["rmsnorm", "layernorm", "crmsnorm"] = "rmsnorm"
    """crmsnorm: the RMSNorm of a zero-mean vector whose last entry is left out (Jiang et al., 2023)."""
    placement: Literal["pre", "post", "sandwich"] = "pre"
    """Before attention and feed-forward, after adding them to the stream (2017), or before and after them (Gemma 2)."""
    eps: float = 1e-6
    unit_offset: bool = False
    """Whether the stored weight w scales by 1 + w (Gemma)."""
    bias: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        above_zero(self, "model.norm", "eps")
        return self


class RopeScaling(Part):
    """How RoPE's frequencies are stretched for sequences longer than those trained on."""

    kind: Literal["linear", "ntk", "llama3", "yarn"]
    """Position interpolation (Chen et al., 2023), NTK-aware base, Llama 3.1's bands, YaRN (Peng et al., 2023)."""
    factor: float
    """How many times longer."""
    original_max_seq_len: int | None = None
    """The longest sequence before (llama3, yarn)."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_max_seq_len / low_freq_factor are stretched in full."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_max_seq_len / high_freq_factor are left alone."""
    beta_fast: float = 32.0
    """yarn: channels that turn more often than this over original_max_seq_len are left alone."""
    beta_slow: float = 1.0
    """yarn: channels that turn less often than this are stretched in full."""
    truncate: bool = True
    """yarn: whether the ramp's two ends are rounded to whole channels."""
    attention_factor: float | None = None
    """yarn: what cosine and sine are multiplied with; by default 0.1 ln(factor) + 1, or as the next two say."""
    mscale: float | None = None
    """yarn in DeepSeek: cosine and sine are multiplied with m(mscale) / m(mscale_all_dim),
    m(x) = 0.1 x ln(factor) + 1."""
    mscale_all_dim: float | None = None
    """yarn in DeepSeek: latent attention's softmax scale is multiplied with m(mscale_all_dim)^2."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        prefix = "model.position.scaling"
        at_least(self, prefix, 1, "factor", "original_max_seq_len")
        above_zero(self, prefix, "low_freq_factor", "beta_fast", "beta_slow", "attention_factor")
        if self.kind in ("llama3", "yarn") and self.original_max_seq_len is None:
            raise UserError(f"{prefix}.original_max_seq_len is missing: {self.kind} needs the length trained on before")
        for high, low in (("high_freq_factor", "low_freq_factor"), ("beta_fast", "beta_slow")):
            if getattr(self, high) <= getattr(self, low):
                raise UserError(f"{prefix}.{high}={getattr(self, high)} must be more than {low}={getattr(self, low)}")
        return self


class PositionConfig(Part):
    """How a token knows where it stands in its document."""

    kind: Literal["rope", "learned"] | None = "rope"
    theta: float = 1e6
    """RoPE's base."""
    rotary_dim: int | None = None
    """Channels of each head that RoPE turns, the first ones; by default all (partial rotary: GPT-NeoX)."""
    interleaved: bool = False
    """Whether RoPE pairs channels (2i, 2i + 1) (Su et al., GPT-J, DeepSeek) and not (i, i + dim/2) (Llama, NeoX)."""
    scaling: RopeScaling | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.theta <= 1:
            raise UserError(f"model.position.theta={self.theta} must be more than 1, or no channel turns slower")
        if self.rotary_dim is not None and (self.rotary_dim < 2 or self.rotary_dim % 2):
            raise UserError(f"model.position.rotary_dim={self.rotary_dim} must be even and at least 2")
        if self.scaling and self.kind != "rope":
            raise UserError(f"model.position.scaling needs model.position.kind=rope; it is {self.kind}")
        return self


class LatentConfig(Part):
    """Multi-head latent attention: keys and values are made of one small vector a token (DeepSeek-V2, section 2.1)."""

    kv_rank: int
    """Width of the vector that the cache holds in place of keys and values."""
    q_rank: int | None = None
    """Width that queries are squeezed through; by default they are not."""
    nope_dim: int
    """Channels of a query or key head without position."""
    rope_dim: int
    """Channels that RoPE turns; the key's are shared by all heads."""
    value_dim: int
    """Channels of a value head."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        at_least(self, "model.attention.latent", 1, "kv_rank", "q_rank", "nope_dim", "rope_dim", "value_dim")
        if self.rope_dim % 2:
            raise UserError(
                f"model.attention.latent.rope_dim={self.rope_dim} must be even: RoPE turns pairs of channels"
            )
        return self


class AttentionConfig(Part):
    """Multi-head (n_kv_heads = n_heads), multi-query (1), grouped-query (between), or latent attention."""

    n_heads: int = 8
    """Query heads."""
    n_kv_heads: int = 4
    """Key and value heads; each serves n_heads / n_kv_heads query heads."""
    head_dim: int = 96
    """Channels of a query and key head; of a value head too, but for latent attention."""
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: Literal["head", "full"] | None = None
    """RMSNorm over each query and key head (Qwen3), or over all heads' channels together (OLMoE)."""
    scale: float | None = None
    """What scores are multiplied with; by default 1 / sqrt(head_dim)."""
    softcap: float | None = None
    """Scores s become softcap * tanh(s / softcap) (Gemma 2)."""
    window: int | None = None
    """In local layers a token sees itself and the window - 1 tokens before it."""
    pattern: tuple[Literal["local", "global"], ...] = ("local",)
    """Which layers are local, repeated over the layers; without a window all are global."""
    latent: LatentConfig | None = None

    @field_validator("pattern", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        # On the command line: local,global
        return tuple(value.split(",")) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        prefix = "model.attention"
        at_least(self, prefix, 1, "n_heads", "n_kv_heads", "head_dim", "window")
        above_zero(self, prefix, "scale", "softcap")
        if self.n_heads % self.n_kv_heads:
            fits = [n for n in range(1, self.n_heads + 1) if self.n_heads % n == 0]
            raise UserError(
                f"{prefix}.n_kv_heads={self.n_kv_heads} must divide n_heads={self.n_heads}; try one of {fits}"
            )
        if not self.pattern:
            raise UserError(f"{prefix}.pattern is empty; try local,global")
        if self.latent:
            self._check_latent(self.latent)
        return self

    def _check_latent(self, latent: LatentConfig) -> None:
        prefix = "model.attention"
        if self.head_dim != latent.nope_dim + latent.rope_dim:
            raise UserError(
                f"{prefix}.head_dim={self.head_dim} must be latent.nope_dim + latent.rope_dim = "
                f"{latent.nope_dim + latent.rope_dim}"
            )
        if self.n_kv_heads != self.n_heads:
            raise UserError(
                f"{prefix}.n_kv_heads={self.n_kv_heads} must be n_heads={self.n_heads} with latent attention"
            )
        for name, unset in (("qk_norm", None), ("window", None), ("qkv_bias", False), ("softcap", None)):
            if getattr(self, name) != unset:
                raise UserError(
                    f"{prefix}.{name}={getattr(self, name)} does not go with latent attention; leave it {unset}"
                )

    def is_local(self, layer: int) -> bool:
        """Whether this layer's attention slides a window."""
        return self.window is not None and self.pattern[layer % len(self.pattern)] == "local"


class FeedForwardConfig(Part):
    """The dense feed-forward network; experts share its activation, gate and bias."""

    width: int = 2432
    activation: Literal["relu", "relu2", "gelu", "gelu_tanh", "silu"] = "silu"
    """relu2 is the squared ReLU (So et al., 2021)."""
    gated: bool = True
    """down(act(gate(x)) * up(x)) rather than down(act(up(x))): SwiGLU with silu, GeGLU with gelu (Shazeer, 2020)."""
    bias: bool = False
    conv_width: int = 0
    """MixFFN: taps of a causal depthwise convolution between the projections of dense layers; 0: none."""
    adapter_rank: int = 0
    """Rank of a low-rank adapter in the convolution's place; 0: none."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        at_least(self, "model.ffn", 1, "width")
        at_least(self, "model.ffn", 0, "conv_width", "adapter_rank")
        if self.conv_width and self.adapter_rank:
            raise UserError(
                f"model.ffn.adapter_rank={self.adapter_rank} stands in the place of conv_width={self.conv_width}: "
                "set one of them to 0"
            )
        return self


class InitConfig(Part):
    """Initial weights; norm weights are 1, biases 0."""

    scheme: Literal["normal", "megatron", "depth", "fan_in"] = "normal"
    """All normal with deviation std; what writes to the residual stream by std / sqrt(2 n_layers) (GPT-2, Megatron) or
    std / sqrt(2 (layer + 1)) (depth-scaled); or every matrix by std / sqrt(inputs), truncated at 2 deviations
    (Switch)."""
    std: float = 0.02

    @model_validator(mode="after")
    def _check(self) -> Self:
        above_zero(self, "model.init", "std")
        return self
