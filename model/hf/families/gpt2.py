"""GPT-2, whose shape GPT-3 has too: Radford et al., 2019; https://arxiv.org/abs/2005.14165."""

from model.hf.family import Family
from model.hf.gpt import LAYERNORM, LEARNED, PLAIN_FFN, SCALE, activation, heads, joined, width
from model.hf.places import Source
from model.hf.rules import fixed, ours, same, unused

_OURS, _THEIRS = "blocks.{layer}.", "transformer.h.{layer}."

NAMES: dict[str, str | Source] = {
    "embedding": "transformer.wte",
    "position_embedding": "transformer.wpe",
    "norm": "transformer.ln_f",
    "head": "lm_head",
    _OURS + "attention_norm": _THEIRS + "ln_1",
    _OURS + "ffn_norm": _THEIRS + "ln_2",
    _OURS + "attention.output": _THEIRS + "attn.c_proj",
    _OURS + "ffn.up": _THEIRS + "mlp.c_fc",
    _OURS + "ffn.down": _THEIRS + "mlp.c_proj",
}

SIZES = (
    same("vocab_size", "vocab_size"),
    same("n_embd", "d_model"),
    same("n_layer", "n_layers"),
    same("n_positions", "max_seq_len"),
    same("layer_norm_epsilon", "norm.eps", 1e-5),
    same("initializer_range", "init.std", 0.02),
    same("tie_word_embeddings", "tied_embeddings", True),
    heads("n_head", "n_embd"),
    width("n_inner", "n_embd"),
    LAYERNORM,
    PLAIN_FFN,
    LEARNED,
    SCALE,
    ours(attention={"qkv_bias": True, "output_bias": True}, init={"scheme": "megatron"}),
    # An old name of n_positions, and what models with other heads than the language model's have.
    unused("n_ctx", "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels"),
    unused("summary_first_dropout"),
)

_CONV1D = ("attention.output", "ffn.up", "ffn.down")

GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    rules=(
        *SIZES,
        activation("activation_function", "gelu_new"),
        fixed("scale_attn_by_inverse_layer_idx", False),
        unused("reorder_and_upcast_attn"),  # the same scores, in fp32 where the rest is not
    ),
    table=lambda config: {
        **NAMES,
        **{_OURS + name: Source(str(NAMES[_OURS + name]), transposed=True) for name in _CONV1D},
        **joined(config, _THEIRS + "attn.c_attn", transposed=True),
    },
    ignored=r".*\.attn\.(masked_)?bias",
    prefix="transformer.",
)
