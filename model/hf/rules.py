"""The rules that families share: how fields of config.json and of ModelConfig become each other."""

from collections.abc import Mapping
from typing import Any

from moray import UserError
from moray.model.config.architecture import ModelConfig
from moray.model.hf.family import Rule
from moray.model.hf.fields import MISSING, Fields, refused


def nested(path: str, value: Any) -> dict[str, Any]:
    """`nested("moe.top_k", 2)` is {"moe": {"top_k": 2}}."""
    for part in reversed(path.split(".")):
        value = {part: value}
    return value


def at(config: ModelConfig, path: str) -> Any:
    """A field of the config by its path. Raises UserError where a part of the way is None."""
    value: Any = config
    for part in path.split("."):
        if value is None:
            raise UserError(f"there is no model.{path}")
        value = getattr(value, part)
    return value


def same(their: str, our: str, default: Any = MISSING, *, alias: str = "") -> Rule:
    """One field under two names. default: what transformers takes where the file is silent. alias: read if given."""

    def read(fields: Fields) -> dict[str, Any]:
        other = fields.take(alias, None) if alias else None
        return nested(our, fields.take(their, default) if other is None else other)

    return Rule(read, lambda config: {their: at(config, our)})


def translated(their: str, our: str, words: Mapping[Any, Any], default: Any = MISSING) -> Rule:
    """One field whose values have other names too: theirs -> ours."""

    def read(fields: Fields) -> dict[str, Any]:
        value = fields.take(their, default)
        if value not in list(words):  # a list, as what stands in the file need not be hashable
            raise refused(their, value, f"moray knows {', '.join(map(repr, words))}")
        return nested(our, words[value])

    def write(config: ModelConfig) -> dict[str, Any]:
        value = at(config, our)
        found = [name for name, meaning in words.items() if meaning == value]
        if not found:
            raise UserError(f"model.{our}={value} has no name in {their}")
        return {their: found[0]}

    return Rule(read, write)


def fixed(their: str, value: Any, default: Any = MISSING) -> Rule:
    """A field that must have one value. `default`: what transformers takes where the file is silent, if another."""

    def read(fields: Fields) -> dict[str, Any]:
        found = fields.take(their, value if default is MISSING else default)
        if found != value:
            raise refused(their, found, f"moray computes {their}={value!r}")
        return {}

    return Rule(read, lambda config: {their: value})


def unused(*names: str) -> Rule:
    """Fields that bear on nothing that a language model computes."""

    def read(fields: Fields) -> dict[str, Any]:
        for name in names:
            fields.take(name, None)
        return {}

    return Rule(read, lambda config: {})


def ours(**values: Any) -> Rule:
    """What all models of a family have in common and config.json does not say."""
    return Rule(lambda fields: values, lambda config: {})


def decoder(*, eps: float, tied: bool = False) -> tuple[Rule, ...]:
    """The sizes that every Llama-like config.json states. eps, tied: the family's defaults in transformers."""
    return (
        same("vocab_size", "vocab_size"),
        same("hidden_size", "d_model"),
        same("num_hidden_layers", "n_layers"),
        same("max_position_embeddings", "max_seq_len"),
        same("rms_norm_eps", "norm.eps", eps),
        same("initializer_range", "init.std", 0.02),
        same("tie_word_embeddings", "tied_embeddings", tied),
    )


def _read_heads(fields: Fields, kv_heads: int | None, head_dim: int | None) -> dict[str, Any]:
    """kv_heads, head_dim: the family's defaults; null: as many key heads as heads, each of its share of hidden_size."""
    heads, natural = fields.take("num_attention_heads"), _natural_head_dim(fields)
    kv_heads, head_dim = fields.take("num_key_value_heads", kv_heads), fields.take("head_dim", head_dim)
    return {
        "attention": {
            "n_heads": heads,
            "n_kv_heads": heads if kv_heads is None else kv_heads,
            "head_dim": natural if head_dim is None else head_dim,
        }
    }


def _natural_head_dim(fields: Fields) -> int:
    return fields.count("hidden_size") // fields.count("num_attention_heads")


def _write_heads(config: ModelConfig) -> dict[str, Any]:
    attention = config.attention
    return {
        "num_attention_heads": attention.n_heads,
        "num_key_value_heads": attention.n_kv_heads,
        "head_dim": attention.head_dim,
    }


def heads(kv_heads: int | None = None, head_dim: int | None = None) -> Rule:
    """Heads of any width. kv_heads, head_dim: what the family takes where the file is silent; None: as for null."""
    return Rule(lambda fields: _read_heads(fields, kv_heads, head_dim), _write_heads)


def dividing_heads(kv_heads: int | None = None, head_dim: int | None = None) -> Rule:
    """The same, but their number divides hidden_size: transformers 5 asks it of Llama and Gemma 2."""

    def write(config: ModelConfig) -> dict[str, Any]:
        if config.d_model % config.attention.n_heads:
            raise UserError(
                f"model.attention.n_heads={config.attention.n_heads} does not divide d_model={config.d_model}"
            )
        return _write_heads(config)

    return Rule(lambda fields: _read_heads(fields, kv_heads, head_dim), write)


def natural_heads(kv_heads: int | None = None) -> Rule:
    """Heads of width hidden_size / num_attention_heads and no other."""

    def read(fields: Fields) -> dict[str, Any]:
        read, natural = _read_heads(fields, kv_heads, None), _natural_head_dim(fields)
        if (head_dim := read["attention"]["head_dim"]) != natural:
            raise refused("head_dim", head_dim, f"this family has hidden_size / num_attention_heads = {natural}")
        return read

    def write(config: ModelConfig) -> dict[str, Any]:
        written = _write_heads(config)
        if written.pop("head_dim") * config.attention.n_heads != config.d_model:
            raise UserError(f"model.attention.head_dim={config.attention.head_dim} is not d_model / n_heads")
        return written

    return Rule(read, write)


SILU = fixed("hidden_act", "silu")


def _read_biases(fields: Fields) -> dict[str, Any]:
    bias = fields.take("attention_bias", False)
    return {"attention": {"qkv_bias": bias, "output_bias": bias}}


def _write_biases(config: ModelConfig) -> dict[str, Any]:
    if config.attention.qkv_bias != config.attention.output_bias:
        raise UserError(f"model.attention.qkv_bias={config.attention.qkv_bias} must be that of output_bias")
    return {"attention_bias": config.attention.qkv_bias}


ATTENTION_BIAS = Rule(_read_biases, _write_biases)
"""One switch for the biases of all four projections."""


def window_everywhere(default: int | None, *, switched: bool = False) -> Rule:
    """A window in all layers or none. default: theirs. switched: use_sliding_window says whether it counts (Qwen)."""

    def read(fields: Fields) -> dict[str, Any]:
        window = fields.take("sliding_window", default)
        if switched:
            fields.take("max_window_layers", None)
            window = window if fields.take("use_sliding_window", False) else None
        return {"attention": {"window": window, "pattern": ("local",)}}

    def write(config: ModelConfig) -> dict[str, Any]:
        local = {config.attention.is_local(layer) for layer in range(config.n_layers)}
        if len(local) > 1:
            raise UserError(f"model.attention.pattern={config.attention.pattern}: all layers slide a window or none")
        window = config.attention.window if local == {True} else None
        return {"sliding_window": window} | ({"use_sliding_window": window is not None} if switched else {})

    return Rule(read, write)


def layer_types(config: ModelConfig) -> list[str]:
    """transformers' names of what each layer's attention sees."""
    local = (config.attention.is_local(layer) for layer in range(config.n_layers))
    return ["sliding_attention" if is_local else "full_attention" for is_local in local]


def pattern(types: Any, n_layers: int) -> tuple[str, ...]:
    """The shortest pattern that, repeated, gives these layer types. Raises UserError for what are none."""
    words = {"sliding_attention": "local", "full_attention": "global"}
    if not isinstance(types, list) or len(types) != n_layers:
        raise refused("layer_types", types, f"it must name the attention of each of the {n_layers} layers")
    for kind in types:
        if kind not in list(words):
            raise refused("layer_types", kind, f"moray knows {', '.join(words)}")
    return shortest([words[kind] for kind in types])


def shortest(layers: list[str]) -> tuple[str, ...]:
    """The shortest pattern that, repeated, gives these layers."""
    lengths = (n for n in range(1, len(layers) + 1) if all(layers[i] == layers[i % n] for i in range(len(layers))))
    return tuple(layers[: next(lengths)])


def _read_qwen_window(fields: Fields) -> dict[str, Any]:
    layers, since = fields.count("num_hidden_layers"), fields.number("max_window_layers", 28)
    given, switched = fields.take("layer_types", None), fields.take("use_sliding_window", False)
    stated = fields.take("sliding_window", 4096)
    window = stated if switched else None
    types = given or ["sliding_attention" if layer >= since else "full_attention" for layer in range(layers)]
    if window is None:
        if given and "local" in pattern(given, layers):
            raise refused("layer_types", given, "sliding layers need use_sliding_window=true and a sliding_window")
        return {"attention": {"window": None, "pattern": ("local",)}}
    return {"attention": {"window": window, "pattern": pattern(types, layers)}}


def _write_qwen_window(config: ModelConfig) -> dict[str, Any]:
    types = layer_types(config)
    slides = "sliding_attention" in types
    window = config.attention.window if slides else None
    return {"use_sliding_window": slides, "sliding_window": window, "layer_types": types}


QWEN_WINDOW = Rule(_read_qwen_window, _write_qwen_window)
"""Windows in the layers that layer_types names, or else in those from max_window_layers on."""


def _read_balance(fields: Fields, default: float) -> dict[str, Any]:
    # Theirs counts a token once an expert it chose, ours divides by top_k.
    factor = fields.number("router_aux_loss_coef", default) * fields.count("num_experts_per_tok")
    return {"moe": {"balance_loss": factor, "balance_over": "model"}}


def _write_balance(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe
    alike = moe is not None and moe.balance_over == "model" and moe.balance_counts == "all"
    return {"router_aux_loss_coef": moe.balance_loss / moe.top_k if moe and alike else 0.0}


def balance_loss(default: float) -> Rule:
    """Mixtral's loss over all layers together; another one is not written, which changes training alone."""
    return Rule(lambda fields: _read_balance(fields, default), _write_balance)


def _read_expert_width(fields: Fields) -> dict[str, Any]:
    width = fields.take("intermediate_size")
    return {"ffn": {"width": width}, "moe": {"expert_width": width}}


EXPERT_WIDTH = Rule(_read_expert_width, lambda config: {"intermediate_size": at(config, "moe.expert_width")})
"""All layers have experts, and the width is theirs."""
