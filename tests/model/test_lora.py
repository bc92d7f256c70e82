"""Adapters against what they are defined as, and against peft's on the transformers model."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from architectures import MODELS, PIECES
from law1 import SEED, drawn_adapter, global_batch
from torch import Tensor, nn

from moray.model import Decoder, ModelConfig, initialise
from moray.model.attention.cache import KVCache
from moray.model.hf import load_pretrained
from moray.model.lora import (
    AdaptedExperts,
    LoRA,
    Merged,
    adapter_shapes,
    add_adapters,
    balancing_of,
    targets_in,
    without_balancing,
)
from moray.model.moe.experts import Experts
from moray.model.tensors import Box, Read, tensor_shapes, whole

GPT = "GPT: biases, learned positions, LayerNorm, z-loss"
KINDS = {**MODELS, "latent": PIECES["latent attention"][0], "gpt": PIECES[GPT][0]}


def adapted(config: ModelConfig, lora: LoRA, dtype: torch.dtype, *, is_new: bool = False) -> Decoder:
    """The base is what SEED makes of the config."""
    decoder = Decoder(config)
    add_adapters(decoder, lora)
    decoder.to(dtype)
    initialise(decoder, SEED)
    with torch.no_grad():
        for name, weight in decoder.named_parameters():
            if weight.requires_grad and not is_new:
                weight.copy_(drawn_adapter(name, weight.shape))
    return decoder


def merged(tensors: dict[str, Tensor], config: ModelConfig, lora: LoRA) -> Read:
    def read(name: str, box: Box) -> Tensor:
        return tensors[name][box]

    return Merged(read, read, adapter_shapes(config, lora), lora.scale).read


def inputs() -> dict[str, Tensor]:
    return {name: x for name, x in global_batch(0).items() if name != "targets_BT"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_new_adapters_change_no_bit(name: str, dtype: torch.dtype) -> None:
    config = KINDS[name]
    base = Decoder(config).to(dtype)
    initialise(base, SEED)
    decoder = adapted(config, LoRA(8, 16.0, targets_in(config)), dtype, is_new=True)
    assert torch.equal(decoder(**inputs()), base(**inputs()))


@pytest.mark.parametrize("name", KINDS)
def test_merged_weights_compute_the_same(name: str) -> None:
    config = KINDS[name]
    lora = LoRA(8, 12.0, targets_in(config))
    decoder = adapted(config, lora, torch.float64)
    tensors = decoder.state_dict()
    read = merged(tensors, config, lora)
    plain = Decoder(config).double()
    own = plain.state_dict()
    for tensor, shape in tensor_shapes(config).items():
        own[tensor].copy_(read(tensor, whole(shape)))
    found, expected = decoder(**inputs()), plain(**inputs())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    initialise(plain, SEED)
    assert (plain(**inputs()) - expected).abs().max() > 0.1, "or nothing was added"


def test_a_part_of_a_merged_tensor_is_that_part_of_the_whole() -> None:
    config = MODELS["moe-deepseek"]
    lora = LoRA(8, 16.0, targets_in(config))
    tensors = adapted(config, lora, torch.float64).state_dict()
    read = merged(tensors, config, lora)
    for name, box in {
        "blocks.0.attention.key.weight": (slice(3, 9), slice(5, 30)),
        "blocks.1.ffn.experts.up_EFD": (slice(2, 5), slice(1, 7), slice(0, 11)),
    }.items():
        torch.testing.assert_close(read(name, box), read(name, whole(tensors[name].shape))[box], rtol=1e-14, atol=1e-14)


def test_each_expert_has_its_own_adapters() -> None:
    """Expert by expert, against the definition; one has no row at all (unsloth#6930: adapters mixed up on merging)."""
    config = MODELS["moe-deepseek"]
    experts = Experts(4, 16, 24, config.expert_ffn).double()
    torch.manual_seed(0)
    for weight in experts.parameters():
        torch.nn.init.normal_(weight)
    many = AdaptedExperts(experts, LoRA(8, 24.0, ("experts",))).double()
    for name, weight in many.named_parameters():
        weight.requires_grad_("lora" in name)
        if "lora" in name:
            torch.nn.init.normal_(weight)
    counts, rows = [5, 0, 2, 6], torch.randn(13, 16, dtype=torch.float64)
    grad = torch.randn(13, 16, dtype=torch.float64)
    found = many(rows, torch.tensor(counts))
    found.backward(grad)
    leaves = {name: w.detach().clone().requires_grad_() for name, w in many.named_parameters() if "lora" in name}
    parts = []
    for e, x in enumerate(rows.split(counts)):
        gate, up, down = (
            getattr(experts, weight)[e] + 3.0 * leaves[f"{kind}_lora_b"][e] @ leaves[f"{kind}_lora_a"][e]
            for kind, weight in (("gate", "gate_EFD"), ("up", "up_EFD"), ("down", "down_EDF"))
        )
        parts.append((F.silu(x @ gate.t()) * (x @ up.t())) @ down.t())
    expected = torch.cat(parts)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    expected.backward(grad)
    for name, leaf in leaves.items():
        gradient = getattr(many, name).grad
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-12, atol=1e-12)
        assert not gradient[1].any(), "zero, and not missing"
    assert all(weight.grad is None for name, weight in many.named_parameters() if "lora" not in name)


@pytest.mark.parametrize("name", ["dense", "latent", "moe-deepseek"])
def test_decoding_with_a_cache_has_the_adapters(name: str) -> None:
    """Latent attention then multiplies with the matrix itself."""
    config = KINDS[name]
    decoder = adapted(config, LoRA(8, 12.0, targets_in(config)), torch.float64).eval()
    tokens = global_batch(0)["tokens_BT"][:2]
    cache = KVCache(config, *tokens.shape, decoder.embedding.weight)
    steps = torch.cat([decoder(tokens[:, t : t + 1], cache=cache) for t in range(tokens.shape[1])], dim=1)
    torch.testing.assert_close(steps, decoder(tokens), rtol=1e-10, atol=1e-10)


def test_a_matrix_starts_as_pefts_does() -> None:
    """Uniform within 1 / sqrt(inputs), whatever the rank; B is zero."""
    config = MODELS["dense"].but(d_model=512, ffn={"width": 512})
    decoder = adapted(config, LoRA(16, 1.0, ("dense",)), torch.float32, is_new=True)
    for name, weight in decoder.named_parameters():
        if name.endswith("lora_b"):
            assert not weight.any()
        elif name.endswith("lora_a"):
            bound = 512**-0.5
            assert 0.99 * bound < weight.abs().max() <= bound
            assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)
    first, second = decoder.blocks[0].ffn.up.lora_a, decoder.blocks[1].ffn.up.lora_a
    assert not torch.equal(first, second)


def test_what_there_is_to_adapt() -> None:
    dense, moe = MODELS["dense"], MODELS["moe-deepseek"]
    assert targets_in(dense) == ("attention", "dense")
    assert targets_in(moe) == ("attention", "dense", "experts", "shared")
    assert targets_in(MODELS["moe-softmax"]) == ("attention", "experts")
    for target in targets_in(moe):
        assert adapter_shapes(moe, LoRA(8, 1.0, (target,)))
    names = adapter_shapes(moe, LoRA(8, 1.0, ("shared", "dense")))
    assert {name.rpartition(".")[0] for name in names} == {
        f"blocks.{i}.ffn.{part}{kind}"
        for i, part in enumerate(("", "shared.", "shared."))
        for kind in ("gate", "up", "down")
    }


def test_frozen_routers_are_taught_nothing() -> None:
    config = MODELS["moe-deepseek"]
    assert balancing_of(config) == {"balance_loss": 0.1, "bias_update_rate": 0.05, "device_bias_update_rate": 0.02}
    assert balancing_of(without_balancing(config)) == {}
    assert without_balancing(MODELS["dense"]) == MODELS["dense"]


# peft ----------------------------------------------------------------------------------------------------------------

MODULES = {
    "query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj", "output": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip


class Rotary(nn.Module):
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None] * 1e4 ** (-torch.arange(0, 8, 2, dtype=x.dtype) / 8)
        return torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()


def their_model() -> Any:
    """Norms and positions, which transformers computes in fp32 whatever the dtype, are torch's and a formula's."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, initializer_range=0.2, rope_theta=1e4,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").double()
    for name in [name for name, _ in model.named_modules()]:
        if name.endswith("norm"):
            parent, _, last = name.rpartition(".")
            norm = nn.RMSNorm(32, config.rms_norm_eps, dtype=torch.float64)
            setattr(model.get_submodule(parent), last, norm)
    model.model.rotary_emb = Rotary()
    return model


def test_peft_computes_the_same_forward_and_the_same_gradients(tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    theirs = their_model()
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path, torch.float64)
    lora = LoRA(4, 10.0, ("attention", "dense"))
    add_adapters(ours, lora)
    names = [module.rpartition(".")[2] for module in MODULES.values()]
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=10, target_modules=names, lora_dropout=0.0))
    pairs = {}
    for name, weight in ours.named_parameters():
        if not weight.requires_grad:
            continue
        _, layer, _, module, which = name.split(".")
        their_name = f"base_model.model.model.layers.{layer}.{MODULES[module]}.lora_{which[-1].upper()}.default.weight"
        pairs[name] = weight, theirs.get_parameter(their_name)
        weight.data = drawn_adapter(name, weight.shape).double()
        theirs.get_parameter(their_name).data = weight.data.clone()
    assert len(pairs) == 2 * 2 * 7 == len([w for w in theirs.parameters() if w.requires_grad])
    tokens = torch.randint(64, (2, 20), generator=torch.Generator().manual_seed(2))
    logits = theirs(tokens).logits
    torch.testing.assert_close(ours(tokens), logits, rtol=1e-10, atol=1e-10)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").backward()
    targets = torch.cat((tokens[:, 1:], torch.full((2, 1), -100)), dim=1)
    ours.loss(tokens, targets).cross_entropy.backward()
    for name, (mine, other) in pairs.items():
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
