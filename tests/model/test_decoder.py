"""What stands before the first block and after the last: embedding, positions, final norm, head, losses."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moray.model import Decoder, KVCache, ModelConfig, initialise

V, LONGEST = 40, 16
NARROW: dict[str, Any] = {
    "n_layers": 2,
    "d_model": 24,
    "vocab_size": V,
    "max_seq_len": LONGEST,
    "attention": {"n_heads": 3, "n_kv_heads": 3, "head_dim": 8},
    "ffn": {"width": 40},
    "init": {"std": 0.3},
}
# Everything that the output can have, and a plain model.
CONFIGS = {
    "plain": ModelConfig(**NARROW),
    "gemma": ModelConfig(
        **NARROW,
        norm={"placement": "sandwich", "unit_offset": True},
        embedding_scale=24**0.5,
        final_softcap=2.0,
        z_loss=0.01,
    ),
    "gpt": ModelConfig(
        **NARROW,
        norm={"kind": "layernorm", "bias": True},
        position={"kind": "learned"},
        tied_embeddings=False,
        head_bias=True,
        z_loss=0.01,
    ),
    "post": ModelConfig(**NARROW, norm={"kind": "layernorm", "placement": "post"}, position={"kind": "learned"}),
    "moe": ModelConfig(**NARROW, moe={"n_experts": 4, "expert_width": 16, "balance_loss": 0.1}, final_softcap=2.0),
}
TOKENS = torch.randint(V, (2, 13), generator=torch.Generator().manual_seed(0))


def decoder_of(config: ModelConfig) -> Decoder:
    decoder = Decoder(config).double()
    initialise(decoder, seed=0)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    return decoder


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_loss_is_that_of_the_logits_with_every_gradient(config: ModelConfig) -> None:
    decoder = decoder_of(config)
    targets = TOKENS.roll(-1, 1)
    targets[:, -1] = -100
    losses = decoder.loss(TOKENS, targets)
    (losses.cross_entropy + losses.z).backward()
    gradients = {name: parameter.grad for name, parameter in decoder.named_parameters()}
    decoder.zero_grad()
    logits = decoder(TOKENS)[:, :-1].flatten(0, 1)
    cross_entropy = F.cross_entropy(logits, targets[:, :-1].flatten(), reduction="sum")
    z = config.z_loss * (logits.logsumexp(-1) ** 2).sum()
    torch.testing.assert_close(losses.cross_entropy, cross_entropy, rtol=1e-12, atol=0)
    torch.testing.assert_close(losses.z, z.detach(), rtol=1e-12, atol=0)
    (cross_entropy + z).backward()
    for name, parameter in decoder.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_are_what_the_config_says_of_what_the_blocks_give(config: ModelConfig) -> None:
    """Embedding, positions, norm, head and soft-cap written out around the decoder's own blocks."""
    decoder = decoder_of(config)
    seen: list[Tensor] = []
    decoder.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    decoder.blocks[-1].register_forward_hook(lambda _, args, out: seen.append(out[0]))
    logits = decoder(TOKENS)
    first, last = seen
    embedded = decoder.embedding.weight[TOKENS] * config.embedding_scale
    if config.position.kind == "learned":
        assert decoder.position_embedding is not None
        embedded = embedded + decoder.position_embedding.weight[:13]
    torch.testing.assert_close(first, embedded)
    expected = decoder.norm(last) @ decoder.head.weight.T
    if config.head_bias:
        expected = expected + decoder.head.bias
    if config.final_softcap:
        assert expected.abs().max() > config.final_softcap
        expected = config.final_softcap * torch.tanh(expected / config.final_softcap)
    torch.testing.assert_close(logits, expected)


def test_post_norm_has_no_norm_after_the_last_block() -> None:
    decoder = decoder_of(CONFIGS["post"])
    assert not list(decoder.norm.parameters())
    assert list(decoder_of(CONFIGS["gpt"]).norm.parameters())


@pytest.mark.parametrize("name", ["plain", "gemma", "gpt", "post"])
def test_positions_follow_what_the_cache_holds(name: str) -> None:
    decoder = decoder_of(CONFIGS[name]).eval()
    cache = KVCache(decoder.config, 2, LONGEST, decoder.embedding.weight)
    with torch.no_grad():
        pieces = [decoder(TOKENS[:, :9], cache=cache)]
        pieces += [decoder(TOKENS[:, [i]], cache=cache) for i in range(9, 13)]
        torch.testing.assert_close(torch.cat(pieces, 1), decoder(TOKENS), rtol=1e-10, atol=1e-10)


def test_learned_positions_can_be_given() -> None:
    """The same places at other columns: two packed documents are what they are alone."""
    decoder = decoder_of(CONFIGS["gpt"])
    ids, places = torch.tensor([[0] * 5 + [1] * 8] * 2), torch.tensor([[*range(5), *range(8)]] * 2)
    packed = decoder(TOKENS, positions_BT=places, documents_BT=ids)
    torch.testing.assert_close(packed, torch.cat((decoder(TOKENS[:, :5]), decoder(TOKENS[:, 5:])), 1))


def test_more_tokens_than_learned_positions_are_refused() -> None:
    decoder, tokens = decoder_of(CONFIGS["gpt"]), torch.zeros(1, LONGEST + 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"model\.max_seq_len=16 .* 17 tokens"):
        decoder(tokens)
    decoder_of(CONFIGS["plain"])(tokens)


def test_with_learned_positions_nothing_else_tells_the_order() -> None:
    """One layer whose position embeddings are all the same cannot tell which token came first; others can."""

    def change(equal_places: bool, **position: Any) -> float:
        decoder = decoder_of(ModelConfig(**{**NARROW, "n_layers": 1}, position=position))
        if decoder.position_embedding is not None and equal_places:
            torch.nn.init.ones_(decoder.position_embedding.weight)
        shuffled = torch.cat((TOKENS[:, :-1].flip(1), TOKENS[:, -1:]), 1)
        return (decoder(shuffled)[:, -1] - decoder(TOKENS)[:, -1]).abs().max().item()

    assert change(equal_places=True, kind="learned") < 1e-12
    assert change(equal_places=False, kind="learned") > 1e-3
    assert change(equal_places=True, kind="rope") > 1e-3


@pytest.mark.parametrize("name", ["plain", "gpt"])
def test_left_padding_changes_nothing(name: str) -> None:
    """Learned positions too count from a row's first token: prompts of 5 and 9 tokens, side by side and alone."""
    decoder = decoder_of(CONFIGS[name]).eval()
    cache = KVCache(decoder.config, 2, LONGEST, decoder.embedding.weight)
    ids = torch.tensor([[-1] * 4 + [0] * 5, [0] * 9])
    with torch.no_grad():
        prompts = decoder(TOKENS[:, :9], documents_BT=ids, cache=cache)
        following = decoder(TOKENS[:, 9:10], cache=cache)
        found = torch.cat((prompts, following), 1)
        torch.testing.assert_close(found[:1, 4:], decoder(TOKENS[:1, 4:10]), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found[1:], decoder(TOKENS[1:, :10]), rtol=1e-10, atol=1e-10)
