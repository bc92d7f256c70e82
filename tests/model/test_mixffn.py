"""The convolution between the projections against its definition, document by document; the adapter against its own."""

import pytest
import torch
from torch import Tensor

from moray.model import Decoder, KVCache, ModelConfig, initialise
from moray.model.attention.documents import Documents
from moray.model.config.parts import FeedForwardConfig
from moray.model.context import Context
from moray.model.feedforward import FeedForward
from moray.model.mixffn import CausalConvolution, LowRankAdapter

PACKED = torch.tensor([[0, 0, 0, 0, 0, 1, 2, 2, 2], [3, 3, 4, 4, 4, 4, 4, -1, -1], [-1, -1, -1, 5, 5, 5, 5, 5, 5]])
WIDTH = 6


def context_of(documents_BT: Tensor) -> Context:
    return Context(None, Documents.of(documents_BT, torch.device("cpu")))


def convolution_of(taps: int, bias: bool = True) -> CausalConvolution:
    torch.manual_seed(taps)
    convolution = CausalConvolution(WIDTH, taps, bias, layer=0).double()
    for parameter in convolution.parameters():
        torch.nn.init.normal_(parameter)
    return convolution


def by_definition(convolution: CausalConvolution, x_BTF: Tensor, documents_BT: Tensor) -> Tensor:
    """y_t = bias + the sum over s = 0 … k-1 of w_(k-1-s) x_(t-s), as long as t - s is a token of t's document."""
    out = torch.zeros_like(x_BTF) if convolution.bias is None else convolution.bias.expand_as(x_BTF).clone()
    rows, width = documents_BT.shape
    for row, t, back in torch.cartesian_prod(*map(torch.arange, (rows, width, convolution.taps))).tolist():
        if t >= back and documents_BT[row, t] == documents_BT[row, t - back]:
            out[row, t] = out[row, t] + convolution.weight[:, convolution.taps - 1 - back] * x_BTF[row, t - back]
    return out


@pytest.mark.parametrize("taps", [1, 2, 4, 12])
@pytest.mark.parametrize("documents", [PACKED, torch.zeros(3, 9, dtype=torch.int64)], ids=["packed", "whole rows"])
def test_convolution_and_its_gradients_are_as_defined(taps: int, documents: Tensor) -> None:
    convolution = convolution_of(taps, bias=taps > 1)
    x = torch.randn(3, 9, WIDTH, dtype=torch.float64, requires_grad=True)
    valid_BT1 = (documents >= 0)[..., None]
    ours, truth = convolution(x, context_of(documents)), by_definition(convolution, x, documents)
    torch.testing.assert_close(ours * valid_BT1, truth * valid_BT1, rtol=0, atol=1e-13)
    loss_weights = torch.randn_like(ours) * valid_BT1
    inputs = [x, *convolution.parameters()]
    for mine, theirs in zip(
        torch.autograd.grad((ours * loss_weights).sum(), inputs),
        torch.autograd.grad((truth * loss_weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_a_document_equals_torchs_convolution_of_it_alone() -> None:
    convolution = convolution_of(3)
    module = torch.nn.Conv1d(WIDTH, WIDTH, 3, padding=2, groups=WIDTH).double()
    module.load_state_dict({"weight": convolution.weight[:, None], "bias": convolution.bias})
    x = torch.randn(3, 9, WIDTH, dtype=torch.float64)
    ours = convolution(x, context_of(PACKED))
    for document in range(6):
        here = document == PACKED
        row, tokens = here.any(1).nonzero().item(), here.any(0)
        alone = module(x[row][tokens].T[None])[0, :, : tokens.sum()].T
        torch.testing.assert_close(ours[row][tokens], alone, rtol=0, atol=1e-14)


def test_changing_one_document_or_the_padding_changes_nothing_elsewhere() -> None:
    convolution = convolution_of(4)
    x = torch.randn(3, 9, WIDTH, dtype=torch.float64)
    before = convolution(x, context_of(PACKED))
    for document in range(-1, 6):
        here = document == PACKED
        changed = torch.where(here[..., None], x + 1e3, x)
        assert torch.equal((convolution(changed, context_of(PACKED)) == before).all(-1), ~here)


@pytest.mark.parametrize("change", [{"conv_width": 3}, {"conv_width": 4, "gated": False, "bias": True}])
@torch.no_grad()
def test_decoding_behind_left_padding_equals_the_whole_pass_of_each_row(change: dict[str, int | bool]) -> None:
    torch.manual_seed(0)
    config = FeedForwardConfig(width=WIDTH, activation="gelu", **change)
    ffn = FeedForward(4, WIDTH, config, layer=0).double()
    for parameter in ffn.parameters():
        torch.nn.init.normal_(parameter)
    x, padding = torch.randn(3, 9, 4, dtype=torch.float64), (0, 2, 4)
    x[torch.arange(9) < torch.tensor(padding)[:, None]] = 1e3
    cache = KVCache(ModelConfig.preset("demo-dense"), 3, 9, x)
    outs = []
    for start, end in ((0, 5), (5, 6), (6, 8), (8, 9)):  # a prompt, tokens, and two at once
        valid_BT = torch.arange(start, end) >= torch.tensor(padding)[:, None]
        outs.append(ffn(x[:, start:end], Context(None, Documents(None, valid_BT), cache)))
    decoded = torch.cat(outs, 1)
    for row, pad in enumerate(padding):
        alone = ffn(x[row : row + 1, pad:], context_of(torch.zeros(1, 9 - pad, dtype=torch.int64)))
        torch.testing.assert_close(decoded[row, pad:], alone[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("change", [{"conv_width": 3}, {"adapter_rank": 2}])
@torch.no_grad()
def test_a_decoder_decodes_token_by_token_what_it_computes_at_once(change: dict[str, int]) -> None:
    attention = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 8}
    config = ModelConfig.preset(
        "demo-dense", n_layers=2, d_model=32, vocab_size=64, attention=attention, ffn={"width": 48, **change}
    ).but(init={"std": 0.3})
    decoder = Decoder(config).double().eval()
    initialise(decoder, seed=1)
    for block in decoder.blocks:
        if change.get("adapter_rank"):
            torch.nn.init.normal_(block.ffn.adapter.b.weight)
    tokens_BT = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0))
    cache = KVCache(config, 2, 9, decoder.embedding.weight)
    steps = [tokens_BT[:, :4], *tokens_BT[:, 4:].split(1, 1)]
    decoded = torch.cat([decoder(step, cache=cache) for step in steps], 1)
    torch.testing.assert_close(decoded, decoder(tokens_BT), rtol=0, atol=1e-11)


def test_the_cache_keeps_no_more_than_the_taps_reach() -> None:
    convolution = convolution_of(3)
    x = torch.randn(2, 500, WIDTH, dtype=torch.float64)
    cache = KVCache(ModelConfig.preset("demo-dense"), 2, 1, x)
    convolution(x, Context(None, Documents(None, torch.ones(2, 500, dtype=torch.bool)), cache))
    assert sum(held.untyped_storage().nbytes() for held in cache.inputs.values()) == 2 * 2 * WIDTH * 8


def test_an_adapter_adds_a_product_of_low_rank_and_starts_as_nothing() -> None:
    adapter = LowRankAdapter(WIDTH, 2).double()
    assert (adapter.a.weight.shape, adapter.b.weight.shape) == ((2, WIDTH), (WIDTH, 2))
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter)
    h = torch.randn(3, 5, WIDTH, dtype=torch.float64)
    change = torch.einsum("fr,rg,btg->btf", adapter.b.weight, adapter.a.weight, h)
    torch.testing.assert_close(adapter(h), h + change, rtol=0, atol=1e-13)

    decoder = Decoder(ModelConfig.preset("demo-dense", n_layers=1, ffn={"adapter_rank": 2}))
    initialise(decoder, seed=0)
    assert decoder.blocks[0].ffn.adapter.a.weight.abs().max() > 0
    assert not decoder.blocks[0].ffn.adapter.b.weight.any()
