"""GPT-BigCode (SantaCoder, StarCoder): https://arxiv.org/abs/2301.03988, https://arxiv.org/abs/2305.06161."""

from typing import Any

from moray.model.config.architecture import ModelConfig
from moray.model.hf.families.gpt2 import NAMES, SIZES
from moray.model.hf.family import Family, Rule
from moray.model.hf.fields import Fields, refused
from moray.model.hf.gpt import activation, joined, joined_by_head
from moray.model.hf.rules import unused

_C_ATTN = "transformer.h.{layer}.attn.c_attn"


def _read_kv_heads(fields: Fields) -> dict[str, Any]:
    kv_heads = 1 if fields.take("multi_query", True) else fields.take("n_head")
    if fields.take("num_key_value_heads", kv_heads) != kv_heads:
        raise refused("num_key_value_heads", fields.take("num_key_value_heads"), f"multi_query makes it {kv_heads}")
    return {"attention": {"n_kv_heads": kv_heads}}


def _write_kv_heads(config: ModelConfig) -> dict[str, Any]:
    return {"multi_query": config.attention.n_kv_heads == 1}


GPT_BIGCODE = Family(
    model_type="gpt_bigcode",
    architecture="GPTBigCodeForCausalLM",
    rules=(
        *SIZES,
        activation("activation_function", "gelu_pytorch_tanh"),
        Rule(_read_kv_heads, _write_kv_heads),
        # Precision of the same scores, and settings of a runner that transformers no longer has.
        unused("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "inference_runner"),
        unused("validate_runner_input", "pre_allocate_kv_cache", "max_sequence_length", "max_batch_size"),
        unused("pad_key_length", "runner_max_sequence_length"),
    ),
    table=lambda config: (
        NAMES | (joined(config, _C_ATTN) if config.attention.n_kv_heads == 1 else joined_by_head(config, _C_ATTN))
    ),
    ignored=r".*\.attn\.(masked_)?bias|transformer\.bias",
    prefix="transformer.",
)
