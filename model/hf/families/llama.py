"""Llama 2, 3 and 3.1: https://arxiv.org/abs/2307.09288, https://arxiv.org/abs/2407.21783."""

from moray.model.hf.family import Family
from moray.model.hf.names import DENSE
from moray.model.hf.rope import rope
from moray.model.hf.rules import ATTENTION_BIAS, SILU, decoder, dividing_heads, same, unused

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    rules=(
        *decoder(eps=1e-6),
        dividing_heads(),
        SILU,
        rope(),
        ATTENTION_BIAS,
        same("intermediate_size", "ffn.width"),
        same("mlp_bias", "ffn.bias", False),
        unused("is_llama_config"),  # by which nanotron (SmolLM2) knows its own files
    ),
    table=lambda config: DENSE,
)
