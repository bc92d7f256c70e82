"""Norms against torch's, transformers' and the papers' formulas in fp64."""

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

from moray.model.config.parts import NormConfig
from moray.model.norm import CRMSNorm, LayerNorm, RMSNorm, build_norm

EPS = 1e-3
KINDS = {"rmsnorm": RMSNorm, "layernorm": LayerNorm, "crmsnorm": CRMSNorm}


def stream(width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Vectors whose means are far from 0."""
    generator = torch.Generator().manual_seed(width)
    return (3 * torch.randn(4, 7, width, generator=generator, dtype=torch.float64) + 2).to(dtype)


def randomise(norm: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return norm


def normalised(x: Tensor, kind: str) -> Tensor:
    """As the papers define them, entry by entry."""
    if kind == "rmsnorm":
        return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
    if kind == "layernorm":
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + EPS).sqrt()
    whole = torch.cat((x, -x.sum(-1, keepdim=True)), -1)
    return normalised(whole, "rmsnorm")[..., :-1]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_its_papers_formula(kind: str, unit_offset: bool, bias: bool) -> None:
    config = NormConfig(kind=kind, eps=EPS, unit_offset=unit_offset, bias=bias)  # type: ignore[arg-type]
    norm, x = randomise(build_norm(24, config).double()), stream(24)
    assert set(dict(norm.named_parameters())) == ({"weight", "bias"} if bias else {"weight"})
    expected = normalised(x, kind) * (norm.weight + unit_offset) + (norm.bias if bias else 0)
    torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_norm_only_normalises(kind: str) -> None:
    x = stream(24)
    for unit_offset in (False, True):
        norm = KINDS[kind](24, EPS, unit_offset=unit_offset, bias=True).double()
        torch.testing.assert_close(norm(x), normalised(x, kind), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_layernorm_equals_torch(bias: bool) -> None:
    ours, theirs, x = LayerNorm(24, EPS, bias=bias), nn.LayerNorm(24, EPS, bias=bias), stream(24, torch.float32)
    theirs.load_state_dict(randomise(ours).state_dict())
    assert torch.equal(ours(x), theirs(x))


def test_unit_offset_equals_gemmas() -> None:
    ours, theirs, x = RMSNorm(24, EPS, unit_offset=True), Gemma2RMSNorm(24, EPS), stream(24, torch.float32)
    theirs.load_state_dict(randomise(ours).state_dict())
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)
    ours, theirs, x = ours.bfloat16(), theirs.bfloat16(), x.bfloat16()
    # One rounding at the end, of numbers that differ in fp32's last places.
    torch.testing.assert_close(ours(x), theirs(x), rtol=2**-7, atol=0)
    assert (ours(x) == theirs(x)).double().mean() > 0.99


@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_bf16_is_normalised_in_fp32(kind: str, unit_offset: bool) -> None:
    """Errors stay those of rounding the result: sums of 5,000 squares kept in bf16 would be off by far more."""
    norm, x = KINDS[kind](5000, EPS, unit_offset=unit_offset).bfloat16(), stream(5000, torch.bfloat16)
    out = norm(x)
    assert out.dtype == torch.bfloat16
    expected = normalised(x.double(), kind)
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-6)


def test_crmsnorm_is_the_layernorm_of_a_vector_with_mean_0_less_one_entry() -> None:
    whole = stream(25)
    whole = whole - whole.mean(-1, keepdim=True)
    compressed = CRMSNorm(24, EPS).double()(whole[..., :-1])
    torch.testing.assert_close(compressed, nn.LayerNorm(25, EPS).double()(whole)[..., :-1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_formula(kind: str) -> None:
    norm = randomise(KINDS[kind](6, EPS, unit_offset=True, bias=True).double())
    x = stream(6)[0].requires_grad_()
    assert torch.autograd.gradcheck(norm, (x,))
