"""GPT-2, whose shape GPT-3 has too: Radford et al., 2019; https://arxiv.org/abs/2005.14165."""

from moray.model.hf.family import Family
from moray.model.hf.gpt import LEARNED, SCALE, activation, joined, sizes
from moray.model.hf.places import Source
from moray.model.hf.rules import fixed, ours, unused

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
    *sizes(
        n_layers="n_layer",
        n_heads="n_head",
        eps="layer_norm_epsilon",
        d_model="n_embd",
        ffn_width="n_inner",
        max_seq_len="n_positions",
    ),
    LEARNED,
    SCALE,
    ours(attention={"qkv_bias": True, "output_bias": True}, init={"scheme": "megatron"}),
    unused("n_ctx"),  # an old name of n_positions
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
