"""Latent attention against transformers' DeepSeek-V2 and V3, and its absorbed decoding against its plain form."""

import importlib

import pytest
import torch
import transformers
from torch import Tensor, nn

from moray.model import KVCache, ModelConfig
from moray.model.attention.documents import Documents
from moray.model.attention.latent import LatentAttention
from moray.model.attention.rope import rope_angles
from moray.model.context import Context

TOKENS, WIDTH = 19, 32
LATENT = {"kv_rank": 12, "nope_dim": 8, "rope_dim": 4, "value_dim": 6}
YARN = {"factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.9}


def config_of(
    q_rank: int | None = None, output_bias: bool = False, yarn: bool = False, interleaved: bool = True
) -> ModelConfig:
    attention = {"n_heads": 4, "n_kv_heads": 4, "head_dim": 12, "qk_norm": None, "latent": LATENT | {"q_rank": q_rank}}
    scaling = {"kind": "yarn", "original_max_seq_len": 16, **YARN} if yarn else None
    return ModelConfig.preset(
        "demo-dense",
        n_layers=1,
        d_model=WIDTH,
        max_seq_len=64,
        attention=attention | {"output_bias": output_bias},
        position={"theta": 1e4, "interleaved": interleaved, "scaling": scaling},
    )


def context_of(config: ModelConfig, positions_BT: Tensor, dtype: torch.dtype, cache: KVCache | None = None) -> Context:
    rope = rope_angles(positions_BT, config.rotary_dim, config.position, dtype)
    return Context(rope, Documents(None, torch.ones_like(positions_BT, dtype=torch.bool)), cache)


def randomised(module: nn.Module, std: float) -> nn.Module:
    torch.manual_seed(0)
    for weight in module.parameters():
        nn.init.normal_(weight, mean=float(weight.ndim == 1), std=std)
    return module


def peer_of(config: ModelConfig, version: str) -> tuple[nn.Module, nn.Module]:
    """transformers' attention and RoPE modules for this config."""
    latent, scaling = config.attention.latent, config.position.scaling
    assert latent is not None
    peer_config = getattr(transformers, f"Deepseek{version}Config")(
        hidden_size=WIDTH,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=latent.q_rank,
        kv_lora_rank=latent.kv_rank,
        qk_nope_head_dim=latent.nope_dim,
        qk_rope_head_dim=latent.rope_dim,
        v_head_dim=latent.value_dim,
        rms_norm_eps=1e-3,  # not that of the norms within attention
        rope_theta=1e4,
        rope_scaling={"rope_type": "yarn", "original_max_position_embeddings": 16, **YARN} if scaling else None,
        max_position_embeddings=64,
        attn_implementation="eager",
        **({"rope_interleave": config.position.interleaved} if version == "V3" else {}),
    )
    folder = f"deepseek_{version.lower()}"
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    attention, rope = (getattr(module, f"Deepseek{version}{part}") for part in ("Attention", "RotaryEmbedding"))
    return attention(peer_config, 0), rope(peer_config)


NAMES = {
    "q_proj": "query",
    "q_a_proj": "query_down",
    "q_a_layernorm": "query_norm",
    "q_b_proj": "query_up",
    "kv_a_proj_with_mqa": "kv_down",
    "kv_a_layernorm": "kv_norm",
    "kv_b_proj": "kv_up",
    "o_proj": "output",
}


# transformers 4 leaves DeepSeek-V2's softmax scale alone under YaRN; DeepSeek's own code and transformers 5 do not.
since_5 = pytest.mark.skipif(transformers.__version__ < "5", reason="this transformers ignores mscale_all_dim in V2")


@pytest.mark.parametrize(
    ("version", "q_rank", "yarn", "interleaved"),
    [
        ("V2", None, False, True),
        ("V2", 10, False, True),
        pytest.param("V2", 10, True, True, marks=since_5),
        ("V3", None, False, True),
        ("V3", 10, True, True),
        ("V3", 10, False, False),
    ],
)
def test_module_equals_transformers(version: str, q_rank: int | None, yarn: bool, interleaved: bool) -> None:
    """Outputs and the gradient of every weight, fp32, 1e-5."""
    config = config_of(q_rank=q_rank, yarn=yarn, interleaved=interleaved)
    peer, peer_rope = peer_of(config, version)
    randomised(peer, 0.4)
    ours = LatentAttention(config, 0)
    names = {f"{NAMES[name.split('.')[0]]}.{name.split('.')[1]}": name for name, _ in peer.named_parameters()}
    ours.load_state_dict({own: peer.state_dict()[theirs] for own, theirs in names.items()})

    x, positions = torch.randn(2, TOKENS, WIDTH), torch.arange(TOKENS)[None]
    mask = torch.full((TOKENS, TOKENS), torch.finfo(torch.float32).min).triu(1)[None, None]
    expected = peer(x, position_embeddings=peer_rope(x, positions), attention_mask=mask)[0]
    out = ours(x, context_of(config, positions, torch.float32))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)

    upstream = torch.randn_like(out) / TOKENS
    expected.backward(upstream)
    out.backward(upstream)
    gradients = {name: weight.grad for name, weight in peer.named_parameters()}
    for own, weight in ours.named_parameters():
        torch.testing.assert_close(weight.grad, gradients[names[own]], rtol=1e-5, atol=1e-5, msg=own)


def test_the_definition_word_by_word() -> None:
    """DeepSeek-V2, eqs. 9-19, head by head in float64, without a line of ours but for RoPE's."""
    config = config_of(q_rank=10, output_bias=True)
    module = randomised(LatentAttention(config, 0), 0.3).double()
    weight = dict(module.named_parameters())
    x, positions = torch.randn(1, TOKENS, WIDTH, dtype=torch.float64), torch.arange(TOKENS)[None]
    angle = positions[0][:, None] * 1e4 ** (-torch.arange(0, 4, 2, dtype=torch.float64) / 4)

    def norm(x: Tensor, scale: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale

    def turn(x: Tensor) -> Tensor:
        turned = torch.view_as_complex(x.reshape(TOKENS, 2, 2)) * torch.polar(torch.ones_like(angle), angle)
        return torch.view_as_real(turned).reshape(TOKENS, 4)

    h = x[0]
    c_q = norm(h @ weight["query_down.weight"].T, weight["query_norm.weight"])
    c_kv, k_r = (h @ weight["kv_down.weight"].T).split([12, 4], -1)
    c_kv, k_r = norm(c_kv, weight["kv_norm.weight"]), turn(k_r)
    outputs = []
    for head in range(4):
        q_c, q_r = (c_q @ weight["query_up.weight"][12 * head : 12 * head + 12].T).split([8, 4], -1)
        k_c, v_c = (c_kv @ weight["kv_up.weight"][14 * head : 14 * head + 14].T).split([8, 6], -1)
        scores = (q_c @ k_c.T + turn(q_r) @ k_r.T) / 12**0.5
        hidden = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
        outputs.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v_c)
    expected = torch.cat(outputs, -1) @ weight["output.weight"].T + weight["output.bias"]
    out = module(x, context_of(config, positions, torch.float64))
    torch.testing.assert_close(out[0], expected, rtol=0, atol=1e-12)


def test_softmax_scale_is_multiplied_with_yarns_m_squared() -> None:
    # m(x) = 0.1 x ln(factor) + 1
    m = 0.1 * 0.9 * torch.tensor(4.0).log().item() + 1
    assert LatentAttention(config_of(yarn=True), 0).scoring.scale == pytest.approx(12**-0.5 * m * m, rel=1e-6)
    assert LatentAttention(config_of(), 0).scoring.scale == 12**-0.5


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("pieces", [[1] * TOKENS, [7] + [1] * 12, [4, 3, 1, 8, 3]])
@pytest.mark.parametrize("q_rank", [None, 10])
@torch.no_grad()
def test_absorbed_decoding_equals_the_plain_form(
    q_rank: int | None, pieces: list[int], dtype: torch.dtype, atol: float
) -> None:
    config = config_of(q_rank=q_rank, yarn=True)
    module = randomised(LatentAttention(config, 0), 0.3).to(dtype)
    x, positions = torch.randn(2, TOKENS, WIDTH, dtype=dtype), torch.arange(TOKENS)[None]
    expected = module(x, context_of(config, positions, dtype))
    cache = KVCache(config, 2, TOKENS, module.output.weight)
    start = 0
    for new in pieces:
        part = slice(start, start + new)
        out = module(x[:, part], context_of(config, positions[:, part], dtype, cache))
        torch.testing.assert_close(out, expected[:, part], rtol=0, atol=atol)
        cache.length = start = start + new


@torch.no_grad()
def test_the_cache_holds_kv_rank_plus_rope_dim_numbers_a_token_and_no_keys_are_made_of_them() -> None:
    config = config_of()
    module = randomised(LatentAttention(config, 0), 0.3)
    made: list[int] = []
    module.kv_up.register_forward_hook(lambda module, inputs, output: made.append(inputs[0].shape[1]))
    cache = KVCache(config, 3, 50, module.output.weight)
    for start, new in ((0, 7), (7, 1), (8, 1)):
        positions = torch.arange(start, start + new)[None]
        module(torch.randn(3, new, WIDTH), context_of(config, positions, torch.float32, cache))
        cache.length += new
    assert made == [7]
    assert cache.n_bytes == 3 * 50 * (12 + 4) * 4
