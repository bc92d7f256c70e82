"""The MoE layer's three pieces: routing by hand-made scores, and dispatch and experts against a dense loop over all."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import ModelConfig, initialise
from model.moe import LocalDispatcher, MoE, Router, limit_to_groups

SMALL = {"n_layers": 1, "d_model": 24, "n_heads": 2, "n_kv_heads": 2, "head_dim": 8, "d_ff": 16, "vocab_size": 16}


def config_of(**fields: object) -> ModelConfig:
    return ModelConfig(**{**SMALL, "n_experts": 8, "top_k": 3, "d_expert": 16, **fields})  # type: ignore[arg-type]


def router_of_logits(**fields: object) -> Router:
    """A router whose logits are its input: scores can then be written by hand."""
    config = config_of(**{"n_experts": 4, "top_k": 2, **fields})
    router = Router(config).double()
    router.linear.weight = nn.Parameter(torch.eye(config.n_experts, dtype=torch.float64))
    return router


def logits(*rows: list[float]) -> Tensor:
    return torch.tensor([rows], dtype=torch.float64)


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
    routing = router_of_logits(normalise_gates=normalise, gate_scale=scale)(PROBABILITIES.log())
    assert routing.chosen_NK.tolist() == [[1, 2], [0, 3]]
    torch.testing.assert_close(routing.gates_NK, torch.tensor(gates, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(routing.scores_NE, PROBABILITIES[0], rtol=1e-12, atol=0)


def test_sigmoid_gates_are_normalised_over_the_chosen_alone() -> None:
    x = (PROBABILITIES / (1 - PROBABILITIES)).log()
    routing = router_of_logits(score_function="sigmoid", gate_scale=1.5)(x)
    expected = torch.tensor([[4 / 7, 3 / 7], [14 / 17, 3 / 17]], dtype=torch.float64) * 1.5
    torch.testing.assert_close(routing.gates_NK, expected, rtol=1e-12, atol=0)


def test_the_bias_steers_the_choice_and_not_the_gates() -> None:
    router = router_of_logits(normalise_gates=False)
    router.bias_E.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    routing = router(PROBABILITIES[:, :1].log())
    assert routing.chosen_NK.tolist() == [[0, 1]]
    torch.testing.assert_close(routing.gates_NK[0], torch.tensor([0.1, 0.4], dtype=torch.float64))


def test_routers_score_bf16_tokens_in_fp32() -> None:
    """In bf16, 1 and 1 + 2^-9 are one number: the second expert must still win."""
    router = router_of_logits(top_k=1).float()
    with torch.no_grad():
        router.linear.weight[1, 1] += 2**-9
    routing = router(torch.tensor([[[1.0, 1.0, 0.0, 0.0]]], dtype=torch.bfloat16))
    assert routing.chosen_NK.tolist() == [[1]]
    assert routing.gates_NK.dtype == routing.scores_NE.dtype == torch.float32


def test_all_scores_underflowing_gives_no_nan() -> None:
    moe = MoE(config_of(n_experts=4, d_model=8, score_function="sigmoid"))
    initialise(moe, 0.1, seed=0)
    with torch.no_grad():
        moe.router.linear.weight.fill_(-1000)
    out, balance = moe(torch.ones(1, 3, 8), torch.ones(1, 3, dtype=torch.bool))
    (out.sum() * 1.0 + balance).backward()
    assert out.isfinite().all()
    assert balance.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in moe.parameters())


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
    scores = torch.tensor(SCORES)
    limited = limit_to_groups(scores, 3, groups, score)
    for token, wanted in enumerate(kept):
        for expert in range(6):
            expected = SCORES[token][expert] if expert // 2 in wanted else -torch.inf
            assert limited[token, expert] == pytest.approx(expected)


@pytest.mark.parametrize("score", ["max", "top2"])
@pytest.mark.parametrize("most", [1, 2, 3])
def test_no_token_touches_more_groups_than_allowed(score: str, most: int) -> None:
    torch.manual_seed(0)
    config = config_of(n_experts=16, n_expert_groups=8, top_k_groups=most, top_k=2 * most, group_score=score)
    router = Router(config)
    initialise(router, 1.0, seed=0)
    router.bias_E.normal_(0, 0.2)
    chosen = router(torch.randn(4, 100, config.d_model)).chosen_NK
    assert all(len(set(row)) == 2 * most for row in chosen.tolist()), "each expert once"
    assert {len(set(row)) for row in (chosen // 2).tolist()} == {most}


def dense_loop(moe: MoE, x_ND: Tensor, chosen_NK: Tensor, gates_NK: Tensor) -> Tensor:
    """Every expert for every token, weighted with 0 where it was not chosen: what sparse dispatch saves."""
    experts = moe.experts
    out = torch.zeros_like(x_ND)
    for e in range(moe.n_experts):
        gate, up, down = (w[e] for w in (experts.gate_EFD, experts.up_EFD, experts.down_EDF))
        weight_N = (gates_NK * (chosen_NK == e)).sum(-1)
        out = out + weight_N[:, None] * (F.silu(x_ND @ gate.T) * (x_ND @ up.T) @ down.T)
    return out if moe.shared is None else out + moe.shared(x_ND)


@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("top_k", [1, 3])
def test_the_layer_equals_a_dense_loop_over_all_experts(top_k: int, shared: int) -> None:
    torch.manual_seed(0)
    moe = MoE(config_of(top_k=top_k, n_shared_experts=shared, score_function="sigmoid")).double()
    initialise(moe, 0.3, seed=0)
    moe.router.bias_E[[2, 5]] = -10.0  # two experts that no token chooses
    x = torch.randn(3, 10, 24, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(30, 24, dtype=torch.float64)

    def gradients(out_ND: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad((out_ND * direction).sum(), [x, *moe.parameters()]))

    out = moe(x, torch.ones(3, 10, dtype=torch.bool))[0].flatten(0, 1)
    routing = moe.router(x)
    expected = dense_loop(moe, x.flatten(0, 1), routing.chosen_NK, routing.gates_NK)
    assert not {2, 5} & set(routing.chosen_NK.flatten().tolist())
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    for ours, truth in zip(gradients(out), gradients(expected), strict=True):
        torch.testing.assert_close(ours, truth, rtol=0, atol=1e-12)


def test_dispatch_sorts_by_expert_and_combine_brings_back() -> None:
    x = torch.tensor([[1.0], [2.0], [3.0]])
    chosen = torch.tensor([[2, 0], [0, 3], [2, 3]])
    dispatcher = LocalDispatcher()
    rows, counts, plan = dispatcher.dispatch(x, chosen, 4)
    assert rows[:, 0].tolist() == [1, 2, 1, 3, 2, 3], "in the order of experts, and of tokens within an expert"
    assert counts.tolist() == [2, 0, 2, 2]
    gates = torch.tensor([[0.5, 0.25], [1.0, 0.0], [0.1, 0.2]])
    # Expert e multiplies by 10^e: rows of experts 0, 0, 2, 2, 3, 3.
    results = rows * torch.tensor([1.0, 1, 100, 100, 1000, 1000])[:, None]
    expected = [0.5 * 100 + 0.25 * 1, 1.0 * 2, 0.1 * 300 + 0.2 * 3000]
    assert dispatcher.combine(results, plan, gates)[:, 0].tolist() == pytest.approx(expected)
