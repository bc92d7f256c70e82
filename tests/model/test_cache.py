"""Decoding with the KV cache: the same logits as computing everything anew, one token's work at a time."""

import pytest
import torch
from torch import Tensor, nn

from model import Decoder, KVCache, ModelConfig, initialise

NARROW = {"n_layers": 3, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "d_ff": 48, "vocab_size": 64}
NARROW |= {"init_std": 0.3}
CONFIGS = {
    "minimind-3": ModelConfig.preset("minimind-3", **NARROW),
    "minimind-3-moe": ModelConfig.preset("minimind-3-moe", **NARROW, d_expert=24),
    "demo-dense": ModelConfig.preset("demo-dense", **NARROW),
    "demo-moe": ModelConfig.preset("demo-moe", **NARROW, d_expert=16),
}
PROMPT = torch.tensor([[5, 9, 2, 33, 17]])


def decoder_of(name: str) -> Decoder:
    decoder = Decoder(CONFIGS[name]).double().eval()
    initialise(decoder, seed=4)
    return decoder


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_greedy_tokens_and_logits_equal_those_without_a_cache(name: str) -> None:
    decoder = decoder_of(name)
    cache = KVCache(decoder.config, 1, 25, decoder.embedding.weight)
    tokens, new = PROMPT, PROMPT
    for _ in range(20):
        logits = decoder(new, cache=cache)[:, -1]
        truth = decoder(tokens)[:, -1]
        torch.testing.assert_close(logits, truth, rtol=0, atol=1e-11)
        new = logits.argmax(-1, keepdim=True)
        tokens = torch.cat((tokens, new), 1)
    assert len(set(tokens[0].tolist())) > 5, "a stuck model would prove little"


@torch.no_grad()
def test_rows_of_a_batch_are_decoded_alone() -> None:
    decoder = decoder_of("demo-moe")
    prompts = torch.randint(64, (3, 4), generator=torch.Generator().manual_seed(0))
    cache = KVCache(decoder.config, 3, 6, decoder.embedding.weight)
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
    cache = KVCache(decoder.config, 1, 8, decoder.embedding.weight)
    decoder(PROMPT, cache=cache)
    for token in (1, 2, 3):
        decoder(torch.tensor([[token]]), cache=cache)
    assert seen == [5] * 3 + [1] * 9
    assert cache.length == 8


@torch.no_grad()
def test_a_full_cache_and_a_second_prompt_are_refused() -> None:
    decoder = decoder_of("demo-dense")

    def cache_of(capacity: int) -> KVCache:
        return KVCache(decoder.config, 1, capacity, decoder.embedding.weight)

    with pytest.raises(ValueError, match="the cache holds 4 tokens; 5 were to be stored"):
        decoder(PROMPT, cache=cache_of(4))
    used = cache_of(20)
    decoder(PROMPT, cache=used)
    with pytest.raises(ValueError, match="5 tokens at once follow a cache of 5; after the prompt, give one"):
        decoder(PROMPT, cache=used)


def test_the_cache_has_the_dtype_of_the_weights() -> None:
    like: Tensor = torch.empty(1, dtype=torch.bfloat16)
    cache = KVCache(CONFIGS["demo-dense"], 2, 7, like)
    assert cache.keys.shape == cache.values.shape == (3, 2, 2, 7, 8)
    assert cache.keys.dtype == torch.bfloat16
