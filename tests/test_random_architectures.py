"""Parts combine: architectures drawn at random, each computed in two ways, in fp64, that must agree."""

from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moray.jobs.config.load import load_config
from moray.jobs.config.recipe_file import to_toml
from moray.jobs.config.run import RunConfig
from moray.model import Decoder, KVCache, ModelConfig, Randomness, initialise
from moray.model.accounting.cost import cache_bytes, count_parameters

ROWS, TOKENS, VOCABULARY = 4, 11, 31
YARN = {"kind": "yarn", "factor": 4.0, "original_max_seq_len": 8}
LATENT = {"kv_rank": 8, "nope_dim": 4, "rope_dim": 4}
LOSSES = ("balance", "device", "communication", "importance", "load", "router_z")

WHOLE: dict[str, list[Any]] = {
    "n_layers": [1, 2, 3],
    "d_model": [16, 24],
    "tied_embeddings": [True, False],
    "head_bias": [False, False, True],
    "embedding_scale": [1.0, 4.0],
    "final_softcap": [None, 3.0],
    "z_loss": [0.0, 0.1],
    "residual": ["sequential", "sequential", "parallel"],
}
PARTS: dict[str, dict[str, list[Any]]] = {
    "norm": {
        "kind": ["rmsnorm", "layernorm", "crmsnorm"],
        "placement": ["pre", "pre", "post", "sandwich"],
        "unit_offset": [False, True],
        "bias": [False, True],
    },
    "position": {
        "kind": ["rope", "rope", "learned", None],
        "theta": [1e2, 1e6],
        "rotary_dim": [None, None, 4],
        "interleaved": [False, True],
        "scaling": [None, {"kind": "linear", "factor": 2.0}, {"kind": "ntk", "factor": 2.0}, YARN],
    },
    "attention": {
        "n_heads": [4, 6],
        "n_kv_heads": [1, 2, 4, 6],
        "head_dim": [4, 8],
        "qkv_bias": [False, True],
        "output_bias": [False, True],
        "qk_norm": [None, "head", "full"],
        "scale": [None, 0.3],
        "softcap": [None, 2.0],
        "window": [None, 2, 3, 40],
        "pattern": [("local",), ("local", "global"), ("global", "local")],
        "latent": [None, None, LATENT | {"value_dim": 6}, LATENT | {"value_dim": 12, "q_rank": 6}],
    },
    "ffn": {
        "width": [16, 40],
        "activation": ["relu", "relu2", "gelu", "gelu_tanh", "silu"],
        "gated": [True, False],
        "bias": [False, True],
        "conv_width": [0, 0, 1, 3],
        "adapter_rank": [0, 0, 2],
    },
    "moe": {
        "n_experts": [4, 6, 8],
        "top_k": [1, 2, 3],
        "expert_width": [8, 16],
        "n_shared": [0, 1],
        "shared_gate": [False, True],
        "n_dense_layers": [0, 1],
        "every": [1, 2],
        "score": ["softmax", "sigmoid"],
        "normalise_gates": [True, False],
        "gate_scale": [1.0, 2.5],
        "n_groups": [1, 2],
        "top_k_groups": [1, 2],
        "group_score": ["max", "top2"],
        "noisy": [False, True],
        "jitter": [0.0, 0.1],
        "second_expert": ["always", "random"],
        "group_size": [1, 2],
        "capacity_factor": [None, 0.5, 1.25],
        "drop_by": ["position", "gate"],
        "balance_counts": ["all", "first"],
        "balance_over": ["layer", "model"],
        **{f"{name}_loss": [0.0, 0.1] for name in LOSSES},
    },
}
SEEDS = range(25)


@cache
def drawn(seed: int) -> ModelConfig:
    """The first combination that makes sense, every second one with experts."""
    random, tried = Random(seed), 0
    while True:
        tried += 1
        fields = {name: random.choice(options) for name, options in WHOLE.items()}
        for part, choices in PARTS.items():
            fields[part] = {name: random.choice(options) for name, options in choices.items()}
        if seed % 2:
            fields["moe"] = None
        try:
            return ModelConfig(vocab_size=VOCABULARY, max_seq_len=64, init={"std": 0.3}, **fields)  # type: ignore[arg-type]
        except ValueError:
            assert tried < 100_000


@cache
def decoder_of(seed: int) -> Decoder:
    """In fp64; biases, norms and what else starts at 0 or 1 are moved."""
    decoder = Decoder(drawn(seed)).double()
    initialise(decoder, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in decoder.named_parameters():
        if parameter.ndim == 1 or "bias" in name or "adapter" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return decoder.eval()


def tokens(seed: int) -> Tensor:
    return torch.randint(VOCABULARY, (ROWS, TOKENS), generator=torch.Generator().manual_seed(seed))


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_loss_is_that_of_the_logits(seed: int) -> None:
    decoder, targets = decoder_of(seed), tokens(seed + 1)
    targets[0, :3] = -100
    losses, logits = decoder.loss(tokens(seed), targets), decoder(tokens(seed)).flatten(0, 1)
    cross_entropy = F.cross_entropy(logits, targets.flatten(), reduction="sum")
    z = decoder.config.z_loss * logits[targets.flatten() != -100].logsumexp(-1).square().sum()
    assert_same(losses.cross_entropy, cross_entropy)
    assert_same(losses.z, z)
    weights = list(decoder.parameters())
    found, expected = (
        torch.autograd.grad(loss, weights, allow_unused=True) for loss in (losses.cross_entropy, cross_entropy + z)
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None and theirs is None) or torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9)  # noise: none


@pytest.mark.parametrize("seed", SEEDS)
def test_micro_batches_add_up_and_every_weight_learns(seed: int) -> None:
    decoder, config = decoder_of(seed), drawn(seed)
    size = config.moe.group_size if config.moe else 1

    def gradients(pieces: list[slice]) -> dict[str, Tensor]:
        decoder.zero_grad()
        for rows in pieces:
            drawn_from = Randomness(seed, 0, torch.arange(ROWS)[rows])
            losses = decoder.loss(tokens(seed)[rows], tokens(seed + 1)[rows], randomness=drawn_from)
            (losses.cross_entropy + losses.auxiliary).backward()
        return {name: parameter.grad.clone() for name, parameter in decoder.named_parameters()}  # type: ignore[union-attr]

    decoder.train()
    together = gradients([slice(0, ROWS)])
    apart = gradients([slice(first, first + size) for first in range(0, ROWS, size)])
    decoder.eval()
    for name, gradient in together.items():
        assert_same(apart[name], gradient)
        # A lone gate divided by itself is 1: then balance losses alone reach the router.
        is_taught = config.moe is None or config.moe.top_k > 1 or not config.moe.normalise_gates
        assert gradient.any() or ("router" in name and not is_taught), name


@pytest.mark.parametrize("seed", SEEDS)
def test_a_cache_computes_what_a_whole_pass_does(seed: int) -> None:
    decoder, config = decoder_of(seed), drawn(seed)
    with torch.no_grad():
        whole = decoder(tokens(seed))
        for lengths in ([1] * TOKENS, [4, 3, 1, 3]):
            cache = KVCache(config, ROWS, TOKENS, decoder.embedding.weight)
            pieces = [decoder(piece, cache=cache) for piece in tokens(seed).split(lengths, dim=1)]
            assert_same(torch.cat(pieces, dim=1), whole)
            assert cache.n_bytes == ROWS * cache_bytes(config, TOKENS, torch.float64)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_cache_behind_left_padding_computes_what_the_document_does(seed: int) -> None:
    decoder, ids, documents = decoder_of(seed), tokens(seed), torch.zeros(ROWS, TOKENS, dtype=torch.int64)
    cache = KVCache(decoder.config, ROWS, TOKENS, decoder.embedding.weight)
    for row in range(ROWS):
        documents[row, :row] = -1
    with torch.no_grad():
        pieces = [decoder(ids[:, :5], documents_BT=documents[:, :5], cache=cache)]
        pieces += [decoder(token, cache=cache) for token in ids[:, 5:].split(1, dim=1)]
        for row, found in enumerate(torch.cat(pieces, dim=1)):
            assert_same(found[row:], decoder(ids[row : row + 1, row:])[0])


@pytest.mark.parametrize("seed", SEEDS)
def test_packed_documents_and_padding_see_nothing_of_each_other(seed: int) -> None:
    """Padding, a document of 2 tokens, one of 5 and one of 3."""
    decoder, ids = decoder_of(seed), tokens(seed)
    lengths = [1, 2, 5, 3]
    documents = torch.repeat_interleave(torch.arange(-1, 3), torch.tensor(lengths)).expand(ROWS, -1)
    positions = torch.cat([torch.arange(length) for length in lengths]).expand(ROWS, -1)
    with torch.no_grad():
        packed = decoder(ids, positions, documents).split(lengths, dim=1)
        for found, document in list(zip(packed, ids.split(lengths, dim=1), strict=True))[1:]:
            assert_same(found, decoder(document))


@pytest.mark.parametrize("seed", SEEDS)
def test_its_cost_and_its_recipe_describe_it(seed: int, tmp_path: Path) -> None:
    config = drawn(seed)
    assert count_parameters(config).total == sum(parameter.numel() for parameter in decoder_of(seed).parameters())
    # A router that learns nothing may be loaded, not trained.
    if config.moe:
        config = config.but(moe={"balance_loss": 0.1})
    run = RunConfig(model=config, data={"path": "data"}, run={"dir": "run"}, train={"seq_len": 8})  # type: ignore[arg-type]
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(to_toml(run))
    assert load_config(str(recipe), {}) == run
