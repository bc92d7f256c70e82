"""GPT-Neo: Black et al., 2021, https://doi.org/10.5281/zenodo.5297715."""

from typing import Any

from moray.model.config.architecture import ModelConfig
from moray.model.hf.families.gpt2 import NAMES
from moray.model.hf.family import Family, Rule
from moray.model.hf.fields import Fields, refused
from moray.model.hf.gpt import LEARNED, activation, sizes
from moray.model.hf.rules import ours, shortest, unused

_OURS, _THEIRS = "blocks.{layer}.attention.", "transformer.h.{layer}.attn.attention."


def _read_pattern(fields: Fields) -> dict[str, Any]:
    runs = fields.take("attention_types", None) or [[["global", "local"], 12]]
    try:
        layers = [kind for kinds, count in runs for kind in list(kinds) * count]
    except (TypeError, ValueError):
        raise refused("attention_types", runs, "it must be a list of [[kinds], count]") from None
    if any(kind not in ("global", "local") for kind in layers):
        raise refused("attention_types", runs, "moray knows global, local")
    if len(layers) != fields.take("num_layers"):
        raise refused("attention_types", runs, f"it gives {len(layers)} layers, num_layers={fields.take('num_layers')}")
    if (stated := fields.take("attention_layers", None)) not in (None, layers):
        raise refused("attention_layers", stated, f"attention_types gives {layers}")
    return {"attention": {"window": fields.count("window_size", 256), "pattern": shortest(layers)}}


def _write_pattern(config: ModelConfig) -> dict[str, Any]:
    layers = ["local" if config.attention.is_local(layer) else "global" for layer in range(config.n_layers)]
    return {
        "attention_types": [[layers, 1]],
        "attention_layers": layers,
        "window_size": config.attention.window or config.max_seq_len,
    }


GPT_NEO = Family(
    model_type="gpt_neo",
    architecture="GPTNeoForCausalLM",
    rules=(
        *sizes(n_layers="num_layers", n_heads="num_heads", eps="layer_norm_epsilon"),
        activation("activation_function", "gelu_new"),
        LEARNED,
        Rule(_read_pattern, _write_pattern),
        # Scores are not divided by anything.
        ours(attention={"scale": 1.0, "output_bias": True}),
        unused("resid_dropout"),
    ),
    table=lambda config: {
        **NAMES,
        **{_OURS + name: f"{_THEIRS}{name[0]}_proj" for name in ("query", "key", "value")},
        _OURS + "output": _THEIRS + "out_proj",
    },
    ignored=r".*\.attn\.attention\.(masked_)?bias",
    prefix="transformer.",
)
