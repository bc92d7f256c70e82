"""What travels between ranks that share experts, and what is made of it: against counts by hand, and one process."""

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from dispatched import (
    CONFIG,
    FOUR,
    GATHERED,
    LIMITED,
    SEQUENCES,
    TOKENS,
    TWO_LEVELS,
    WIDTH,
    computed,
    context,
    inputs,
    layer_of,
    on_rank,
)
from pool import Pool
from torch import Tensor

from moray.model import ModelConfig
from moray.model.recompute import Recompute, recomputing
from moray.parallel.dispatch import dispatcher as dispatchers
from moray.parallel.dispatch.dispatcher import ExpertDispatcher
from moray.parallel.dispatch.route import Route
from moray.parallel.layout import Layout
from moray.parallel.tensor import TokenSlices


def spread(pool: Pool, *arguments: Any, ranks: int = 4) -> tuple[list[dict[str, Tensor]], list[list[float]]]:
    found = pool.run(on_rank, ranks, *arguments)
    return [values for values, _ in found], [traffic for _, traffic in found]


@pytest.mark.parametrize("layout", [FOUR, TWO_LEVELS, GATHERED], ids=str)
@pytest.mark.parametrize("config", [CONFIG, LIMITED, CONFIG.but(moe={"capacity_factor": 0.5})], ids=["", "M", "drops"])
def test_ranks_compute_what_one_does(pool: Pool, config: ModelConfig, layout: Layout) -> None:
    found, _ = spread(pool, config, layout, torch.float64, torch.float64)
    total: dict[str, Tensor] = {}
    for rank, of_rank in enumerate(found):
        expected = computed(layer_of(config, torch.float64), rank, torch.float64)
        for name in ("out", "x", "router.linear.weight", "shared.up.weight"):
            torch.testing.assert_close(of_rank[name], expected[name], rtol=1e-9, atol=1e-9)
        for name, gradient in expected.items():
            if name.startswith("experts"):
                total[name] = total.get(name, torch.zeros(())) + gradient
    for name, gradient in total.items():
        torch.testing.assert_close(torch.cat([of_rank[name] for of_rank in found]), gradient, rtol=1e-9, atol=1e-9)


def distinct(chosen: Tensor, experts_each: int) -> list[set[int]]:
    """Of each token: the ranks that have its experts, or the nodes."""
    return [{expert // experts_each for expert in token} for token in chosen.flatten(0, 1).tolist()]


@pytest.mark.parametrize("config", [CONFIG, LIMITED], ids=["any", "M of 4 groups"])
def test_a_token_travels_once_to_each_rank_that_has_experts_of_it(pool: Pool, config: ModelConfig) -> None:
    found, traffic = spread(pool, config, FOUR, torch.float32, torch.float32)
    arriving, home, words_there, words_home = [0] * 4, [0] * 4, [0] * 4, [0] * 4
    for rank, of_rank in enumerate(found):
        for experts in of_rank["chosen"].flatten(0, 1).tolist():
            elsewhere = [expert // 4 for expert in experts if expert // 4 != rank]
            home[rank] += len(set(elsewhere))
            words_home[rank] += len(elsewhere)
            for other in range(4):
                arriving[other] += other in elsewhere
                words_there[other] += elsewhere.count(other)
    assert [rows for rows, _ in traffic] == arriving
    tokens = 4 * SEQUENCES * TOKENS
    if config is LIMITED:
        assert sum(arriving) <= 2 * tokens, "at most M devices a token"
    assert sum(arriving) < 0.75 * sum(words_there), "once for each expert elsewhere would be more"
    # What comes to a rank: others' tokens and, backward, gradients of their sums; what it has sent comes back, as sums
    # and as gradients. For each expert of a token 8 bytes there and 4 back, and the sizes of 16 bytes a rank.
    for rank, (_, bytes_in) in enumerate(traffic):
        rows = 2 * (arriving[rank] + home[rank])
        assert bytes_in == 4 * WIDTH * rows + 8 * words_there[rank] + 4 * words_home[rank] + 3 * 16


def test_over_two_nodes_a_token_travels_once_to_each_node_and_goes_on_from_there(pool: Pool) -> None:
    found, traffic = spread(pool, CONFIG, TWO_LEVELS, torch.float32, torch.float32)
    arriving = [0] * 4
    for rank, of_rank in enumerate(found):
        node, place = divmod(rank, 2)
        for nodes, ranks in zip(distinct(of_rank["chosen"], 8), distinct(of_rank["chosen"], 4), strict=True):
            for other in nodes:
                entry = 2 * other + place  # the rank at the same place of its node
                arriving[entry] += other != node
                for last in ranks & {2 * other, 2 * other + 1}:
                    arriving[last] += last != entry
    assert [rows for rows, _ in traffic] == arriving


def test_all_gather_takes_every_token_to_every_rank(pool: Pool) -> None:
    _, traffic = spread(pool, CONFIG, GATHERED, torch.float32, torch.float32)
    assert [rows for rows, _ in traffic] == [3 * SEQUENCES * TOKENS] * 4


def of_all(found: list[dict[str, Tensor]], name: str) -> Tensor:
    return torch.cat([of_rank[name] for of_rank in found]).double()


@pytest.mark.parametrize("layout", [FOUR, TWO_LEVELS, GATHERED], ids=str)
def test_in_bf16_sums_of_several_ranks_are_those_of_one(pool: Pool, layout: Layout) -> None:
    """fp32 sums travel as fp32: rounded once, as on one process, so that nearly all bits are the same. As bf16, which
    is rounded on each rank, they are not.
    """
    alone = [computed(layer_of(CONFIG, torch.bfloat16), rank, torch.bfloat16) for rank in range(4)]
    accurate, _ = spread(pool, CONFIG, layout, torch.bfloat16, torch.float32)
    rounded, _ = spread(pool, CONFIG, layout, torch.bfloat16, torch.bfloat16)
    for name in ("out", "x"):
        expected = of_all(alone, name)
        same = [(of_all(found, name) == expected).double().mean() for found in (accurate, rounded)]
        assert same[0] > 0.98
        assert same[1] < 0.9
        torch.testing.assert_close(of_all(rounded, name), expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


class Told:
    """What happens, in its order: each call of a method is noted, as it begins."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def of(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def told(*arguments: Any, **named: Any) -> Any:
            self.calls.append(name)
            return function(*arguments, **named)

        return told


def order_of_a_step() -> list[str]:
    told, layout = Told(), Layout(dp_shard=2, ep=2)
    for name in ("start", "arrive", "leave", "come_home"):
        setattr(Route, name, told.of(name, getattr(Route, name)))
    meshes, layer = layout.meshes("cpu"), layer_of(CONFIG, torch.float32)
    layer.dispatcher = ExpertDispatcher(TokenSlices(meshes.tp), meshes.hops, "alltoall", torch.float32)
    for name, weight in list(layer.experts.named_parameters()):
        setattr(layer.experts, name, torch.nn.Parameter(weight.detach().chunk(2)[dist.get_rank()]))
    assert layer.shared
    layer.shared.register_forward_hook(lambda *_: told.calls.append("shared"))
    layer.shared.up.weight.register_hook(lambda _: told.calls.append("shared"))
    x_BTD, w_BTD = inputs(dist.get_rank(), torch.float32)
    out_BTD, _ = layer(x_BTD.requires_grad_(), context())
    told.calls.append("backward")
    (out_BTD * w_BTD).sum().backward()
    return told.calls


def test_shared_experts_are_computed_while_tokens_travel_in_both_passes(pool: Pool) -> None:
    forward = ["start", "shared", "arrive", "leave", "come_home"]
    backward = ["start", "arrive", "leave", "shared", "come_home"]
    assert pool.run(order_of_a_step, 2) == [[*forward, "backward", *backward]] * 2


def test_what_goes_where_is_found_once_though_a_layer_is_computed_twice(pool: Pool) -> None:
    """Of the sizes that go ahead, the second pass asks for none."""
    assert pool.run(exchanges_of_a_step, 2)[0] == {"none": 1, "selective": 1, "full": 1}


def exchanges_of_a_step() -> dict[str, int]:
    counted, ways = {}, get_args(Recompute)
    for how in ways:
        meshes, layer = Layout(dp_shard=2, ep=2).meshes("cpu"), layer_of(CONFIG, torch.float32)
        layer.dispatcher = ExpertDispatcher(TokenSlices(meshes.tp), meshes.hops, "alltoall", torch.float32)
        for name, weight in list(layer.experts.named_parameters()):
            setattr(layer.experts, name, torch.nn.Parameter(weight.detach().chunk(2)[dist.get_rank()]))
        told = Told()
        make = dispatchers.HOPS["alltoall"]
        layer.dispatcher._hop = told.of("made", make)
        x_BTD, w_BTD = inputs(dist.get_rank(), torch.float32)
        out_BTD, _ = recomputing(how, layer, x_BTD.requires_grad_(), context())
        (out_BTD * w_BTD).sum().backward()
        counted[how] = len(told.calls)
    return counted
