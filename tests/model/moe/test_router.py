"""The router alone: hand-made scores, transformers' routers, and each source of chance against its paper's formula."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import DeepseekV2Config, NllbMoeConfig, SwitchTransformersConfig
from transformers.models.deepseek_v2 import modeling_deepseek_v2
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeTop2Router
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

from moray.model import ModelConfig, Randomness
from moray.model.moe.router import Router, expected_load, limit_to_groups
from moray.model.randomness import normal, uniform


def router_of(d_model: int = 24, **moe: object) -> Router:
    """In fp64, with random weights."""
    moe = {"n_experts": 8, "top_k": 3, "expert_width": 16, **moe}
    router = Router(ModelConfig(d_model=d_model, moe=moe)).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in router.parameters():
        nn.init.normal_(parameter, generator=generator)
    return router


def router_of_logits(**moe: object) -> Router:
    """A router whose logits are the first four entries of its input: scores can then be written by hand."""
    router = router_of(d_model=8, **{"n_experts": 4, "top_k": 2, **moe})
    router.linear.weight = nn.Parameter(torch.eye(4, 8, dtype=torch.float64))
    return router


def as_input(logits: Tensor) -> Tensor:
    return F.pad(logits, (0, 4))


def keys_of(batch: int, tokens: int, first: int = 0, step: int = 0) -> Tensor:
    positions = torch.arange(tokens).expand(batch, tokens)
    return Randomness(0, step, torch.arange(first, first + batch)).keys("router 0", positions)


def hidden(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# Softmax of the logarithms of probabilities gives these probabilities back.
PROBABILITIES = torch.tensor([[[0.1, 0.4, 0.3, 0.2], [0.7, 0.1, 0.05, 0.15]]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("normalise", "scale", "gates"),
    [
        (False, 1.0, [[0.4, 0.3], [0.7, 0.15]]),
        (True, 1.0, [[4 / 7, 3 / 7], [14 / 17, 3 / 17]]),
        (True, 2.5, [[10 / 7, 7.5 / 7], [35 / 17, 7.5 / 17]]),
    ],
)
def test_softmax_gates(normalise: bool, scale: float, gates: list[list[float]]) -> None:
    routing = router_of_logits(normalise_gates=normalise, gate_scale=scale)(as_input(PROBABILITIES.log()))
    assert routing.chosen_BTK.tolist() == [[[1, 2], [0, 3]]]
    torch.testing.assert_close(routing.gates_BTK, torch.tensor([gates], dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(routing.scores_BTE, PROBABILITIES, rtol=1e-12, atol=0)


def test_sigmoid_gates_are_normalised_over_the_chosen_alone() -> None:
    x = (PROBABILITIES / (1 - PROBABILITIES)).log()
    routing = router_of_logits(score="sigmoid", gate_scale=1.5)(as_input(x))
    expected = torch.tensor([[[4 / 7, 3 / 7], [14 / 17, 3 / 17]]], dtype=torch.float64) * 1.5
    torch.testing.assert_close(routing.gates_BTK, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_gates_sum_to_their_scale_or_to_the_chosen_scores(score: str, top_k: int) -> None:
    x = hidden(2, 50, 24)
    sums = router_of(score=score, top_k=top_k, gate_scale=2.5)(x).gates_BTK.sum(-1)
    torch.testing.assert_close(sums, torch.full_like(sums, 2.5), rtol=1e-12, atol=0)
    routing = router_of(score=score, top_k=top_k, normalise_gates=False, gate_scale=2.5)(x)
    best = routing.scores_BTE.sort(descending=True).values[..., :top_k].sum(-1)
    torch.testing.assert_close(routing.gates_BTK.sum(-1), 2.5 * best, rtol=1e-12, atol=0)


def test_a_softmax_after_the_top_k_is_a_softmax_before_it_normalised() -> None:
    router, x = router_of(), hidden(2, 50, 24)
    logits, chosen = (x @ router.linear.weight.T).topk(3)
    routing = router(x)
    assert torch.equal(routing.chosen_BTK, chosen)
    torch.testing.assert_close(routing.gates_BTK, logits.softmax(-1), rtol=1e-12, atol=0)


def test_the_bias_steers_the_choice_and_not_the_gates() -> None:
    router = router_of_logits(normalise_gates=False)
    router.bias_E.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    routing = router(as_input(PROBABILITIES[:, :1].log()))
    assert routing.chosen_BTK.tolist() == [[[0, 1]]]
    torch.testing.assert_close(routing.gates_BTK[0, 0], torch.tensor([0.1, 0.4], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routers_score_in_fp32_whatever_their_dtype(dtype: torch.dtype) -> None:
    """In bf16, 8 + 2^-8 is 8: the second expert must still win, also of a router that was cast as a whole."""
    router = router_of_logits(top_k=1).to(dtype)
    with torch.no_grad():
        router.linear.weight[1, 2] = 2**-8
    routing = router(torch.tensor([[[8.0, 8.0, 1.0, 0, 0, 0, 0, 0]]], dtype=torch.bfloat16))
    assert routing.chosen_BTK.tolist() == [[[1]]]
    assert routing.gates_BTK.dtype == routing.scores_BTE.dtype == torch.float32


#                 group 0     group 1     group 2
SCORES = [
    [9.0, 0.0, 5.0, 5.0, 6.0, 1.0],
    [0.1, 0.2, 0.9, 0.0, 0.5, 0.5],
]


@pytest.mark.parametrize(
    ("score", "groups", "kept"),
    [
        ("max", 1, [{0}, {1}]),
        ("max", 2, [{0, 2}, {1, 2}]),
        ("top2", 1, [{1}, {2}]),  # sums: 9, 10, 7 and 0.3, 0.9, 1.0
        ("top2", 2, [{0, 1}, {1, 2}]),
        ("max", 3, [{0, 1, 2}, {0, 1, 2}]),
    ],
)
def test_the_best_groups_are_kept(score: str, groups: int, kept: list[set[int]]) -> None:
    limited = limit_to_groups(torch.tensor([SCORES]), 3, groups, score)[0]
    for token, wanted in enumerate(kept):
        for expert in range(6):
            expected = SCORES[token][expert] if expert // 2 in wanted else -torch.inf
            assert limited[token, expert] == pytest.approx(expected)


@pytest.mark.parametrize("score", ["max", "top2"])
@pytest.mark.parametrize("most", [1, 2, 3])
def test_no_token_touches_more_groups_than_allowed(score: str, most: int) -> None:
    router = router_of(n_experts=16, n_groups=8, top_k_groups=most, top_k=2 * most, group_score=score)
    # Some biased scores are negative: a group that is out must stay out even then.
    router.bias_E.copy_(hidden(16))
    chosen = router(hidden(4, 100, 24)).chosen_BTK.flatten(0, 1)
    assert all(len(set(row)) == 2 * most for row in chosen.tolist()), "each expert once"
    assert {len(set(row)) for row in (chosen // 2).tolist()} == {most}


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers below 5 has no such class")
@pytest.mark.parametrize("groups", [1, 4])
def test_deepseek_v2s_gate(groups: int) -> None:
    method = "greedy" if groups == 1 else "group_limited_greedy"
    config = DeepseekV2Config(
        hidden_size=24, n_routed_experts=8, num_experts_per_tok=3, n_group=groups, topk_group=min(groups, 2),
        topk_method=method, routed_scaling_factor=2.5, num_attention_heads=4,
    )  # fmt: skip
    router = router_of(
        n_groups=groups, top_k_groups=min(groups, 2), group_score="max", normalise_gates=False, gate_scale=2.5
    ).float()
    theirs = modeling_deepseek_v2.DeepseekV2TopkRouter(config)
    theirs.weight = router.linear.weight
    x = hidden(3, 20, 24).float()
    _, gates, chosen = theirs(x)
    routing = router(x)
    ours, expected = (
        torch.zeros(60, 8).scatter(1, chosen_NK, gates_NK)
        for chosen_NK, gates_NK in (
            (routing.chosen_BTK.flatten(0, 1), routing.gates_BTK.flatten(0, 1)),
            (chosen, gates),
        )
    )
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0)


def test_switchs_router() -> None:
    """transformers' top-1 router, with room for all."""
    config = SwitchTransformersConfig(hidden_size=24, num_experts=8, expert_capacity=1000, router_jitter_noise=0.0)
    router = router_of(top_k=1, normalise_gates=False).float()
    theirs = SwitchTransformersTop1Router(config)
    theirs.classifier = nn.Linear(24, 8, bias=False)
    theirs.classifier.weight = router.linear.weight
    x = hidden(3, 20, 24).float()
    chosen, gates, logits = theirs(x)
    routing = router(x)
    assert torch.equal(F.one_hot(routing.chosen_BTK[..., 0], 8), chosen)
    torch.testing.assert_close(routing.gates_BTK, gates, rtol=1e-6, atol=0)
    torch.testing.assert_close(routing.scores_BTE, logits.softmax(-1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("policy", ["all", "random"])
def test_nllbs_router(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """GShard's top-2 as transformers has it, with room for all.

    It draws by the second gate before it is normalised, which is ours with normalise_gates=false, and normalises a
    token's gates over those it kept, which is done here by hand.
    """
    config = NllbMoeConfig(
        hidden_size=24, d_model=24, num_experts=8, expert_capacity=1000, second_expert_policy=policy,
        normalize_router_prob_before_dropping=False,
    )  # fmt: skip
    router = router_of(
        top_k=2, normalise_gates=False, second_expert="random" if policy == "random" else "always"
    ).float()
    theirs = NllbMoeTop2Router(config).train()
    theirs.classifier = nn.Linear(24, 8, bias=False)
    theirs.classifier.weight = router.linear.weight
    x, keys = hidden(1, 60, 24).float(), keys_of(1, 60)
    monkeypatch.setattr(torch, "rand_like", lambda like: uniform(keys, "second expert", 1).flatten().to(like.dtype))
    first, combined = theirs.route_tokens(theirs.classifier(x[0]))
    routing = router(x, keys)
    drawn = torch.ones(1, 60, 2, dtype=torch.bool) if routing.drawn_BTK is None else routing.drawn_BTK
    gates = routing.gates_BTK * drawn
    ours = torch.zeros(60, 8).scatter(1, routing.chosen_BTK[0], (gates / gates.sum(-1, keepdim=True))[0])
    assert torch.equal(first.argmax(-1), routing.chosen_BTK[0, :, 0])
    torch.testing.assert_close(ours, combined, rtol=1e-5, atol=0)
    if policy == "random":
        assert 5 < (~drawn).sum() < 55, "some are drawn and some are not"


@pytest.mark.parametrize("normalise", [True, False])
def test_the_second_expert_is_kept_in_proportion_to_its_gate(normalise: bool) -> None:
    """GShard's algorithm 1 over 20,000 draws: min(1, 2 gate), within 4 deviations."""
    probabilities = [[0.6, 0.2, 0.15, 0.05], [0.45, 0.44, 0.06, 0.05]]
    x = as_input(torch.tensor(probabilities, dtype=torch.float64).log()).repeat(100, 100, 1)
    routing = router_of_logits(second_expert="random", normalise_gates=normalise, gate_scale=3.0)(x, keys_of(100, 200))
    assert routing.drawn_BTK is not None
    assert routing.drawn_BTK[..., 0].all(), "the first expert always"
    for token, (first, second, *_) in enumerate(probabilities):
        wanted = min(1.0, 2 * second / (first + second if normalise else 1.0))
        share = routing.drawn_BTK[:, token::2, 1].double().mean().item()
        assert share == pytest.approx(wanted, abs=4 * (wanted * (1 - wanted) / 10_000) ** 0.5)


def test_noisy_top_k_in_a_loop() -> None:
    """Shazeer et al., 2017, eqs. 3-5 and 8-9, token by token and expert by expert."""
    router = router_of(noisy=True, load_loss=1.0, top_k=2, n_experts=6)
    x, keys = hidden(2, 15, 24), keys_of(2, 15)
    routing = router(x, keys)
    assert router.noise is not None
    assert routing.load_BTE is not None
    drawn = normal(keys, "noise", 6)
    phi = torch.distributions.Normal(0.0, 1.0).cdf
    for b in range(2):
        for t in range(15):
            clean = [(x[b, t] @ router.linear.weight[i]) for i in range(6)]
            deviation = [F.softplus(x[b, t] @ router.noise.weight[i]) for i in range(6)]
            h = [clean[i] + drawn[b, t, i] * deviation[i] for i in range(6)]
            best = sorted(range(6), key=lambda i: -h[i])[:2]
            assert routing.chosen_BTK[b, t].tolist() == best
            gates = torch.stack([h[i] for i in best]).softmax(0)
            torch.testing.assert_close(routing.gates_BTK[b, t], gates, rtol=1e-10, atol=0)
            for i in range(6):
                kth_excluding = sorted((h[j] for j in range(6) if j != i), reverse=True)[1]
                p = phi((clean[i] - kth_excluding) / deviation[i])
                torch.testing.assert_close(routing.load_BTE[b, t, i], p, rtol=1e-9, atol=1e-14)


def test_expected_load_is_how_often_an_expert_is_chosen() -> None:
    """Drawing one expert's noise again 4,000 times, the others' held still."""
    clean, noisy, deviation = hidden(3, 6).unbind()
    deviation = deviation.abs() + 0.3
    load = expected_load(clean, noisy, deviation, 2)
    fresh = hidden(4000, 6) * deviation + clean
    for i in range(6):
        trials = noisy.repeat(4000, 1)
        trials[:, i] = fresh[:, i]
        share = (trials.topk(2).indices == i).any(1).double().mean()
        assert share.item() == pytest.approx(load[i].item(), abs=0.03)


def test_jitter_multiplies_the_routers_input() -> None:
    router, x, keys = router_of(jitter=0.1), hidden(2, 300, 24), keys_of(2, 300)
    factor = 1 + 0.1 * (2 * uniform(keys, "jitter", 24) - 1)
    assert 0.9 <= factor.min() < 0.901
    assert 1.099 < factor.max() <= 1.1
    expected = ((x * factor) @ router.linear.weight.T).softmax(-1)
    torch.testing.assert_close(router(x, keys).scores_BTE, expected, rtol=1e-12, atol=1e-12)


RANDOM = {"noise": {"noisy": True}, "jitter": {"jitter": 0.3}, "second expert": {"top_k": 2, "second_expert": "random"}}


@pytest.mark.parametrize("moe", RANDOM.values(), ids=RANDOM)
def test_a_batch_routes_as_its_parts_do(moe: dict[str, object]) -> None:
    """Four sequences at once, or two and two: and another step draws otherwise."""
    router, x = router_of(**moe), hidden(4, 30, 24)
    whole = router(x, keys_of(4, 30))
    parts = [router(x[:2], keys_of(2, 30)), router(x[2:], keys_of(2, 30, first=2))]
    later = router(x, keys_of(4, 30, step=1))
    for name, value in whole._asdict().items():
        if value is not None:
            torch.testing.assert_close(
                torch.cat([getattr(part, name) for part in parts]), value, rtol=1e-12, atol=1e-12
            )
    changed = whole.drawn_BTK != later.drawn_BTK if whole.drawn_BTK is not None else whole.gates_BTK != later.gates_BTK
    assert changed.any()


@pytest.mark.parametrize("moe", RANDOM.values(), ids=RANDOM)
def test_without_keys_nothing_is_random(moe: dict[str, object]) -> None:
    router, x = router_of(**moe), hidden(1, 30, 24)
    plain = router_of(top_k=router.moe.top_k)
    plain.linear = router.linear
    assert router(x).drawn_BTK is None
    torch.testing.assert_close(router(x).gates_BTK, plain(x).gates_BTK, rtol=0, atol=0)
