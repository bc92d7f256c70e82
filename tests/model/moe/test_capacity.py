"""Capacity: hand-made cases, transformers' routers, loops written from the papers, and what dropping computes."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import NllbMoeConfig, SwitchTransformersConfig
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeTop2Router
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

from moray.model import Documents, ModelConfig, Randomness
from moray.model.config.moe import MoEConfig
from moray.model.context import Context
from moray.model.moe.capacity import capacity_of, within_capacity
from moray.model.moe.dispatch import LocalDispatcher
from moray.model.moe.layer import MoE
from moray.model.moe.router import Router


def config_of(**moe: object) -> ModelConfig:
    return ModelConfig(d_model=24, moe={"n_experts": 8, "top_k": 2, "expert_width": 16, **moe})


def layer_of(**moe: object) -> MoE:
    layer = MoE(config_of(**moe), 0).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 0.0, 0.5, generator=generator)
    return layer


def context_of(valid_BT: Tensor, randomness: Randomness | None = None) -> Context:
    return Context(None, Documents(None, valid_BT), randomness=randomness)


def hidden(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("factor", "top_k", "tokens", "experts", "capacity"),
    [
        (1.0, 1, 6, 3, 2),  # Switch, figure 3: 6 tokens on 3 experts
        (1.5, 1, 6, 3, 3),  # and with a factor of 1.5
        (1.0, 2, 8, 4, 4),  # GShard: 2 S / E
        (1.25, 1, 512, 8, 80),
        (1.0, 1, 7, 3, 3),
        (1.1, 1, 10, 1, 11),
        (2.0, 2, 0, 4, 0),
    ],
)
def test_the_capacity(factor: float, top_k: int, tokens: int, experts: int, capacity: int) -> None:
    moe = MoEConfig(n_experts=experts, top_k=min(top_k, experts), expert_width=8, capacity_factor=factor)
    assert capacity_of(moe, torch.tensor([tokens])).tolist() == [capacity]


# Two experts with room for three; each token's first and second choice, and their gates.
CHOSEN = [[0, 1], [0, 1], [0, 1], [0, 1], [1, 0]]
GATES = [[0.6, 0.4], [0.7, 0.3], [0.8, 0.2], [0.9, 0.1], [0.55, 0.45]]


@pytest.mark.parametrize(
    ("by", "kept"),
    [
        # Expert 0 takes the first choices of tokens 0, 1, 2; expert 1 that of token 4, then the seconds of 0 and 1.
        ("position", [[1, 1], [1, 1], [1, 0], [0, 0], [1, 0]]),
        # Expert 0 takes 0.9, 0.8, 0.7, expert 1 takes 0.55, 0.4, 0.3.
        ("gate", [[0, 1], [1, 1], [1, 0], [1, 0], [1, 0]]),
    ],
)
def test_a_hand_made_case(by: str, kept: list[list[int]]) -> None:
    chosen, gates = torch.tensor([CHOSEN]), torch.tensor([GATES])
    found = within_capacity(chosen, gates, torch.ones_like(chosen, dtype=torch.bool), torch.tensor([3]), by)
    assert found.int().tolist() == [kept]


def test_what_is_not_taken_uses_up_no_room() -> None:
    chosen, gates = torch.tensor([CHOSEN]), torch.tensor([GATES])
    taken = torch.ones_like(chosen, dtype=torch.bool)
    taken[0, 1] = False  # padding: neither choice counts
    taken[0, 0, 1] = False  # a second expert that was not drawn
    found = within_capacity(chosen, gates, taken, torch.tensor([3]), "position")
    # Expert 0: tokens 0, 2, 3; expert 1: token 4, then the seconds of 2 and 3.
    assert found.int().tolist() == [[[1, 0], [0, 0], [1, 1], [1, 1], [1, 0]]]


def loop(chosen: Tensor, gates: Tensor, taken: Tensor, capacity: list[int], by: str) -> Tensor:
    """GShard's algorithm 1 (its two passes over the tokens), or its like by gate, one assignment at a time."""
    kept = torch.zeros_like(taken)
    size = len(chosen) // len(capacity)
    for group, room in enumerate(capacity):
        sequences = range(group * size, (group + 1) * size)
        queue = [(b, t, k) for k in range(chosen.shape[2]) for b in sequences for t in range(chosen.shape[1])]
        if by == "gate":
            queue.sort(key=lambda place: -gates[place].item())
        count: Counter[int] = Counter()
        for place in queue:
            if not taken[place]:
                continue
            expert = int(chosen[place])
            kept[place] = count[expert] < room
            count[expert] += 1
    return kept


@pytest.mark.parametrize("by", ["position", "gate"])
@pytest.mark.parametrize("group_size", [1, 2, 4])
def test_random_batches_in_a_loop(group_size: int, by: str) -> None:
    generator = torch.Generator().manual_seed(group_size)
    chosen = torch.rand(4, 20, 6, generator=generator).topk(3).indices
    gates = torch.randint(1, 5, (4, 20, 3), generator=generator) / 4  # many are equal
    taken = torch.rand(4, 20, 3, generator=generator) < 0.8
    capacity = [5 + 3 * group for group in range(4 // group_size)]
    found = within_capacity(chosen, gates, taken, torch.tensor(capacity), by)
    assert torch.equal(found, loop(chosen, gates, taken, capacity, by))
    assert (taken & ~found).any()


def with_noise(gates: Tensor, generator: torch.Generator) -> Tensor:
    """Each gate, the one below it or the one above it."""
    ends = torch.tensor([-torch.inf, torch.inf], dtype=gates.dtype)
    choices = torch.stack([gates, *(torch.nextafter(gates, end) for end in ends)])
    return choices.gather(0, torch.randint(3, (1, *gates.shape), generator=generator))[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gate", [0.71731586225029687, 0.25, 1.0, 1 / 3, 1e-6])
def test_gates_that_rounding_alone_tells_apart_are_kept_by_position(gate: float, dtype: torch.dtype) -> None:
    """Eight tokens with one hidden state, and between them one with a larger gate and one with a smaller."""
    generator = torch.Generator().manual_seed(0)
    gates = torch.full((10, 1), gate, dtype=dtype)
    gates[3], gates[6] = 1.001 * gate, 0.999 * gate
    chosen = torch.zeros(1, 10, 1, dtype=torch.int64)
    for _ in range(100):
        noisy = with_noise(gates, generator)
        kept = within_capacity(chosen, noisy[None], chosen == 0, torch.tensor([5]), "gate")
        assert kept.int().flatten().tolist() == [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]


def test_gates_that_differ_are_kept_by_size() -> None:
    """Down to a part in two thousand, whatever their size; and gates of zero come last."""
    factors = 1 + torch.arange(8) / 2**11
    for size in (1e-30, 1e-6, 0.01, 0.51, 0.97):
        gates = (size * factors)[None, :, None]
        kept = within_capacity(torch.zeros_like(gates).long(), gates, gates > 0, torch.tensor([3]), "gate")
        assert kept.flatten().tolist() == [False] * 5 + [True] * 3
    gates = torch.tensor([0.0, 1e-20, 0.0, 1e-10])[None, :, None]
    kept = within_capacity(torch.zeros_like(gates).long(), gates, gates >= 0, torch.tensor([3]), "gate")
    assert kept.flatten().tolist() == [True, True, False, True]


def test_dropping_by_gate_rounds_no_gradient() -> None:
    """The rounded gates choose, and nothing else: what is kept counts with its gate in full."""
    layer = layer_of(capacity_factor=0.5, drop_by="gate")
    x, valid = hidden(3, 20, 24).requires_grad_(), torch.ones(3, 20, dtype=torch.bool)
    out, _ = layer(x, context_of(valid))
    routing = layer.router(x)
    everything = torch.ones_like(routing.chosen_BTK, dtype=torch.bool)
    room = capacity_of(layer.moe, valid.sum(1)).tolist()
    expected = expected_output(layer, x, loop(routing.chosen_BTK, routing.gates_BTK, everything, room, "gate"))
    direction = hidden(3, 20, 24)
    ours = torch.autograd.grad((out * direction).sum(), [x, *layer.parameters()])
    truth = torch.autograd.grad((expected * direction).sum(), [x, *layer.parameters()])
    for found, wanted in zip((out, *ours), (expected, *truth), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_switch_drops_what_transformers_drops() -> None:
    """Capacity 3 of 20 tokens on 8 experts: a sequence is a routing group."""
    layer = layer_of(top_k=1, normalise_gates=False, capacity_factor=1.2)
    theirs = SwitchTransformersTop1Router(SwitchTransformersConfig(hidden_size=24, num_experts=8, expert_capacity=3))
    theirs.classifier = nn.Linear(24, 8, bias=False)
    theirs.classifier.weight = nn.Parameter(layer.router.linear.weight.float())
    x, valid = hidden(3, 20, 24), torch.ones(3, 20, dtype=torch.bool)
    dispatched = theirs.eval()(x.float())[0]
    routing = layer.router(x)
    kept = layer._within_capacity(routing, valid)
    assert torch.equal(F.one_hot(routing.chosen_BTK, 8)[:, :, 0] * kept, dispatched)
    assert layer.dropped == 60 - dispatched.sum()
    assert layer.dropped > 5


def test_top_2_drops_what_transformers_nllb_drops() -> None:
    """All first choices before second ones, over a whole batch with padding, 12 places of 60 tokens on 8 experts."""
    layer = layer_of(capacity_factor=0.8, group_size=3)
    config = NllbMoeConfig(hidden_size=24, d_model=24, num_experts=8, expert_capacity=12, second_expert_policy="all")
    config.normalize_router_prob_before_dropping = True
    theirs = NllbMoeTop2Router(config).train()
    theirs.classifier = nn.Linear(24, 8, bias=False)
    theirs.classifier.weight = nn.Parameter(layer.router.linear.weight.float())
    x, valid = hidden(3, 22, 24), torch.ones(3, 22, dtype=torch.bool)
    valid[0, 16:] = False
    assert capacity_of(layer.moe, valid.sum()[None]).tolist() == [12]
    logits = theirs.classifier(x.float().flatten(0, 1))
    _, combined = theirs.route_tokens(logits, padding_mask=~valid.flatten())
    routing = layer.router(x)
    kept = layer._within_capacity(routing, valid)
    ours = torch.zeros(3, 22, 8, dtype=torch.float64).scatter(2, routing.chosen_BTK, routing.gates_BTK * kept)
    torch.testing.assert_close(ours.float().flatten(0, 1), combined, rtol=1e-5, atol=0)
    assert layer.dropped > 5


def expected_output(layer: MoE, x: Tensor, kept: Tensor) -> Tensor:
    """Every expert for every token, weighted with 0 where it was not chosen or dropped."""
    experts, routing = layer.experts, layer.router(x)
    out = torch.zeros_like(x)
    assert experts.gate_EFD is not None
    for e in range(layer.moe.n_experts):
        weight = (routing.gates_BTK * ((routing.chosen_BTK == e) & kept)).sum(-1, keepdim=True)
        gate, up, down = experts.gate_EFD[e], experts.up_EFD[e], experts.down_EDF[e]
        out = out + weight * ((F.silu(x @ gate.T) * (x @ up.T)) @ down.T)
    return out


@pytest.mark.parametrize("top_k", [1, 2])
def test_dropped_tokens_add_nothing_and_are_not_computed(top_k: int) -> None:
    layer = layer_of(top_k=top_k, capacity_factor=0.5)
    x, valid = hidden(3, 20, 24).requires_grad_(), torch.ones(3, 20, dtype=torch.bool)
    computed = []

    class Watched(LocalDispatcher):
        def combine(self, rows_MD: Tensor, *rest: object) -> Tensor:  # type: ignore[override]
            computed.append(len(rows_MD))
            return super().combine(rows_MD, *rest)  # type: ignore[arg-type]

    layer.dispatcher = Watched()
    out, _ = layer(x, context_of(valid))
    routing = layer.router(x)
    everything = torch.ones_like(routing.chosen_BTK, dtype=torch.bool)
    kept = loop(
        routing.chosen_BTK, routing.gates_BTK, everything, capacity_of(layer.moe, valid.sum(1)).tolist(), "position"
    )
    expected = expected_output(layer, x, kept)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    assert computed == [kept.sum()]
    assert layer.dropped == (~kept).sum()
    none_left = ~kept.any(-1)
    assert none_left.any()
    assert not out[none_left].any(), "the residual stream alone passes them on"
    direction = hidden(3, 20, 24)
    ours = torch.autograd.grad((out * direction).sum(), [x, *layer.parameters()])
    truth = torch.autograd.grad((expected * direction).sum(), [x, *layer.parameters()])
    for found, wanted in zip(ours, truth, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_nothing_is_dropped_in_evaluation_or_with_room_for_all() -> None:
    layer, roomy, free = layer_of(capacity_factor=0.5), layer_of(capacity_factor=8.0), layer_of()
    x, valid = hidden(3, 20, 24), torch.ones(3, 20, dtype=torch.bool)
    expected = free(x, context_of(valid))[0]
    for other in (layer.eval(), roomy):
        torch.testing.assert_close(other(x, context_of(valid))[0], expected, rtol=0, atol=1e-12)
        assert other.dropped == 0


def test_padding_takes_no_room() -> None:
    """Valid tokens compute the same whatever padding stands beside them."""
    layer = layer_of(capacity_factor=0.75)
    x, valid = hidden(1, 20, 24), torch.ones(1, 20, dtype=torch.bool)
    valid[:, 8:12] = False
    out, _ = layer(x, context_of(valid))
    alone, _ = layer(x[valid][None], context_of(valid[valid][None]))
    torch.testing.assert_close(out[valid], alone[0], rtol=0, atol=1e-12)


def test_a_batch_without_a_valid_token() -> None:
    layer = layer_of(capacity_factor=1.0)
    x = hidden(1, 5, 24).requires_grad_()
    out, statistics = layer(x, context_of(torch.zeros(1, 5, dtype=torch.bool)))
    assert statistics is not None
    (out.sum() + statistics.shares_GE.sum()).backward()
    assert not out.any()
    assert not x.grad.any()


def test_a_second_expert_that_is_not_drawn_is_not_computed() -> None:
    layer = layer_of(second_expert="random")
    x, valid = hidden(2, 30, 24), torch.ones(2, 30, dtype=torch.bool)
    randomness = Randomness(0, 0, torch.arange(2))
    out, statistics = layer(x, context_of(valid, randomness))
    keys = randomness.keys("router 0", torch.arange(30).expand(2, 30))
    drawn = layer.router(x, keys).drawn_BTK
    torch.testing.assert_close(out, expected_output(layer, x, drawn), rtol=0, atol=1e-12)
    assert layer.tokens_E.sum() == drawn.sum() < 120
    assert statistics is not None
    assert statistics.counts_GE.sum() == drawn.sum()
    assert layer.dropped == 0, "not drawn is not dropped"


def test_groups_must_divide_the_batch() -> None:
    layer = layer_of(group_size=2)
    with pytest.raises(ValueError, match=r"model.moe.group_size=2 must divide the 3 sequences .* try one of \[1, 3\]"):
        layer(hidden(3, 5, 24), context_of(torch.ones(3, 5, dtype=torch.bool)))


def test_drawing_needs_randomness() -> None:
    layer = layer_of(noisy=True)
    x, context = hidden(1, 5, 24), context_of(torch.ones(1, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"noisy=True.* pass randomness=Randomness\(seed, step, sequences\)"):
        layer(x, context)
    layer.eval()(x, context)
    assert isinstance(layer.router, Router)
