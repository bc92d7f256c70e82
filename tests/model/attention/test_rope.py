"""RoPE against its definition, where a pair of channels is a complex number, and against transformers."""

import cmath
import math
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV3Config, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as deepseek_v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek_v3

from moray.model.attention.rope import rope_angles, rotate, yarn_scale
from moray.model.config.parts import PositionConfig, RopeScaling

DEEPSEEK = {"kind": "yarn", "factor": 40.0, "original_max_seq_len": 4096, "mscale": 0.707, "mscale_all_dim": 0.707}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"kind": "linear", "factor": 4.0},
    "llama3.1": {"kind": "llama3", "factor": 8.0, "original_max_seq_len": 8192},
    "llama3.2": {
        "kind": "llama3",
        "factor": 32.0,
        "original_max_seq_len": 8192,
        "low_freq_factor": 2.0,
        "high_freq_factor": 9.0,
    },
    "yarn": {"kind": "yarn", "factor": 16.0, "original_max_seq_len": 4096},
    "yarn, betas": {"kind": "yarn", "factor": 3.5, "original_max_seq_len": 512, "beta_fast": 20.0, "beta_slow": 2.5},
    "yarn, ramp not rounded": {"kind": "yarn", "factor": 32.0, "original_max_seq_len": 4096, "truncate": False},
    "yarn, ramp of no length": {
        "kind": "yarn",
        "factor": 8.0,
        "original_max_seq_len": 64,
        "beta_fast": 11.0,
        "beta_slow": 10.2,
    },
    "yarn, attention factor": {"kind": "yarn", "factor": 4.0, "original_max_seq_len": 1024, "attention_factor": 1.7},
    "deepseek-v2": DEEPSEEK,
    "deepseek, two mscales": DEEPSEEK | {"mscale": 1.3, "mscale_all_dim": 0.6},
}
"""Some of them with every field that the kind reads away from its default."""


def pairs_of(x: Tensor, interleaved: bool) -> Tensor:
    """The channels of the last dimension as complex numbers."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)) if interleaved else torch.stack(x.chunk(2, -1), -1))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [10, 4])
def test_rotation_is_a_complex_product_in_float64(interleaved: bool, rotary_dim: int) -> None:
    torch.manual_seed(0)
    position = PositionConfig(theta=1e4, interleaved=interleaved)
    positions = torch.tensor([[0, 1, 2, 700], [0, 1, 0, 31999]])
    x = torch.randn(2, 4, 3, 10, dtype=torch.float64)
    rotated = rotate(x, *rope_angles(positions, rotary_dim, position, torch.float64), interleaved)
    assert torch.equal(rotated[..., rotary_dim:], x[..., rotary_dim:])
    before, after = (pairs_of(y[..., :rotary_dim], interleaved) for y in (x, rotated))
    truth = torch.empty_like(before)
    for row, place, head, i in torch.cartesian_prod(*map(torch.arange, (2, 4, 3, rotary_dim // 2))).tolist():
        angle = positions[row, place].item() * 1e4 ** (-2 * i / rotary_dim)
        truth[row, place, head, i] = before[row, place, head, i].item() * cmath.exp(1j * angle)
    torch.testing.assert_close(after, truth, rtol=0, atol=1e-11)


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_the_distance_alone(interleaved: bool) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    position = PositionConfig(interleaved=interleaved)

    def score(at_q: int, at_k: int) -> float:
        angles_q, angles_k = (rope_angles(torch.tensor([[at]]), 12, position, torch.float64) for at in (at_q, at_k))
        return (rotate(q, *angles_q, interleaved) * rotate(k, *angles_k, interleaved)).sum().item()

    assert score(7, 3) == pytest.approx(score(1007, 1003), abs=1e-12)
    assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-3)


def test_in_bf16_distant_positions_stay_apart() -> None:
    # 1000 and 1001 are the same number in bf16: the angles must be formed before the rounding.
    cos, sin = rope_angles(torch.tensor([[1000, 1001]]), 8, PositionConfig(theta=1e4), torch.bfloat16)
    assert cos.dtype == sin.dtype == torch.bfloat16
    expected = torch.tensor([1000.0, 1001.0], dtype=torch.float64).cos()
    torch.testing.assert_close(cos[0, :, 0, 0].double(), expected, rtol=0, atol=2**-8)


def frequencies_and_factor(position: PositionConfig, rotary_dim: int) -> tuple[Tensor, float]:
    """What cosine and sine of positions 0 and 1e-3 say: angles there are below pi, and 0 has cosine 1."""
    cos, sin = rope_angles(torch.tensor([[0.0, 1e-3]], dtype=torch.float64), rotary_dim, position, torch.float64)
    angles = torch.atan2(sin[0, 1, 0], cos[0, 1, 0])
    return angles[: rotary_dim // 2] / 1e-3, cos[0, 0, 0, 0].item()


def settings_of(position: PositionConfig) -> dict[str, Any]:
    """The position as a transformers config has it: 4.57 reads rope_theta and rope_scaling, 5.x rope_parameters."""
    assert position.scaling
    names = {"kind": "rope_type", "original_max_seq_len": "original_max_position_embeddings"}
    return as_settings(
        position.theta, {names.get(name, name): value for name, value in position.scaling if value is not None}
    )


def as_settings(theta: float, scaling: dict[str, Any]) -> dict[str, Any]:
    if int(transformers.__version__.split(".")[0]) >= 5:
        return {"rope_parameters": scaling | {"rope_theta": theta}}
    return {"rope_theta": theta, "rope_scaling": scaling}


def theirs(position: PositionConfig, rotary_dim: int) -> tuple[Tensor, float]:
    """transformers' frequencies (fp32) and factor of cosine and sine."""
    assert position.scaling
    config = LlamaConfig(
        hidden_size=4 * rotary_dim, num_attention_heads=4, max_position_embeddings=131072, **settings_of(position)
    )
    return ROPE_INIT_FUNCTIONS[position.scaling.kind](config, torch.device("cpu"))


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize(("rotary_dim", "theta"), [(64, 1e4), (128, 5e5)])
def test_scaled_frequencies_are_those_of_transformers(name: str, rotary_dim: int, theta: float) -> None:
    position = PositionConfig(theta=theta, scaling=SCALINGS[name])
    ours, our_factor = frequencies_and_factor(position, rotary_dim)
    truth, factor = theirs(position, rotary_dim)
    plain, _ = frequencies_and_factor(PositionConfig(theta=theta), rotary_dim)
    torch.testing.assert_close(ours, truth.double(), rtol=3e-6, atol=0)
    assert our_factor == pytest.approx(factor, rel=1e-12)
    assert (ours / plain).min() < 0.99, "a scaling that does nothing would prove little"


def test_ntk_is_transformers_dynamic_one_where_the_sequence_is_that_many_times_longer() -> None:
    # Dynamic: theta * (factor * s - (factor - 1))^(d / (d - 2)) for s times the old length; with factor 1, s is ours.
    position = PositionConfig(theta=1e4, scaling={"kind": "ntk", "factor": 6.0})
    settings = as_settings(1e4, {"rope_type": "dynamic", "factor": 1.0})
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, max_position_embeddings=100, **settings)
    truth, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, torch.device("cpu"), seq_len=600)
    ours, factor = frequencies_and_factor(position, 64)
    torch.testing.assert_close(ours, truth.double(), rtol=3e-6, atol=0)
    assert factor == 1.0
    # What it is for: the slowest pair turns as under interpolation, the fastest as before.
    plain, _ = frequencies_and_factor(PositionConfig(theta=1e4), 64)
    assert (plain[-1] / ours[-1]).item() == pytest.approx(6.0, rel=1e-9)
    assert ours[0].item() == pytest.approx(1.0, rel=1e-9)


def test_llama3s_bands_by_hand() -> None:
    # Wavelengths 2 pi 10^i: 6.28, 62.8, 628, 6283; those below 2048 / 4 are kept, those above 2048 / 1 stretched.
    position = PositionConfig(theta=1e4, scaling={"kind": "llama3", "factor": 8.0, "original_max_seq_len": 2048})
    ours, _ = frequencies_and_factor(position, 8)
    smooth = (2048 / (200 * math.pi) - 1) / 3
    between = (1 - smooth) * 0.01 / 8 + smooth * 0.01
    torch.testing.assert_close(ours, torch.tensor([1, 0.1, between, 0.001 / 8], dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("mscales", [(0.707, 0.707), (1.3, 0.6)])
def test_deepseeks_rotation_is_ours(mscales: tuple[float, float]) -> None:
    scaling = DEEPSEEK | dict(zip(("mscale", "mscale_all_dim"), mscales, strict=True))
    position = PositionConfig(theta=1e4, interleaved=True, scaling=scaling)
    dims = {"qk_rope_head_dim": 64, "head_dim": 64, "max_position_embeddings": 163840, **settings_of(position)}
    at = torch.tensor([[0, 1, 5, 300]])
    q, k = torch.randn(2, 1, 4, 3, 64, generator=torch.Generator().manual_seed(0)).transpose(2, 3)
    turn_v2 = deepseek_v2.DeepseekV2RotaryEmbedding(DeepseekV2Config(**dims))
    truth_v2 = deepseek_v2.apply_rotary_emb(q, k, turn_v2(q, at))
    turn_v3 = deepseek_v3.DeepseekV3RotaryEmbedding(DeepseekV3Config(**dims))
    truth_v3 = deepseek_v3.apply_rotary_pos_emb_interleave(q, k, *turn_v3(q, at))
    angles = rope_angles(at, 64, position, torch.float32)
    for x, v2, v3 in zip((q, k), truth_v2, truth_v3, strict=True):
        ours = rotate(x.transpose(1, 2), *angles, True).transpose(1, 2)
        torch.testing.assert_close(ours, v2, rtol=0, atol=1e-4)
        # V3's code leaves each pair (2i, 2i + 1) at (i, i + d/2), queries and keys alike.
        torch.testing.assert_close(torch.cat((ours[..., 0::2], ours[..., 1::2]), -1), v3, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mscale_all_dim", [None, 0.707, 1.0])
def test_latent_attentions_scale_is_deepseeks(mscale_all_dim: float | None) -> None:
    scaling = DEEPSEEK | {"mscale": mscale_all_dim, "mscale_all_dim": mscale_all_dim}
    position = PositionConfig(theta=1e4, interleaved=True, scaling=scaling)
    shape = {"hidden_size": 32, "num_attention_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8}
    config = DeepseekV3Config(**shape, qk_nope_head_dim=48, qk_rope_head_dim=16, **settings_of(position))
    theirs = deepseek_v3.DeepseekV3Attention(config, 0).scaling
    assert yarn_scale(position.scaling) * 64**-0.5 == pytest.approx(theirs, rel=1e-12)


def test_nothing_but_deepseeks_yarn_changes_the_softmax_scale() -> None:
    assert yarn_scale(None) == 1.0
    for name, scaling in SCALINGS.items():
        assert (yarn_scale(RopeScaling(**scaling)) != 1.0) == name.startswith("deepseek"), name
