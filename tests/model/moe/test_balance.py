"""What keeps experts evenly loaded: losses by hand, by their papers' loops and transformers, and the routing bias."""

import math
from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func as mixtral_loss
from transformers.models.nllb_moe.modeling_nllb_moe import load_balancing_loss_func as nllb_loss
from transformers.models.switch_transformers import modeling_switch_transformers as switch

from moray.model import Decoder, Documents, ModelConfig, Randomness
from moray.model.config.moe import MoEConfig
from moray.model.context import Context
from moray.model.moe.balance import Statistics, auxiliary_loss, statistics_of, updated_bias
from moray.model.moe.layer import MoE
from moray.model.moe.router import Router, Routing

# Five tokens, three experts, top-1: the example of the notes.
GATES = [[0.7, 0.2, 0.1], [0.8, 0.1, 0.1], [0.2, 0.6, 0.2], [0.3, 0.3, 0.4], [0.9, 0.05, 0.05]]
SWITCH_LOSS = 3 / 5 * 2.9 / 5 + 1 / 5 * 1.25 / 5 + 1 / 5 * 0.85 / 5  # without the factor E = 3


def moe_of(**fields: object) -> MoEConfig:
    return MoEConfig(**{"n_experts": 3, "top_k": 1, "expert_width": 8, "balance_loss": 1.0, **fields})


def routed(chosen: list, scores: list) -> Routing:
    """Of sequences [B][T][K] and their scores [B][T][E]; the gates are the scores, the logits their logarithms."""
    chosen_BTK, scores_BTE = torch.tensor(chosen), torch.tensor(scores, dtype=torch.float64)
    z_BT1 = scores_BTE.sum(-1, keepdim=True).log().square()
    return Routing(chosen_BTK, scores_BTE.gather(-1, chosen_BTK), scores_BTE, z_BT1=z_BT1)


def counted(chosen: list, scores: list, valid: list, moe: MoEConfig) -> tuple[float, list[int]]:
    """The auxiliary loss of one layer, and its counts over all groups."""
    statistics = statistics_of(routed(chosen, scores), torch.tensor(valid), moe)
    return auxiliary_loss([statistics], moe).item(), statistics.counts_GE.sum(0).tolist()


def test_the_worked_example() -> None:
    """Our router on the logarithms of the example's gates: 0.432 and, with all tokens on one expert, 1."""
    assert pytest.approx(0.432) == SWITCH_LOSS
    config = ModelConfig(d_model=8, moe=moe_of(normalise_gates=False).model_dump())
    router = Router(config).double()
    router.linear.weight = nn.Parameter(torch.eye(3, 8, dtype=torch.float64))
    for gates, wanted, counts in (
        (GATES, 0.432, [3, 1, 1]),
        ([[0.0, 1.0, 0.0]] * 5, 1.0, [0, 5, 0]),
    ):
        x = nn.functional.pad(torch.tensor([gates], dtype=torch.float64).clamp_min(1e-300).log(), (0, 5))
        statistics = statistics_of(router(x), torch.ones(1, 5, dtype=torch.bool), router.moe)
        assert statistics.counts_GE.tolist() == [counts]
        assert auxiliary_loss([statistics], router.moe).item() / 3 == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("k", [1, 2])
def test_perfect_balance_is_1_for_every_k(k: int) -> None:
    chosen = [[[(token + i) % 4 for i in range(k)] for token in range(8)]]
    moe = moe_of(n_experts=4, top_k=k, n_groups=2, top_k_groups=2, device_loss=0.5, communication_loss=0.25)
    value, _ = counted(chosen, [[[0.25] * 4] * 8], [[True] * 8], moe)
    # Every second token's two neighbouring experts are of one group: 1.5 of at most 2 groups a token are reached.
    reached = {1: 0.5, 2: 0.75}[k]
    assert value == pytest.approx(1 + 0.5 + 0.25 * reached)


def test_scores_count_by_their_share() -> None:
    """Sigmoid scores do not sum to 1 (DeepSeek-V3, eq. 19 divides them): their common scale must not matter."""
    chosen, valid = [[[0], [0], [1], [2], [0]]], [[True] * 5]
    scaled = [[score * factor for score in row] for row, factor in zip(GATES, (0.1, 1, 2, 0.5, 3), strict=True)]
    assert counted(chosen, [scaled], valid, moe_of())[0] == pytest.approx(3 * 0.432)


def test_sequences_are_judged_alone_and_groups_of_them_together() -> None:
    """Two sequences that are each collapsed, on different experts, balance each other only within a group."""
    chosen, scores = [[[0]] * 4, [[1]] * 4], [[[1.0, 0.0]] * 4, [[0.0, 1.0]] * 4]
    valid = [[True] * 4] * 2
    assert counted(chosen, scores, valid, moe_of(n_experts=2)) == (pytest.approx(2 + 2), [4, 4])
    assert counted(chosen, scores, valid, moe_of(n_experts=2, group_size=2)) == (pytest.approx(1), [4, 4])


def test_padding_counts_nowhere() -> None:
    chosen, scores = [[[0], [0], [1], [2], [0], [1], [1]]], [[*GATES, [0.0, 1.0, 0.0], [0.0, 0.9, 0.1]]]
    value, counts = counted(chosen, scores, [[True] * 5 + [False] * 2], moe_of())
    assert value == pytest.approx(3 * 0.432)
    assert counts == [3, 1, 1]


def test_a_sequence_of_padding_alone_adds_nothing() -> None:
    chosen, scores = [[[0], [0], [1], [2], [0]], [[1]] * 5], [GATES, [[0.0, 1.0, 0.0]] * 5]
    for moe in (moe_of(), moe_of(balance_loss=0.0, importance_loss=1.0), moe_of(balance_loss=0.0, router_z_loss=1.0)):
        both = counted(chosen, scores, [[True] * 5, [False] * 5], moe)
        assert both == (pytest.approx(counted(chosen[:1], scores[:1], [[True] * 5], moe)[0]), [3, 1, 1])


def layers_of(n: int, moe: MoEConfig, valid_BT: Tensor) -> tuple[list[Tensor], list[Statistics]]:
    """Logits of random routers before any noise, and the statistics of their choices."""
    generator = torch.Generator().manual_seed(0)
    logits, statistics = [], []
    for _ in range(n):
        router = Router(ModelConfig(d_model=16, moe=moe.model_dump())).double()
        for parameter in router.parameters():
            nn.init.normal_(parameter, generator=generator)
        x = torch.randn(*valid_BT.shape, 16, dtype=torch.float64, generator=generator) + 0.5
        positions = torch.arange(valid_BT.shape[1]).expand(valid_BT.shape)
        routing = router(x, Randomness(0, 0, torch.arange(len(x))).keys("router", positions))
        logits.append(router.linear(x))
        statistics.append(statistics_of(routing, valid_BT, moe))
    return logits, statistics


VALID = torch.ones(4, 12, dtype=torch.bool)
PADDED = VALID.clone()
PADDED[1, 7:] = PADDED[3, :2] = False


@pytest.mark.parametrize("valid", [VALID, PADDED], ids=["whole", "padded"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_mixtrals_loss_in_transformers(top_k: int, valid: Tensor) -> None:
    """A coefficient c there, which sums f over the choices, is balance_loss = c * top_k here, over the model."""
    moe = moe_of(n_experts=8, top_k=top_k, balance_loss=0.02 * top_k, balance_over="model", group_size=4)
    logits, statistics = layers_of(3, moe, valid)
    theirs = mixtral_loss(tuple(x.flatten(0, 1) for x in logits), 8, top_k, valid.long())
    assert auxiliary_loss(statistics, moe).item() == pytest.approx(0.02 * theirs.item(), rel=1e-6)


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers below 5 takes no logits")
def test_nllbs_loss_in_transformers() -> None:
    moe = moe_of(n_experts=8, top_k=2, balance_loss=0.02, balance_over="model", group_size=4)
    logits, statistics = layers_of(1, moe, VALID)
    theirs = nllb_loss(tuple(x.flatten(0, 1) for x in logits), 8, 2)
    assert auxiliary_loss(statistics, moe).item() == pytest.approx(0.01 * theirs.item(), rel=1e-6)


def test_switchs_losses_in_transformers() -> None:
    """Both are means over the sequences; ours are sums."""
    moe = moe_of(n_experts=8, balance_loss=0.01, router_z_loss=0.001)
    logits, statistics = layers_of(2, moe, VALID)
    theirs = sum(
        0.01 * switch.load_balancing_loss_func(x.softmax(-1), x.argmax(-1)) + 0.001 * switch.router_z_loss_func(x)
        for x in logits
    )
    assert auxiliary_loss(statistics, moe).item() == pytest.approx(4 * theirs.item(), rel=1e-6)


def test_gshards_loss_counts_first_choices() -> None:
    """Algorithm 1: l = 1/E sum_e c_e / S m_e, in which c counts first choices; ours is E^2 of it."""
    moe = moe_of(n_experts=8, top_k=2, balance_counts="first")
    logits, statistics = layers_of(1, moe, PADDED)
    expected = 0.0
    for b in range(4):
        tokens = logits[0][b][PADDED[b]].softmax(-1)
        count = [sum(int(token.argmax()) == e for token in tokens) for e in range(8)]
        expected += sum(count[e] / len(tokens) * tokens[:, e].mean().item() for e in range(8)) / 8
    assert auxiliary_loss(statistics, moe).item() == pytest.approx(64 * expected)


def test_deepseek_v2s_losses_in_a_loop() -> None:
    """Eqs. 23-31, of each sequence: 8 experts on D = 4 devices, 3 experts on at most M = 2 of them a token."""
    devices, most, k = 4, 2, 3
    moe = moe_of(
        n_experts=8, top_k=k, n_groups=devices, top_k_groups=most, group_score="max", balance_loss=0.003,
        device_loss=0.05, communication_loss=0.02,
    )  # fmt: skip
    logits, statistics = layers_of(1, moe, PADDED)
    expected = 0.0
    for b in range(4):
        scores = logits[0][b][PADDED[b]].softmax(-1).tolist()
        n = len(scores)
        chosen = []
        for token in scores:
            best = sorted(range(devices), key=lambda d: -max(token[2 * d : 2 * d + 2]))[:most]
            chosen.append(sorted((i for i in range(8) if i // 2 in best), key=lambda i: -token[i])[:k])
        f = [8 / (k * n) * sum(i in experts for experts in chosen) for i in range(8)]
        p = [sum(token[i] for token in scores) / n for i in range(8)]
        expected += 0.003 * sum(f[i] * p[i] for i in range(8))
        on = [(2 * d, 2 * d + 1) for d in range(devices)]
        p_device = [sum(p[i] for i in on[d]) for d in range(devices)]
        expected += 0.05 * sum(sum(f[i] for i in on[d]) / len(on[d]) * p_device[d] for d in range(devices))
        sent = [sum(any(i in experts for i in on[d]) for experts in chosen) for d in range(devices)]
        expected += 0.02 * sum(devices / (most * n) * sent[d] * p_device[d] for d in range(devices))
    assert auxiliary_loss(statistics, moe).item() == pytest.approx(expected, rel=1e-12)


def test_importance_and_load_in_a_loop() -> None:
    """Shazeer et al., 2017, eqs. 6-7 and 10-11, of each sequence, the deviation being that of a population."""
    moe = moe_of(n_experts=6, top_k=2, noisy=True, balance_loss=0.0, importance_loss=0.1, load_loss=0.2)
    generator = torch.Generator().manual_seed(0)
    router = Router(ModelConfig(d_model=16, moe=moe.model_dump())).double()
    for parameter in router.parameters():
        nn.init.normal_(parameter, generator=generator)
    x = torch.randn(4, 12, 16, dtype=torch.float64, generator=generator)
    keys = Randomness(0, 0, torch.arange(4)).keys("router", torch.arange(12).expand(4, 12))
    routing = router(x, keys)
    assert routing.load_BTE is not None

    def squared_variation(values: list[float]) -> float:
        mean = sum(values) / len(values)
        return sum((value - mean) ** 2 for value in values) / len(values) / mean**2

    expected = 0.0
    for b in range(4):
        importance, load = [0.0] * 6, [0.0] * 6
        for t in range(12):
            if PADDED[b, t]:
                for expert, gate in zip(
                    routing.chosen_BTK[b, t].tolist(), routing.gates_BTK[b, t].tolist(), strict=True
                ):
                    importance[expert] += gate
                load = [a + p for a, p in zip(load, routing.load_BTE[b, t].tolist(), strict=True)]
        expected += 0.1 * squared_variation(importance) + 0.2 * squared_variation(load)
    auxiliary = auxiliary_loss([statistics_of(routing, PADDED, moe)], moe)
    assert auxiliary.item() == pytest.approx(expected, rel=1e-12)
    # Load is differentiable where the choice itself is not: the noise's weights learn from it.
    auxiliary.backward()
    assert router.noise is not None
    assert router.noise.weight.grad.abs().min() > 0


def test_the_z_loss_by_hand() -> None:
    """ST-MoE, eq. 5: logits log(1), log(2), log(5) have log-sum-exp log(8)."""
    moe = moe_of(balance_loss=0.0, router_z_loss=0.5)
    router = Router(ModelConfig(d_model=8, moe=moe.model_dump())).double()
    with torch.no_grad():
        router.linear.weight[:, :2] = torch.tensor([[1.0, 2.0, 5.0], [1.0, 0.5, 0.5]]).T.log()
    tokens_BTD = torch.eye(8, dtype=torch.float64)[None, :2]
    value = auxiliary_loss([statistics_of(router(tokens_BTD), torch.ones(1, 2, dtype=torch.bool), moe)], moe).item()
    assert value == pytest.approx(0.5 * (math.log(8) ** 2 + math.log(2) ** 2) / 2)


def test_without_factors_there_is_no_loss() -> None:
    assert counted([[[0]]], [[[0.5, 0.3, 0.2]]], [[True]], moe_of(balance_loss=0.0)) == (0.0, [1, 0, 0])


def test_a_total_adds_every_statistic_in_one_exchange() -> None:
    moe = moe_of(
        n_experts=8, top_k=2, noisy=True, n_groups=2, top_k_groups=2, balance_counts="first",
        **{f"{name}_loss": 1.0 for name in ("communication", "importance", "load", "router_z")},
    )  # fmt: skip
    _, (statistics,) = layers_of(1, moe, VALID)
    exchanges = []

    def twice(*statistics: Tensor) -> tuple[Tensor, ...]:
        exchanges.append(statistics)
        return tuple(2 * x for x in statistics)

    total = statistics.total(twice)
    assert len(exchanges) == 1
    for ours, part in zip(total, statistics, strict=True):
        assert part is not None
        assert ours is not None
        assert torch.equal(ours, 2 * part)


SMALL = {
    "n_layers": 2,
    "d_model": 16,
    "attention": {"n_heads": 2, "n_kv_heads": 1, "head_dim": 8},
    "vocab_size": 32,
}


def test_a_decoder_counts_no_padding() -> None:
    decoder = Decoder(ModelConfig.preset("minimind-3-moe", **SMALL, moe={"expert_width": 16}))
    generator = torch.Generator().manual_seed(0)
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, 0.0, 0.2, generator=generator)
    tokens = torch.randint(32, (2, 10), generator=generator)
    documents = torch.zeros(2, 10, dtype=torch.int64)
    documents[0, 6:] = -1
    auxiliary = decoder.loss(tokens, tokens, documents_BT=documents).auxiliary
    assert [block.ffn.tokens_E.sum().item() for block in decoder.blocks] == [16, 16]
    alone = decoder.loss(tokens[:1, :6], tokens[:1, :6]).auxiliary + decoder.loss(tokens[1:], tokens[1:]).auxiliary
    torch.testing.assert_close(auxiliary, alone, rtol=1e-5, atol=0)


def test_only_training_counts_tokens() -> None:
    layer = MoE(ModelConfig(d_model=16, moe=moe_of(n_experts=4, top_k=2).model_dump()), 0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 0.0, 0.2)
    x, context = torch.randn(1, 5, 16), Context(None, Documents(None, torch.ones(1, 5, dtype=torch.bool)))
    layer.eval()(x, context)
    assert layer.tokens_E.sum() == 0
    layer.train()(x, context)
    layer(x, context)
    assert layer.tokens_E.sum() == 2 * 5 * 2


def test_the_bias_moves_by_the_sign_alone() -> None:
    bias = torch.tensor([0.5, -0.25, 0.0, 0.0])
    moving, still = moe_of(n_experts=4, bias_update_rate=0.25), moe_of(n_experts=4)
    moved = updated_bias(bias, torch.tensor([100, 2, 9, 9]), moving)  # the mean is 30
    assert moved.tolist() == [0.25, 0.0, 0.25, 0.25]
    assert updated_bias(bias, torch.tensor([7, 7, 7, 7]), moving).tolist() == bias.tolist()
    assert updated_bias(bias, torch.tensor([100, 2, 9, 9]), still).tolist() == bias.tolist()


def test_a_group_moves_all_its_experts_beside_their_own_steps() -> None:
    moe = moe_of(n_experts=6, n_groups=3, top_k_groups=3, bias_update_rate=0.25, device_bias_update_rate=0.125)
    tokens = torch.tensor([60, 20, 10, 5, 30, 55])  # the mean is 30, those of groups are 40, 7.5 and 42.5
    assert updated_bias(torch.zeros(6), tokens, moe).tolist() == [-0.375, 0.125, 0.375, 0.375, -0.125, -0.375]
    even = torch.tensor([40, 20, 30, 30, 25, 35])
    assert updated_bias(torch.zeros(6), even, moe).tolist() == [-0.25, 0.25, 0, 0, 0.25, -0.25]


def skewed(moe: MoEConfig, ahead_E: Tensor) -> tuple[Router, Callable[[], Tensor]]:
    """A router to which some of 8 experts are ahead, and what counts the choices of 2,000 tokens by expert."""
    router = Router(ModelConfig(d_model=16, moe=moe.model_dump()))
    generator = torch.Generator().manual_seed(0)
    nn.init.normal_(router.linear.weight, 0.0, 0.5, generator=generator)
    x = torch.randn(1, 2000, 16, generator=generator)
    x[..., 0] = 1.0
    with torch.no_grad():
        router.linear.weight[:, 0] = ahead_E
    return router, lambda: torch.bincount(router(x).chosen_BTK.flatten(), minlength=8)


@torch.no_grad()
def move(router: Router, load: Callable[[], Tensor], moe: MoEConfig, steps: int) -> None:
    for _ in range(steps):
        router.bias_E.copy_(updated_bias(router.bias_E, load(), moe))


def test_the_bias_balances_a_skewed_router() -> None:
    """A router whose first experts are far ahead: within 500 steps of 0.002 every expert has its share, within 10%."""
    moe = moe_of(n_experts=8, top_k=2, score="sigmoid", bias_update_rate=0.002)
    router, load = skewed(moe, torch.linspace(4, -4, 8))
    assert load().max() > 3 * 500
    assert load().min() < 0.1 * 500
    move(router, load, moe, 500)
    assert load().max() < 1.1 * 500
    assert load().min() > 0.9 * 500


@pytest.mark.parametrize(("device_rate", "is_even"), [(0.0, False), (0.002, True)])
def test_groups_are_balanced_sooner_by_a_step_of_their_own(device_rate: float, is_even: bool) -> None:
    """A router to which whole groups are far ahead, after 75 steps: even by group and by expert, or neither yet."""
    grouped = {"n_groups": 4, "top_k_groups": 4, "bias_update_rate": 0.002, "device_bias_update_rate": device_rate}
    moe = moe_of(n_experts=8, top_k=2, score="sigmoid", **grouped)
    router, load = skewed(moe, torch.linspace(1.5, -1.5, 4).repeat_interleave(2))

    def worst() -> tuple[float, float]:
        """The busiest group over the mean, and the busiest expert."""
        return load().view(4, 2).sum(1).max().item() / 1000, load().max().item() / 500

    assert min(worst()) > 1.9
    move(router, load, moe, 75)
    assert max(worst()) < 1.05 if is_even else min(worst()) > 1.2
