"""Decoding with the cache: the same logits as computing everything anew, one token's work at a time."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moray.model import Decoder, KVCache, ModelConfig, initialise

NARROW = {"n_layers": 3, "d_model": 32, "vocab_size": 64, "ffn": {"width": 48}, "init": {"std": 0.3}}
GROUPED = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 8}
LATENT = {"n_heads": 4, "n_kv_heads": 4, "head_dim": 10, "qk_norm": None}
LATENT |= {"latent": {"kv_rank": 12, "q_rank": 9, "nope_dim": 6, "rope_dim": 4, "value_dim": 8}}


def config_of(name: str, attention: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    moe = {"moe": {"expert_width": 16}} if name.endswith("-moe") else {}
    return ModelConfig.preset(name, **NARROW | moe | changes, attention=GROUPED | (attention or {}))


CONFIGS = {
    "minimind-3": config_of("minimind-3"),
    "minimind-3-moe": config_of("minimind-3-moe"),
    "demo-dense": config_of("demo-dense"),
    "demo-moe": config_of("demo-moe"),
    "multi-query": config_of("demo-dense", {"n_kv_heads": 1}),
    "norm of all heads": config_of("demo-dense", {"qk_norm": "full", "qkv_bias": True, "output_bias": True}),
    "window": config_of("demo-dense", {"window": 4}),
    "window and global": config_of("demo-dense", {"window": 7, "pattern": ("local", "global")}),
    "window of one": config_of("demo-dense", {"window": 1, "pattern": ("local", "global")}),
    "softcap": config_of("demo-dense", {"softcap": 2.0}),
    "softcap and window": config_of("demo-dense", {"softcap": 2.0, "window": 4, "pattern": ("local", "global")}),
    "partial, interleaved": config_of("demo-dense", position={"rotary_dim": 4, "interleaved": True}),
    "learned positions": config_of("demo-dense", position={"kind": "learned"}, max_seq_len=64),
    "latent": config_of("demo-dense", LATENT),
    "latent-moe": config_of("demo-moe", LATENT),
    "convolution": config_of("demo-dense", {"window": 4}, ffn={"width": 48, "conv_width": 3}),
}
PROMPT = torch.tensor([[5, 9, 2, 33, 17]])


def decoder_of(name: str) -> Decoder:
    decoder = Decoder(CONFIGS[name]).double().eval()
    initialise(decoder, seed=4)
    return decoder


def cache_of(decoder: Decoder, batch: int, capacity: int) -> KVCache:
    return KVCache(decoder.config, batch, capacity, decoder.embedding.weight)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_greedy_tokens_and_logits_equal_those_without_a_cache(name: str) -> None:
    decoder = decoder_of(name)
    cache = cache_of(decoder, 1, 25)
    tokens, new = PROMPT, PROMPT
    for _ in range(20):
        logits = decoder(new, cache=cache)[:, -1]
        truth = decoder(tokens)[:, -1]
        torch.testing.assert_close(logits, truth, rtol=0, atol=1e-11)
        new = logits.argmax(-1, keepdim=True)
        tokens = torch.cat((tokens, new), 1)
    assert len(set(tokens[0].tolist())) > 5, "a stuck model would prove little"


@pytest.mark.parametrize("pieces", [[1] * 24, [2, 9, 1, 1, 5, 6], [9, 4, 1, 3, 1, 1, 5], [24]])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_a_prompt_in_pieces_gives_the_logits_of_the_whole(name: str, pieces: list[int]) -> None:
    decoder = decoder_of(name)
    tokens = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(0))
    cache = cache_of(decoder, 2, 24)
    logits = torch.cat([decoder(piece, cache=cache) for piece in tokens.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(logits, decoder(tokens), rtol=0, atol=1e-11)


@pytest.mark.parametrize("pieces", [[8, 1, 1, 1, 1, 1, 1, 1, 1], [3, 4, 1, 1, 7], [1] * 16])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_left_padded_rows_give_the_logits_they_give_alone(name: str, pieces: list[int]) -> None:
    """Positions are counted from the first real token. Documents are told until the last row has begun."""
    decoder = decoder_of(name)
    padding = [3, 0, 6]
    tokens = torch.randint(64, (3, 16), generator=torch.Generator().manual_seed(0))
    documents = torch.tensor([[-1] * n + [0] * (16 - n) for n in padding])
    cache = cache_of(decoder, 3, 16)
    logits = []
    for piece, ids in zip(tokens.split(pieces, 1), documents.split(pieces, 1), strict=True):
        is_prompt = cache.length < max(padding)
        logits.append(decoder(piece, documents_BT=ids if is_prompt else None, cache=cache))
    together = torch.cat(logits, 1)
    assert together.isfinite().all()
    for row, n in enumerate(padding):
        alone = decoder(tokens[row : row + 1, n:])[0]
        torch.testing.assert_close(together[row, n:], alone, rtol=0, atol=1e-11)


@torch.no_grad()
def test_rows_of_a_batch_are_decoded_alone() -> None:
    decoder = decoder_of("demo-moe")
    prompts = torch.randint(64, (3, 4), generator=torch.Generator().manual_seed(0))
    cache = cache_of(decoder, 3, 6)
    first = decoder(prompts, cache=cache)[:, -1:].argmax(-1)
    logits = decoder(first, cache=cache)[:, -1]
    for row in range(3):
        truth = decoder(torch.cat((prompts, first), 1)[row : row + 1])[0, -1]
        torch.testing.assert_close(logits[row], truth, rtol=0, atol=1e-11)


@torch.no_grad()
def test_a_step_costs_one_token() -> None:
    decoder = decoder_of("demo-moe")
    seen = []
    for block in decoder.blocks:
        hook: nn.Module = block.attention.query
        hook.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
    cache = cache_of(decoder, 1, 8)
    decoder(PROMPT, cache=cache)
    for token in (1, 2, 3):
        decoder(torch.tensor([[token]]), cache=cache)
    assert seen == [5] * 3 + [1] * 9
    assert cache.length == 8


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        # Per layer: tokens held, times keys and values of two heads of 8 (or kv_rank + rope_dim).
        ("demo-dense", 3 * 40 * 2 * 2 * 8),
        ("window", 3 * 4 * 2 * 2 * 8),
        ("window and global", (7 + 40 + 7) * 2 * 2 * 8),
        ("latent", 3 * 40 * (12 + 4)),
        ("convolution", 3 * 4 * 2 * 2 * 8 + 3 * 2 * 48),
    ],
)
def test_memory_is_what_the_layers_need_and_does_not_grow(name: str, numbers: int) -> None:
    decoder = decoder_of(name)
    cache = cache_of(decoder, 2, 40)
    assert cache.n_bytes == 0
    for new in (PROMPT.repeat(2, 1), *torch.zeros(20, 2, 1, dtype=torch.long)):
        decoder(new, cache=cache)
        assert cache.n_bytes == 2 * numbers * 8


@torch.no_grad()
def test_more_than_the_cache_holds_is_refused() -> None:
    decoder = decoder_of("demo-dense")
    with pytest.raises(ValueError, match="the cache holds 4 tokens; 5 were to be stored"):
        decoder(PROMPT, cache=cache_of(decoder, 1, 4))
    with pytest.raises(ValueError, match="the cache holds batch=1 sequences; 2 came"):
        decoder(PROMPT.repeat(2, 1), cache=cache_of(decoder, 1, 9))


@torch.no_grad()
@pytest.mark.parametrize(
    "documents",
    [
        [[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]],  # packed
        [[0, 0, 0, -1, -1], [0, 0, 0, 0, 0]],  # padding behind
        [[-1, 0, 0, 0, 1], [0, 0, 0, 0, 0]],  # padding, then packed
    ],
)
def test_rows_that_are_not_one_document_behind_padding_are_refused(documents: list[list[int]]) -> None:
    decoder = decoder_of("demo-dense")
    with pytest.raises(ValueError, match="with a cache a row is one document, with padding"):
        decoder(PROMPT.repeat(2, 1), documents_BT=torch.tensor(documents), cache=cache_of(decoder, 2, 9))


@torch.no_grad()
def test_padding_behind_tokens_in_the_cache_is_refused() -> None:
    decoder = decoder_of("demo-dense")
    cache = cache_of(decoder, 1, 20)
    decoder(PROMPT, cache=cache)
    with pytest.raises(ValueError, match=r"padding .* behind tokens of a cache that holds 5 already"):
        decoder(PROMPT, documents_BT=torch.tensor([[-1, -1, 0, 0, 0]]), cache=cache)


@torch.no_grad()
def test_the_cache_has_the_dtype_and_device_of_the_weights() -> None:
    like: Tensor = torch.empty(1, dtype=torch.bfloat16, device="meta")
    cache = KVCache(CONFIGS["demo-dense"], 2, 7, like)
    keys, values = cache.extend(1, *torch.zeros(2, 2, 2, 3, 8, dtype=torch.bfloat16, device="meta"))
    assert keys.shape == values.shape == (2, 2, 3, 8)
    assert keys.dtype == torch.bfloat16
    assert keys.device.type == "meta"
