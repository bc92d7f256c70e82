"""Adapters written for peft: in a transformers model of the base they compute what they compute here."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from law1 import drawn_adapter
from torch import Tensor

from moray import UserError
from moray.model.hf import load_pretrained
from moray.model.hf.adapters import write_adapters
from moray.model.hf.families import family_of
from moray.model.lora import LoRA, add_adapters, targets_in
from moray.model.tensors import Box

peft = pytest.importorskip("peft")
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
GPT_NEO = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
LORA = LoRA(4, 6.0, ("attention", "dense"))


def made(config: Any, folder: Path) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.save_pretrained(folder)
    return model


def written(base: Path, lora: LoRA, out: Path) -> Any:
    """Our decoder with adapters that are not zero, which are in the folder `out`."""
    decoder = load_pretrained(base)
    add_adapters(decoder, lora)
    with torch.no_grad():
        for name, weight in decoder.named_parameters():
            if weight.requires_grad:
                weight.copy_(drawn_adapter(name, weight.shape))
    tensors = decoder.state_dict()

    def read(name: str, box: Box) -> Tensor:
        return tensors[name][box]

    out.mkdir()
    table = family_of(base).table(decoder.config)
    write_adapters(out, decoder.config, lora, table, read, str(base), torch.float32)
    return decoder


@pytest.mark.parametrize(
    "config",
    [
        transformers.LlamaConfig(**SIZES),
        transformers.MistralConfig(**SIZES, sliding_window=8),
        transformers.Qwen2Config(**SIZES),
        transformers.Qwen3Config(**SIZES),
        transformers.Gemma2Config(**SIZES, query_pre_attn_scalar=8),
        transformers.GPTNeoConfig(vocab_size=64, max_position_embeddings=64, initializer_range=0.2, **GPT_NEO),
    ],
    ids=lambda config: config.model_type,
)
@torch.no_grad()
def test_peft_computes_the_same(config: Any, tmp_path: Path) -> None:
    theirs, tokens = made(config, tmp_path / "base"), torch.randint(64, (2, 20))
    before = theirs(tokens).logits
    decoder = written(tmp_path / "base", LORA, tmp_path / "adapters")
    logits = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapters").eval()(tokens).logits
    assert (logits - before).abs().max() > 0.1
    torch.testing.assert_close(decoder(tokens), logits, rtol=1e-4, atol=1e-4)
    said = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(tmp_path / "base")
    assert (
        len(said["target_modules"])
        == len({*said["target_modules"]})
        == sum("lora_a" in n for n in decoder.state_dict())
    )


@torch.no_grad()
def test_layers_without_adapters_get_none(tmp_path: Path) -> None:
    """A dense first layer, whose modules have the names that the shared experts' end with."""
    config = transformers.DeepseekV3Config(
        **{**SIZES, "num_key_value_heads": 4, "head_dim": None}, q_lora_rank=16, kv_lora_rank=8, qk_nope_head_dim=8,
        qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=16,
        n_shared_experts=1, first_k_dense_replace=1, n_group=2, topk_group=1,
    )  # fmt: skip
    made(config, tmp_path / "base")
    decoder = written(tmp_path / "base", LoRA(8, 8.0, ("shared",)), tmp_path / "adapters")
    assert targets_in(decoder.config) == ("attention", "dense", "experts", "shared")
    said = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    kinds = ("gate_proj", "up_proj", "down_proj")
    assert said["target_modules"] == [f"model.layers.1.mlp.shared_experts.{kind}" for kind in kinds]
    with pytest.raises(UserError, match="adapters an expert, for which peft has no module"):
        written(tmp_path / "base", LoRA(8, 8.0, ("shared", "experts")), tmp_path / "others")


def test_a_matrix_that_is_a_part_of_theirs_is_refused(tmp_path: Path) -> None:
    config = transformers.GPTNeoXConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    made(config, tmp_path / "base")
    with pytest.raises(UserError, match=r"attention.query.weight is a part of .*query_key_value.weight"):
        written(tmp_path / "base", LORA, tmp_path / "adapters")
