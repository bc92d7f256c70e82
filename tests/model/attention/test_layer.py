"""Attention modules against transformers', and packed rows against their documents, one by one."""

import importlib
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from moray.model import Decoder, ModelConfig, initialise
from moray.model.attention.documents import Documents
from moray.model.attention.latent import LatentAttention
from moray.model.attention.layer import Attention, build_attention
from moray.model.attention.rope import rope_angles
from moray.model.attention.sdpa import sees
from moray.model.context import Context

TOKENS, WIDTH, HEADS, HEAD_DIM = 13, 32, 4, 10
NARROW = {"n_layers": 2, "d_model": WIDTH, "vocab_size": 50, "ffn": {"width": 48}, "init": {"std": 0.3}}
GROUPED = {"n_heads": HEADS, "n_kv_heads": 2, "head_dim": 8}
LATENT = {"kv_rank": 12, "nope_dim": 6, "rope_dim": 4, "value_dim": 8}
LATENT_FIELDS = {"n_heads": 4, "n_kv_heads": 4, "head_dim": 10, "qk_norm": None, "latent": LATENT}
MOE = {"n_experts": 8, "top_k": 2, "expert_width": 16}
# Wide weights, so that every token that is seen is noticed.
CONFIGS = {
    "dense": ModelConfig.preset("demo-dense", **NARROW, attention=GROUPED),
    "moe": ModelConfig.preset("demo-moe", **NARROW, attention=GROUPED, moe=MOE),
    "window": ModelConfig.preset(
        "demo-dense", **NARROW, attention=GROUPED | {"window": 4, "pattern": ("local", "global")}
    ),
    "softcap": ModelConfig.preset("demo-dense", **NARROW, attention=GROUPED | {"softcap": 2.0, "window": 5}),
    "latent": ModelConfig.preset("demo-dense", **NARROW, attention=LATENT_FIELDS),
}
LENGTHS = [[5, 9, 2], [16], [1, 1, 14]]


def decoder_of(name: str) -> Decoder:
    decoder = Decoder(CONFIGS[name]).double()
    initialise(decoder, seed=1)
    return decoder


def packed(lengths: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Random tokens, positions that restart with each document, and document ids."""
    width = sum(lengths[0])
    tokens = torch.randint(50, (len(lengths), width), generator=torch.Generator().manual_seed(2))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    documents = torch.stack([torch.cat([torch.full((n,), i) for i, n in enumerate(row)]) for row in lengths])
    return tokens, positions, documents


@pytest.mark.parametrize("name", CONFIGS)
def test_a_packed_row_equals_each_document_alone(name: str) -> None:
    decoder = decoder_of(name)
    tokens, positions, documents = packed(LENGTHS)
    logits = decoder(tokens, positions, documents)
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            part = slice(start, start + length)
            alone = decoder(tokens[row : row + 1, part])[0]
            torch.testing.assert_close(logits[row, part], alone, rtol=0, atol=1e-11)
            start += length


@pytest.mark.parametrize("name", CONFIGS)
def test_a_document_changes_no_other(name: str) -> None:
    decoder = decoder_of(name)
    tokens, positions, documents = packed([[5, 9, 2], [4, 6, 6]])
    before = decoder(tokens, positions, documents)
    changed = tokens.clone()
    changed[0, 5:14] = (tokens[0, 5:14] + 1) % 50  # the second document of the first row
    after = decoder(changed, positions, documents)
    same = (before - after).abs().amax(-1) < 1e-12
    expected = torch.ones(2, 16, dtype=torch.bool)
    expected[0, 5:14] = False
    assert torch.equal(same, expected)


def test_no_token_sees_what_follows() -> None:
    decoder = decoder_of("dense")
    tokens, _, _ = packed([[16]])
    changed = tokens.clone()
    changed[0, 9] = (tokens[0, 9] + 1) % 50
    same = (decoder(tokens) - decoder(changed))[0].abs().amax(-1) < 1e-12
    assert same.tolist() == [True] * 9 + [False] * 7


def test_without_document_ids_a_row_is_one_document() -> None:
    decoder = decoder_of("dense")
    tokens, positions, documents = packed([[16], [16]])
    torch.testing.assert_close(decoder(tokens), decoder(tokens, positions, documents), rtol=0, atol=0)


def test_the_pattern_says_which_layers_are_local() -> None:
    attention = GROUPED | {"window": 4, "pattern": ("local", "local", "global")}
    config = ModelConfig.preset("demo-dense", **NARROW, attention=attention)
    windows = [build_attention(config, layer).scoring.window for layer in range(6)]
    assert windows == [4, 4, None, 4, 4, None]


def test_heads_are_what_the_weights_say_and_kv_heads_can_be_picked() -> None:
    """What tensor parallelism does: query heads 2 and 3 alone, of which both read key head 1 of the two held."""
    torch.manual_seed(0)
    config = CONFIGS["dense"]
    whole, part = Attention(config, 0).double(), Attention(config, 0).double()
    for parameter in whole.parameters():
        nn.init.normal_(parameter, std=0.3)
    part.load_state_dict(whole.state_dict())
    part.query.weight = nn.Parameter(whole.query.weight[16:])
    part.output.weight = nn.Parameter(whole.output.weight[:, 16:])
    x, context = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64), context_of(config, torch.float64)
    seen: list[Tensor] = []
    whole.output.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    whole(x, context)
    for picked in ([1], [1, 1]):
        part.kv_heads = picked
        expected = seen[0][..., 16:] @ part.output.weight.T
        torch.testing.assert_close(part(x, context), expected, rtol=0, atol=1e-12)


def context_of(config: ModelConfig, dtype: torch.dtype) -> Context:
    positions = torch.arange(TOKENS)[None]
    rope = rope_angles(positions, config.rotary_dim, config.position, dtype) if config.position.kind == "rope" else None
    return Context(rope, Documents(None, torch.ones(1, TOKENS, dtype=torch.bool)))


COMMON = {
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "head_dim": HEAD_DIM,
    "rope_theta": 1e4,
    "attn_implementation": "eager",
}
BARE = {"qk_norm": None, "head_dim": HEAD_DIM, "n_heads": HEADS}
PEERS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    # family: (transformers' folder, attention class, fields of its config, our attention)
    "llama": ("llama", "LlamaAttention", {"num_key_value_heads": 2}, {"n_kv_heads": 2}),
    "multi-head with biases": (
        "llama",
        "LlamaAttention",
        {"num_key_value_heads": 4, "attention_bias": True},
        {"n_kv_heads": 4, "qkv_bias": True, "output_bias": True},
    ),
    "multi-query": ("llama", "LlamaAttention", {"num_key_value_heads": 1}, {"n_kv_heads": 1}),
    "qwen2": (
        "qwen2",
        "Qwen2Attention",
        {"num_key_value_heads": 2, "head_dim": 8},
        {"n_kv_heads": 2, "qkv_bias": True, "head_dim": 8},
    ),
    "qwen3": ("qwen3", "Qwen3Attention", {"num_key_value_heads": 2}, {"n_kv_heads": 2, "qk_norm": "head"}),
    "olmoe": (
        "olmoe",
        "OlmoeAttention",
        {"num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-6},
        {"n_kv_heads": 2, "qk_norm": "full", "head_dim": 8},
    ),
    "gemma2": (
        "gemma2",
        "Gemma2Attention",
        {
            "num_key_value_heads": 2,
            "query_pre_attn_scalar": 3,
            "attn_logit_softcapping": 2.0,
            "sliding_window": 4,
            "layer_types": ["sliding_attention"],
            "num_hidden_layers": 1,
        },
        {"n_kv_heads": 2, "scale": 3**-0.5, "softcap": 2.0, "window": 4},
    ),
}


@pytest.mark.parametrize("family", PEERS)
def test_module_equals_transformers(family: str) -> None:
    """Outputs and the gradient of every weight, fp32, 1e-5."""
    torch.manual_seed(0)
    folder, name, fields, attention = PEERS[family]
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    prefix = name.removesuffix("Attention")
    peer_config = getattr(transformers, f"{prefix}Config")(**COMMON | fields)
    peer = getattr(module, name)(peer_config, 0)
    for weight in peer.parameters():
        nn.init.normal_(weight, mean=float(weight.ndim == 1), std=0.4)
    config = ModelConfig.preset(
        "demo-dense", n_layers=1, d_model=WIDTH, attention=BARE | attention, position={"theta": 1e4}
    )
    ours = build_attention(config, 0)
    renamed = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "output"}
    renamed |= {"q_norm": "query_norm", "k_norm": "key_norm"}
    names = {f"{renamed[name.split('.')[0]]}.{name.split('.')[1]}": name for name, _ in peer.named_parameters()}
    ours.load_state_dict({own: peer.state_dict()[theirs] for own, theirs in names.items()})

    x = torch.randn(2, TOKENS, WIDTH)
    visible = sees(torch.arange(TOKENS), torch.arange(TOKENS), config.attention.window)
    rope = getattr(module, f"{prefix}RotaryEmbedding")(peer_config)(x, torch.arange(TOKENS)[None])
    mask = torch.zeros(TOKENS, TOKENS).masked_fill(~visible, torch.finfo(torch.float32).min)
    expected = peer(x, position_embeddings=rope, attention_mask=mask[None, None])[0]
    out = ours(x, context_of(config, torch.float32))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)

    upstream = torch.randn_like(out) / TOKENS
    expected.backward(upstream)
    out.backward(upstream)
    gradients = {name: weight.grad for name, weight in peer.named_parameters()}
    for own, weight in ours.named_parameters():
        torch.testing.assert_close(weight.grad, gradients[names[own]], rtol=1e-5, atol=1e-5, msg=own)


def test_without_positions_or_scale_it_is_gpt_neos() -> None:
    """GPT-Neo's local attention: no RoPE, scores not scaled, a bias on the output alone."""
    from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention

    torch.manual_seed(0)
    peer_config = transformers.GPTNeoConfig(
        hidden_size=WIDTH, num_heads=HEADS, window_size=4, attention_dropout=0.0, resid_dropout=0.0
    )
    peer = GPTNeoSelfAttention(peer_config, "local", 0)
    for weight in peer.parameters():
        nn.init.normal_(weight, std=0.3)
    attention = {"n_kv_heads": 4, "head_dim": 8, "qk_norm": None, "scale": 1.0, "window": 4, "output_bias": True}
    config = ModelConfig.preset(
        "demo-dense",
        n_layers=1,
        d_model=WIDTH,
        attention=BARE | attention,
        position={"kind": "learned"},
        max_seq_len=TOKENS,
    )
    ours = build_attention(config, 0)
    renamed = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "output"}
    state = {f"{renamed[name.split('.')[0]]}.{name.split('.')[1]}": weight for name, weight in peer.named_parameters()}
    ours.load_state_dict(state)
    x = torch.randn(2, TOKENS, WIDTH)
    torch.testing.assert_close(ours(x, context_of(config, torch.float32)), peer(x)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["Mistral", "Gemma2", "GPTNeo"])
@torch.no_grad()
def test_a_window_of_w_is_the_token_and_the_w_minus_1_before_it(family: str) -> None:
    """Which tokens a whole transformers model lets a token see, found by changing one at a time; ours the same."""
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 50, "attn_implementation": "eager"}
    grouped = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    fields = {
        "Mistral": grouped | {"sliding_window": 4},
        "Gemma2": grouped | {"sliding_window": 4},
        "GPTNeo": {"num_layers": 1, "num_heads": 2, "attention_types": [[["local"], 1]], "window_size": 4},
    }[family]
    peer = getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(**small | fields)
    ).eval()
    for weight in peer.parameters():
        weight.normal_(std=0.5)
    tokens = torch.randint(50, (1, TOKENS)).repeat(TOKENS, 1)
    # Row j of the batch is the sequence with token j changed.
    changed = (tokens + torch.eye(TOKENS, dtype=torch.long)) % 50
    noticed = (peer(changed).logits - peer(tokens).logits).abs().amax(-1).T > 1e-6
    assert torch.equal(noticed, sees(torch.arange(TOKENS), torch.arange(TOKENS), 4))

    attention = GROUPED | {"window": 4}
    decoder = Decoder(ModelConfig.preset("demo-dense", **NARROW | {"n_layers": 1}, attention=attention)).double()
    initialise(decoder, seed=1)
    ours = (decoder(changed) - decoder(tokens)).abs().amax(-1).T > 1e-12
    assert torch.equal(ours, noticed)


def test_latent_attention_is_built_where_the_config_says_so() -> None:
    assert isinstance(build_attention(CONFIGS["latent"], 0), LatentAttention)
    assert isinstance(build_attention(CONFIGS["dense"], 0), Attention)
