"""Files as they lie on the hub: names without a prefix, buffers of old versions, layers that predict further tokens."""

from pathlib import Path

import pytest
import torch
import transformers
from hf_parity import randomise
from safetensors.torch import load_file, save_file
from torch import Tensor

from moray.model.hf import load_pretrained

FILE = "model.safetensors"
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
GPT2 = transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=32, **NO_TOKENS)
NEOX = transformers.GPTNeoXConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=32,
    **NO_TOKENS,
)
V3 = transformers.DeepseekV3Config(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    kv_lora_rank=8,
    q_lora_rank=None,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    max_position_embeddings=32,
    **NO_TOKENS,
)


def saved(config: transformers.PretrainedConfig, folder: Path) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    randomise(theirs, 0.1)
    theirs.save_pretrained(folder)
    return theirs


def change(folder: Path, **tensors: Tensor | None) -> None:
    """Adds tensors to the file, or removes those that are None; `/` stands for a dot."""
    held = load_file(folder / FILE)
    for name, tensor in tensors.items():
        held.pop(name.replace("/", "."), None)
        if tensor is not None:
            held[name.replace("/", ".")] = tensor
    save_file(held, folder / FILE, {"format": "pt"})


def assert_same(folder: Path, theirs: transformers.PreTrainedModel) -> None:
    tokens_BT = torch.randint(96, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(load_pretrained(folder)(tokens_BT), theirs(tokens_BT).logits, rtol=1e-5, atol=1e-5)


def test_gpt2_without_its_head_leaves_out_the_prefix(tmp_path: Path) -> None:
    theirs = saved(GPT2, tmp_path / "whole")
    theirs.transformer.save_pretrained(tmp_path / "bare")
    change(tmp_path / "bare", **{"h/0/attn/bias": torch.ones(1, 1, 32, 32), "h/0/attn/masked_bias": torch.tensor(-1e4)})
    assert "wte.weight" in load_file(tmp_path / "bare" / FILE)
    assert_same(tmp_path / "bare", theirs)


def test_buffers_of_old_versions_are_passed_over(tmp_path: Path) -> None:
    theirs = saved(NEOX, tmp_path)
    layer = "gpt_neox/layers/1/attention/"
    buffers = {
        "bias": torch.ones(1, 1, 32, 32),
        "masked_bias": torch.tensor(-1e9),
        "rotary_emb/inv_freq": torch.ones(2),
    }
    change(tmp_path, **{layer + name: buffer for name, buffer in buffers.items()})
    assert_same(tmp_path, theirs)


def test_the_layer_that_predicts_further_tokens_is_passed_over(tmp_path: Path) -> None:
    theirs = saved(V3, tmp_path)
    further = {
        "embed_tokens/weight": torch.ones(96, 32),
        "enorm/weight": torch.ones(32),
        "hnorm/weight": torch.ones(32),
        "eh_proj/weight": torch.ones(32, 64),
        "shared_head/head/weight": torch.ones(96, 32),
        "input_layernorm/weight": torch.ones(32),
        "mlp/gate/e_score_correction_bias": torch.ones(4),
    }
    change(tmp_path, **{"model/layers/2/" + name: tensor for name, tensor in further.items()})
    assert_same(tmp_path, theirs)
    change(tmp_path, **{"model/layers/3/enorm/weight": torch.ones(32)})
    with pytest.raises(ValueError, match=r"model\.layers\.3\.enorm\.weight is unknown"):
        load_pretrained(tmp_path)


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    saved(GPT2, tmp_path)
    change(
        tmp_path,
        **{
            "transformer/h/0/attn/c_attn/weight": torch.ones(96, 32),
            "transformer/h/1/mlp/c_proj/bias": None,
            "transformer/h/1/crossattention/c_attn/weight": torch.ones(32, 64),
        },
    )
    with pytest.raises(ValueError, match=r"config\.json describes other weights") as error:
        load_pretrained(tmp_path)
    text = str(error.value)
    assert "transformer.h.0.attn.c_attn.weight is [96, 32] and must be [32, 96]" in text
    assert "transformer.h.1.mlp.c_proj.bias is missing" in text
    assert "transformer.h.1.crossattention.c_attn.weight is unknown" in text


def test_a_tied_head_that_differs_is_refused(tmp_path: Path) -> None:
    saved(GPT2, tmp_path)
    change(tmp_path, **{"lm_head/weight": torch.zeros(96, 32)})
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from the embedding"):
        load_pretrained(tmp_path)
