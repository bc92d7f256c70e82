"""minimind-3 and minimind-3-moe against transformers' Qwen3 and Qwen3Moe: an implementation that is not ours."""

import pytest
import torch
import transformers
from torch import Tensor

from model import Decoder, ModelConfig

# Narrow versions of the presets: the same shapes in kind, small enough for CI. Fewer KV heads than query heads,
# a head wider than d_model / n_heads, more experts than are chosen.
NARROW = {"n_layers": 3, "d_model": 96, "n_heads": 6, "n_kv_heads": 2, "head_dim": 24, "d_ff": 160, "vocab_size": 512}


def peer(config: ModelConfig) -> transformers.PreTrainedModel:
    common = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_seq_len,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "attn_implementation": "eager",
    }
    if not config.n_experts:
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**common))
    return transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **common,
            num_experts=config.n_experts,
            num_experts_per_tok=config.top_k,
            moe_intermediate_size=config.d_expert,
            norm_topk_prob=config.normalise_gates,
            decoder_sparse_step=1,
            mlp_only_layers=list(range(config.n_dense_layers)),
        )
    )


def pairs(config: ModelConfig, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Every weight (or gradient) of ours beside the same one of theirs."""
    found = {
        "embedding.weight": theirs["model.embed_tokens.weight"],
        "norm.weight": theirs["model.norm.weight"],
    }
    if not config.tied_embeddings:
        found["head.weight"] = theirs["lm_head.weight"]
    for layer in range(config.n_layers):
        mine, other = f"blocks.{layer}.", f"model.layers.{layer}."
        names = {
            "attention_norm.weight": "input_layernorm.weight",
            "ffn_norm.weight": "post_attention_layernorm.weight",
            "attention.query.weight": "self_attn.q_proj.weight",
            "attention.key.weight": "self_attn.k_proj.weight",
            "attention.value.weight": "self_attn.v_proj.weight",
            "attention.output.weight": "self_attn.o_proj.weight",
            "attention.query_norm.weight": "self_attn.q_norm.weight",
            "attention.key_norm.weight": "self_attn.k_norm.weight",
        }
        if config.is_moe_layer(layer):
            names["ffn.router.linear.weight"] = "mlp.gate.weight"
            gate, up = theirs[other + "mlp.experts.gate_up_proj"].chunk(2, dim=1)
            found |= {mine + "ffn.experts.gate_EFD": gate, mine + "ffn.experts.up_EFD": up}
            found[mine + "ffn.experts.down_EDF"] = theirs[other + "mlp.experts.down_proj"]
        else:
            names |= {f"ffn.{part}.weight": f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
        found |= {mine + a: theirs[other + b] for a, b in names.items()}
    assert found.keys() == ours.keys()
    return {name: (ours[name], found[name]) for name in ours}


CONFIGS = {
    "minimind-3": ModelConfig.preset("minimind-3", **NARROW),
    "minimind-3 untied": ModelConfig.preset("minimind-3", **NARROW, tied_embeddings=False),
    "minimind-3-moe": ModelConfig.preset("minimind-3-moe", **NARROW, d_expert=160),
    "moe top-3 of 8, plain gates, one dense layer": ModelConfig.preset(
        "minimind-3-moe", **NARROW, d_expert=64, n_experts=8, top_k=3, normalise_gates=False, n_dense_layers=1
    ),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_and_every_gradient_equal_transformers(config: ModelConfig) -> None:
    torch.manual_seed(0)
    theirs = peer(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            # Norm weights away from 1, projections large enough that attention and routing are far from uniform.
            parameter.normal_(1.0, 0.2) if parameter.ndim == 1 else parameter.normal_(0.0, 0.15)
    ours = Decoder(config)
    with torch.no_grad():
        for mine, other in pairs(config, dict(ours.named_parameters()), dict(theirs.named_parameters())).values():
            mine.copy_(other)
    tokens = torch.randint(config.vocab_size, (3, 40))
    targets = torch.randint(config.vocab_size, (3, 40))
    targets[0, :7] = -100

    logits = ours(tokens)
    expected = theirs(tokens).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)

    theirs.zero_grad()
    loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), targets.flatten(), reduction="sum")
    loss.backward()
    cross_entropy = ours.loss(tokens, targets).cross_entropy
    cross_entropy.backward()
    torch.testing.assert_close(cross_entropy, loss, rtol=1e-6, atol=0)
    mine = {name: p.grad for name, p in ours.named_parameters()}
    other = {name: p.grad for name, p in theirs.named_parameters()}
    for name, (a, b) in pairs(config, mine, other).items():
        scale = b.abs().max()
        assert scale > 0 or "router" in name, name
        torch.testing.assert_close(a / scale.clamp(min=1), b / scale.clamp(min=1), rtol=0, atol=1e-5, msg=name)


def test_published_parameter_counts() -> None:
    for name, count in {"minimind-3": 63_912_192, "minimind-3-moe": 198_416_640}.items():
        with torch.device("meta"):
            assert sum(p.numel() for p in Decoder(ModelConfig.preset(name)).parameters()) == count
