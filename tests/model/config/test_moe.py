"""Settings of a MoE layer that contradict each other: one line that names the setting and what would be right."""

import pytest

from moray.model.config.moe import MoEConfig

BAD = {
    "too many experts a token": (
        {"top_k": 9},
        r"top_k=9 must be at most 8, the experts in 1 of 1 groups of n_experts=8",
    ),
    "too few groups for them": ({"top_k": 3, "n_groups": 4, "group_score": "max"}, r"top_k=3 must be at most 2"),
    "uneven groups": ({"n_groups": 3}, r"n_groups=3 must divide n_experts=8; try one of \[1, 2, 4, 8\]"),
    "more groups than there are": ({"n_groups": 2, "top_k_groups": 3}, r"top_k_groups=3 must be at most n_groups=2"),
    "no two experts to add": (
        {"n_groups": 8, "top_k_groups": 4},
        r"group_score=top2 needs two experts a group; n_groups=8 leaves one: use max",
    ),
    "a second expert of three": (
        {"top_k": 3, "second_expert": "random"},
        r"second_expert=random is GShard's top-2 routing; top_k=3 must be 2",
    ),
    "jitter beyond its range": ({"jitter": 1.0}, r"jitter=1.0 must be 0 \(none\) or more, and less than 1"),
    "no room at all": ({"capacity_factor": 0.0}, r"capacity_factor=0.0 must be more than 0"),
    "a negative factor": ({"balance_loss": -0.1}, r"balance_loss=-0.1 must be at least 0"),
    "a load without noise": (
        {"load_loss": 0.1},
        r"load_loss=0.1 is the expected load under noise: it needs noisy=true",
    ),
    "a load of all experts": (
        {"load_loss": 0.1, "noisy": True, "top_k": 8},
        r"load_loss=0.1 .* it needs noisy=true and fewer experts a token .*; noisy=True, top_k=8, n_experts=8",
    ),
    "a load beside a bias": (
        {"load_loss": 0.1, "noisy": True, "bias_update_rate": 0.1},
        r"load_loss=0.1 knows the noise alone: .* bias_update_rate=0.1 and device_bias_update_rate=0.0 to be 0",
    ),
    "noise on sigmoids": ({"noisy": True, "score": "sigmoid"}, r"noisy=true .* needs score=softmax"),
    "a gate on nothing": ({"shared_gate": True}, r"shared_gate=true needs a shared expert; n_shared=0"),
    "devices without groups": (
        {"device_loss": 0.1},
        r"device_loss=0.1 balances groups of experts: it needs n_groups > 1",
    ),
    "narrow rows": ({"expert_width": 12}, r"expert_width=12 must be a multiple of 8.*try 16"),
}


@pytest.mark.parametrize(("fields", "message"), BAD.values(), ids=BAD)
def test_contradictions_are_refused_by_name(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=r"model\.moe\." + message):
        MoEConfig(**{"n_experts": 8, "top_k": 2, "expert_width": 16, **fields})


@pytest.mark.parametrize(
    "name", ["n_experts", "top_k", "expert_width", "every", "n_groups", "top_k_groups", "group_size"]
)
def test_sizes_are_at_least_1(name: str) -> None:
    with pytest.raises(ValueError, match=rf"model\.moe\.{name}=0 must be at least 1"):
        MoEConfig(**{"n_experts": 8, "top_k": 2, "expert_width": 16, name: 0})


def test_what_draws() -> None:
    plain = {"n_experts": 8, "top_k": 2, "expert_width": 16}
    assert not MoEConfig(**plain).is_random
    for fields in ({"noisy": True}, {"jitter": 0.01}, {"second_expert": "random"}):
        assert MoEConfig(**plain, **fields).is_random
