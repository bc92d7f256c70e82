"""Pre-LN, Pre-RMSNorm and Pre-CRMSNorm Transformers are one function (Jiang et al., 2023): their logits agree."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moray.model import Decoder, KVCache, ModelConfig, initialise
from moray.model.norm import CRMSNorm, LayerNorm, RMSNorm
from moray.model.surgery.norm_equivalence import to_pre_crmsnorm, to_pre_rmsnorm

D, V = 24, 40
NARROW: dict[str, Any] = {
    "n_layers": 3,
    "d_model": D,
    "vocab_size": V,
    "max_seq_len": 16,
    "attention": {"n_heads": 4, "n_kv_heads": 2, "head_dim": 8},
    "ffn": {"width": 40, "activation": "gelu", "gated": False},
    "norm": {"kind": "layernorm", "bias": True, "eps": 1e-3},
    "init": {"std": 0.3},
}
BASE = ModelConfig(**NARROW)
CONFIGS = {
    "tied, rope": BASE,
    "gpt-2": BASE.but(
        position={"kind": "learned"},
        attention={"qkv_bias": True, "output_bias": True},
        ffn={"bias": True},
    ),
    "gpt-neox": BASE.but(
        residual="parallel",
        position={"rotary_dim": 4},
        attention={"n_kv_heads": 4, "qkv_bias": True, "output_bias": True},
        ffn={"bias": True},
        tied_embeddings=False,
    ),
    "no biases, gated, scaled, capped": BASE.but(
        norm={"bias": False}, ffn={"gated": True, "activation": "silu"}, embedding_scale=3.0, final_softcap=5.0
    ),
    "unit offset, untied head with bias, qk-norm, convolution": BASE.but(
        norm={"unit_offset": True},
        attention={"qk_norm": "head"},
        ffn={"gated": True, "conv_width": 3},
        tied_embeddings=False,
        head_bias=True,
    ),
}
TOKENS = torch.randint(V, (2, 13), generator=torch.Generator().manual_seed(0))
Converter = Callable[[Decoder], Decoder]


def decoder_of(config: ModelConfig, dtype: torch.dtype) -> Decoder:
    """Every weight and bias random, norms' weights about 1, and a stream whose mean is far from 0."""
    decoder = Decoder(config).to(dtype).eval()
    initialise(decoder, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.ndim == 1:
                parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
        decoder.embedding.weight += 0.5
    return decoder


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("convert", [to_pre_rmsnorm, to_pre_crmsnorm])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_agree(config: ModelConfig, convert: Converter, dtype: torch.dtype, tolerance: float) -> None:
    original = decoder_of(config, dtype)
    before = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    converted = convert(original)
    with torch.no_grad():
        expected, found = original(TOKENS), converted(TOKENS)
    assert found.dtype == dtype
    # Relative to the largest logit: rounding errors are.
    scale = expected.abs().max().clamp(min=1)
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=tolerance)
    assert all(torch.equal(tensor, before[name]) for name, tensor in original.state_dict().items())


@pytest.mark.parametrize("convert", [to_pre_rmsnorm, to_pre_crmsnorm])
@pytest.mark.parametrize("name", ["tied, rope", "gpt-2", "gpt-neox"])
def test_decoding_with_a_cache_agrees(name: str, convert: Converter) -> None:
    original = decoder_of(CONFIGS[name], torch.float64)
    converted = convert(original)
    cache = KVCache(converted.config, 2, 16, converted.embedding.weight)
    with torch.no_grad():
        pieces = [converted(TOKENS[:, :9], cache=cache)]
        pieces += [converted(TOKENS[:, [i]], cache=cache) for i in range(9, 13)]
        torch.testing.assert_close(torch.cat(pieces, 1), original(TOKENS), rtol=0, atol=1e-10)


@pytest.mark.parametrize("convert", [to_pre_rmsnorm, to_pre_crmsnorm])
def test_the_stream_has_mean_0_and_no_layernorm_is_left(convert: Converter) -> None:
    converted = convert(decoder_of(CONFIGS["gpt-2"], torch.float64))
    kinds = {type(module) for module in converted.modules() if isinstance(module, LayerNorm | RMSNorm | CRMSNorm)}
    assert kinds == {RMSNorm if convert is to_pre_rmsnorm else CRMSNorm}
    streams: list[torch.Tensor] = []
    for block in converted.blocks:
        block.register_forward_hook(lambda _, args, out: streams.append(out[0]))
    with torch.no_grad():
        converted(TOKENS)
    for x_BTD in streams:
        if convert is to_pre_rmsnorm:
            assert x_BTD.mean(-1).abs().max() < 1e-12
        else:
            assert x_BTD.shape[-1] == D - 1


def test_rmsnorm_alone_in_layernorms_place_is_another_function() -> None:
    """What the recentring is for: with the same weights and no more, the logits are far off."""
    original = decoder_of(BASE, torch.float64)
    swapped = Decoder(BASE.but(norm={"kind": "rmsnorm"})).double().eval()
    swapped.load_state_dict(original.state_dict())
    assert (swapped(TOKENS) - original(TOKENS)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": {"kind": "rmsnorm"}}, r"model\.norm\.kind=rmsnorm .* must be layernorm"),
        ({"norm": {"placement": "post"}}, r"model\.norm\.placement=post .* must be pre"),
        ({"norm": {"placement": "sandwich"}}, r"model\.norm\.placement=sandwich .* must be pre"),
        ({"moe": {"n_experts": 4, "expert_width": 16}}, r"model\.moe=.* must be None"),
    ],
    ids=["rmsnorm", "post", "sandwich", "moe"],
)
@pytest.mark.parametrize("convert", [to_pre_rmsnorm, to_pre_crmsnorm])
def test_what_cannot_be_converted_is_refused(convert: Converter, changes: dict[str, Any], message: str) -> None:
    with torch.device("meta"):
        decoder = Decoder(BASE.but(**changes))
    with pytest.raises(ValueError, match=message):
        convert(decoder)
