"""Attention within documents: a packed row is exactly its documents, one by one."""

import pytest
import torch
from torch import Tensor

from model import Decoder, ModelConfig, initialise
from model.attention import attend, document_lengths

NARROW = {"n_layers": 2, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "d_ff": 48, "vocab_size": 50}
# Wide weights, so that every token that is seen is noticed.
CONFIGS = {
    "dense": ModelConfig.preset("demo-dense", **NARROW, init_std=0.3),
    "moe": ModelConfig.preset("demo-moe", **NARROW, n_experts=8, top_k=2, d_expert=16, init_std=0.3),
}
LENGTHS = [[5, 9, 2], [16], [1, 1, 14]]


def decoder_of(name: str) -> Decoder:
    decoder = Decoder(CONFIGS[name]).double()
    initialise(decoder, seed=1)
    return decoder


def packed(lengths: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Random tokens, positions that restart with each document, and document ids."""
    width = sum(lengths[0])
    tokens = torch.randint(50, (len(lengths), width), generator=torch.Generator().manual_seed(2))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    documents = torch.stack([torch.cat([torch.full((n,), i) for i, n in enumerate(row)]) for row in lengths])
    return tokens, positions, documents


@pytest.mark.parametrize("name", CONFIGS)
def test_a_packed_row_equals_each_document_alone(name: str) -> None:
    decoder = decoder_of(name)
    tokens, positions, documents = packed(LENGTHS)
    logits = decoder(tokens, positions, documents)
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            part = slice(start, start + length)
            alone = decoder(tokens[row : row + 1, part])[0]
            torch.testing.assert_close(logits[row, part], alone, rtol=0, atol=1e-12)
            start += length


@pytest.mark.parametrize("name", CONFIGS)
def test_a_document_changes_no_other(name: str) -> None:
    decoder = decoder_of(name)
    tokens, positions, documents = packed([[5, 9, 2], [4, 6, 6]])
    before = decoder(tokens, positions, documents)
    changed = tokens.clone()
    changed[0, 5:14] = (tokens[0, 5:14] + 1) % 50  # the second document of the first row
    after = decoder(changed, positions, documents)
    same = (before - after).abs().amax(-1) < 1e-12
    expected = torch.ones(2, 16, dtype=torch.bool)
    expected[0, 5:14] = False
    assert torch.equal(same, expected)


def test_no_token_sees_what_follows() -> None:
    decoder = decoder_of("dense")
    tokens, _, _ = packed([[16]])
    changed = tokens.clone()
    changed[0, 9] = (tokens[0, 9] + 1) % 50
    same = (decoder(tokens) - decoder(changed))[0].abs().amax(-1) < 1e-12
    assert same.tolist() == [True] * 9 + [False] * 7


def test_without_document_ids_a_row_is_one_document() -> None:
    decoder = decoder_of("dense")
    tokens, positions, documents = packed([[16], [16]])
    torch.testing.assert_close(decoder(tokens), decoder(tokens, positions, documents), rtol=0, atol=0)


def test_heads_share_keys_and_values_as_grouped_query_attention_says() -> None:
    """Against the textbook: softmax(q k^T / sqrt(d)) v, query head h reading key head h // (H / G)."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 7, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    out = attend(q, k, v, None)
    hidden = torch.ones(7, 7, dtype=torch.bool).triu(1)
    for head in range(4):
        scores = q[:, :, head] @ k[:, :, head // 2].transpose(1, 2) / 8**0.5
        expected = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v[:, :, head // 2]
        torch.testing.assert_close(out[:, :, head], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("documents", "lengths"),
    [
        ([[0, 0, 0]], None),
        ([[0, 0], [0, 0]], None),
        ([[7, 7], [-1, -1]], None),
        ([[0, 0, 1], [0, 0, 0]], [2, 1, 3]),
        ([[0, 1, 2], [2, 2, -1]], [1, 1, 1, 2, 1]),
    ],
)
def test_document_lengths_never_cross_rows(documents: list[list[int]], lengths: list[int] | None) -> None:
    assert document_lengths(torch.tensor(documents)) == lengths
