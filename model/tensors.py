"""The tensors of a decoder by name, and parts of them: what checkpoints, files of others and upcycling all speak of."""

from collections.abc import Callable

import torch
from torch import Tensor

from moray.model.config.architecture import ModelConfig
from moray.model.decoder import Decoder

Box = tuple[slice, ...]
"""A part of a tensor: one slice a dimension, of step 1."""

Read = Callable[[str, Box], Tensor]
"""Gives a part of a tensor of a decoder, by its name: `HFWeights.read`, `CommitWeights.read`, `Upcycled.read`."""


def tensor_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Every tensor of a decoder that a checkpoint holds; a tied head is the embedding's."""
    with torch.device("meta"):
        tensors = Decoder(config).state_dict()
    if config.has_tied_head:
        tensors.pop("head.weight", None)
    return {name: tensor.shape for name, tensor in tensors.items()}


def whole(shape: torch.Size) -> Box:
    """The box that is all of a tensor."""
    return tuple(slice(0, size) for size in shape)
