"""The Pre-RMSNorm and Pre-CRMSNorm Transformers that compute what a Pre-LN Transformer computes.

LayerNorm is RMSNorm of a vector from which its mean has been taken, and in a Pre-LN Transformer nothing but LayerNorms
reads the residual stream: its mean is of no consequence. Where everything that is added to the stream has mean 0, the
stream has, and RMSNorm does in LayerNorm's place (Pre-RMSNorm). A vector of d entries with mean 0 is given by d - 1 of
them, so the stream can be one narrower (Pre-CRMSNorm). The three are the same function, in training as in inference.

Source: Jiang et al., 2023, section 3.
"""

# Shapes: D model width; I and O inputs and outputs of a linear layer.

import torch
from torch import Tensor

from moray import UserError
from moray.model.config.architecture import ModelConfig
from moray.model.decoder import Decoder

Weights = dict[str, Tensor]

EMBEDDINGS = ("embedding", "position_embedding")
WRITERS = ("attention.output", "ffn.down")
"""A block's linear layers whose outputs are added to the residual stream."""
READERS = {
    "attention_norm": ("attention.query", "attention.key", "attention.value"),
    "ffn_norm": ("ffn.gate", "ffn.up"),
}
"""A block's norms, and the linear layers that read each."""


@torch.no_grad()
def to_pre_rmsnorm(decoder: Decoder) -> Decoder:
    """A new decoder with RMSNorms that computes the same logits as this one with LayerNorms.

    The norms keep their weights and biases. The head becomes untied: it reads what it read, while the embedding is
    recentred. Raises UserError naming the setting with which the equivalence does not hold.
    """
    config = decoder.config
    _check(config)
    return _built(config.but(norm={"kind": "rmsnorm"}, tied_embeddings=False), _recentred(decoder), decoder)


@torch.no_grad()
def to_pre_crmsnorm(decoder: Decoder) -> Decoder:
    """A new decoder of width d_model - 1 with CRMSNorms that computes the same logits as this one with LayerNorms.

    The stream's last entry, minus the others' sum, is left out. Readers need it, with the norm's weight and bias, so
    these are folded into them: they gain biases where the norms had some. Raises UserError as `to_pre_rmsnorm` does.
    """
    config = decoder.config
    _check(config)
    has_bias = config.norm.bias
    narrower = config.but(
        d_model=config.d_model - 1,
        norm={"kind": "crmsnorm", "bias": False, "unit_offset": False},
        attention={"qkv_bias": config.attention.qkv_bias or has_bias},
        ffn={"bias": config.ffn.bias or has_bias},
        tied_embeddings=False,
        head_bias=config.head_bias or has_bias,
    )
    weights = _recentred(decoder)
    for name in _names(weights, EMBEDDINGS):
        weights[name] = weights[name][:, :-1]
    for name in _names(weights, WRITERS):
        weights[name] = weights[name][:-1]
    for prefix in _block_prefixes(config):
        for norm, readers in READERS.items():
            _fold(weights, prefix + norm, [prefix + reader for reader in readers], config.norm.unit_offset)
    _fold(weights, "norm", ["head"], config.norm.unit_offset)
    return _built(narrower, weights, decoder)


def _check(config: ModelConfig) -> None:
    """Raises UserError where other than LayerNorms read the stream, or other than dense linear layers write to it."""
    needed = {
        "head": (config.head, "vocabulary"),
        "norm.kind": (config.norm.kind, "layernorm"),
        "norm.placement": (config.norm.placement, "pre"),
        "moe": (config.moe, None),
        "attention.latent": (config.attention.latent, None),
    }
    for name, (value, right) in needed.items():
        if value != right:
            raise UserError(f"model.{name}={value} cannot be converted to Pre-(C)RMSNorm; it must be {right}")


def _recentred(decoder: Decoder) -> Weights:
    """The decoder's weights in fp64, with mean 0 in each row that is embedded and each column that writes."""
    weights = {name: tensor.detach().double() for name, tensor in decoder.state_dict().items()}
    for name in _names(weights, EMBEDDINGS):
        weights[name] = weights[name] - weights[name].mean(1, keepdim=True)
    for name in _names(weights, WRITERS):
        weights[name] = weights[name] - weights[name].mean(0, keepdim=True)
    return weights


def _fold(weights: Weights, norm: str, readers: list[str], unit_offset: bool) -> None:
    """Moves a LayerNorm's weight and bias into the linear layers that read it, and sees to the entry left out.

    A (w * x + b) = (A w) x + A b, and x_D = -(x_1 + … + x_(D-1)).
    """
    scale_D = weights[f"{norm}.weight"] + (1.0 if unit_offset else 0.0)
    weights[f"{norm}.weight"] = torch.ones_like(scale_D[:-1])
    bias_D = weights.pop(f"{norm}.bias", None)
    for reader in readers:
        if f"{reader}.weight" not in weights:
            continue
        w_OI = weights[f"{reader}.weight"]
        scaled_OI = w_OI * scale_D
        weights[f"{reader}.weight"] = scaled_OI[:, :-1] - scaled_OI[:, -1:]
        if bias_D is not None:
            weights[f"{reader}.bias"] = weights.get(f"{reader}.bias", 0.0) + w_OI @ bias_D


def _built(config: ModelConfig, weights: Weights, like: Decoder) -> Decoder:
    """A decoder with these weights, of the other's dtype, device and mode. Biases that it alone has are 0."""
    held = like.embedding.weight
    with torch.device(held.device):
        decoder = Decoder(config).to(held.dtype).train(like.training)
    missing = {name: torch.zeros_like(value) for name, value in decoder.state_dict().items() if name not in weights}
    assert all(name.endswith(".bias") for name in missing), sorted(missing)
    decoder.load_state_dict(weights | missing)
    return decoder


def _block_prefixes(config: ModelConfig) -> list[str]:
    return [f"blocks.{layer}." for layer in range(config.n_layers)]


def _names(weights: Weights, modules: tuple[str, ...]) -> list[str]:
    """Names of these modules' weights and biases, in every block."""
    return [name for name in weights if name.rpartition(".")[0].endswith(modules)]
