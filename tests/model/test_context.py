"""Where documents lie in a packed batch, against counts by hand; and experts that are told, and not chosen."""

import pytest
import torch
from architectures import MODELS
from law1 import SEED

from moray.model import Decoder, initialise
from moray.model.attention.documents import Documents, document_lengths
from moray.model.context import Routes
from moray.model.recompute import Recompute


@pytest.mark.parametrize(
    ("documents", "lengths"),
    [
        ([[0, 0, 0], [1, 1, 1]], None),
        ([[7, 7, 7], [7, 7, 7]], None),  # the same id in two rows is two pieces
        ([[0, 0, 1], [1, 1, 1]], [2, 1, 3]),
        ([[-1, 0, 0], [1, 1, -1]], [1, 2, 2, 1]),
        ([[0], [1]], None),
    ],
)
def test_lengths_are_those_of_the_runs_of_each_row(documents: list[list[int]], lengths: list[int] | None) -> None:
    assert document_lengths(torch.tensor(documents)) == lengths


def test_padding_is_not_valid() -> None:
    documents = Documents.of(torch.tensor([[-1, 0, 0, 3]]), torch.device("cpu"))
    assert documents.valid_BT.tolist() == [[False, True, True, True]]
    assert documents.lengths == [1, 2, 1]


def test_flips_are_counted_by_sets_of_experts_and_where_something_is_recorded() -> None:
    recorded = torch.tensor([[[[0, 1], [2, 3]], [[4, 5], [0, 2]], [[-1, -1], [-1, -1]]]])
    routes = Routes.of(recorded.to(torch.int16), MODELS["moe-deepseek"], is_replayed=False)  # layers 1 and 2
    routes.chosen[1] = torch.tensor([[[1, 0], [4, 6], [1, 2]]])
    routes.chosen[2] = torch.tensor([[[3, 2], [1, 3], [1, 2]]])
    assert [int(n) for n in routes.flips()] == [2, 4]
    assert routes.of_layers().shape == recorded.shape


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_replayed_routes_are_those_of_a_layer_that_is_computed_again(recompute: Recompute) -> None:
    config, tokens = MODELS["moe-deepseek"], torch.arange(32).view(2, 16)
    told = torch.rand(2, 16, 2, 8, generator=torch.Generator().manual_seed(0)).topk(3).indices
    told[0, 3] = -1
    losses, gradients = [], []
    for how in ("none", recompute):
        decoder = Decoder(config, how).double()
        initialise(decoder, SEED)
        routes = Routes.of(told, config, is_replayed=True)
        losses.append(decoder.loss(tokens, tokens, routes=routes).cross_entropy)
        losses[-1].backward()
        gradients.append([weight.grad for weight in decoder.parameters()])
        assert [int(n) for n in routes.flips()] == [0, 62]
    assert losses[0] == losses[1] != decoder.loss(tokens, tokens).cross_entropy
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-10)
