"""Initial weights as a function of (config, seed, parameter name) alone: every layout starts from the same ones."""

import hashlib
import math
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from moray.model.config.architecture import ModelConfig
from moray.model.decoder import Decoder
from moray.model.tensors import Box, Read, tensor_shapes

BLOCK_ROWS = 256
Fill = Callable[[Tensor, torch.Generator], Tensor]
WRITES_TO_STREAM = ("attention.output.weight", "ffn.down.weight", "shared.down.weight", "experts.down_EDF")
"""Ends of the names of those matrices whose products are added to the residual stream."""


def initial_tensor(
    config: ModelConfig, name: str, shape: tuple[int, ...], seed: int, rows: slice = slice(None)
) -> Tensor:
    """Some rows of a parameter's initial fp32 value: norms are 1, biases 0, matrices normal as `config.init` says.

    Drawn on the CPU from generators of their own, keyed by (seed, name, block of rows): neither the device nor the
    order in which parameters are made, nor how many ranks share them, changes a number. A rank draws the blocks (and,
    of stacked experts [E, ...], the experts) that it holds rows of, and no others.
    """
    first, end, _ = rows.indices(shape[0])
    if len(shape) == 1 or _is_zero(name):
        return torch.full((end - first, *shape[1:]), _constant(config, name))
    fill = _filling(config, name, shape)
    if len(shape) == 3:
        experts = range(first, end)
        return torch.stack([_draw(f"{seed}/{name}.{e}", shape[1:], slice(None), fill) for e in experts])
    return _draw(f"{seed}/{name}", shape, rows, fill)


def with_initial(read: Read, config: ModelConfig, name: str, seed: int) -> Read:
    """Gives what `read` gives, but one tensor as `seed` begins it."""
    shape = tensor_shapes(config)[name]

    def read_or_draw(asked: str, box: Box) -> Tensor:
        if asked != name:
            return read(asked, box)
        rows, *rest = box
        return initial_tensor(config, name, shape, seed, rows)[(slice(None), *rest)]

    return read_or_draw


def _is_zero(name: str) -> bool:
    """Whether a parameter starts at zero: biases, and the second matrix of a low-rank adapter (Hu et al., 2021)."""
    return "bias" in name.rpartition(".")[2] or name.endswith(("adapter.b.weight", "lora_b"))


def _filling(config: ModelConfig, name: str, shape: tuple[int, ...]) -> Fill:
    """How a block of a matrix is drawn. A of a LoRA: uniform within 1 / sqrt(inputs), as torch's linear layers and so
    peft's adapters are (Kaiming's, with a = sqrt(5)), whatever the config says of the model's own matrices.
    """
    if name.endswith("lora_a"):
        bound = 1 / math.sqrt(shape[-1])
        return lambda block, generator: block.uniform_(-bound, bound, generator=generator)
    deviation = _deviation(config, name, shape)
    if config.init.scheme == "fan_in":
        cut = 2 * deviation
        return lambda block, generator: nn.init.trunc_normal_(block, 0.0, deviation, -cut, cut, generator=generator)
    return lambda block, generator: block.normal_(0.0, deviation, generator=generator)


def _constant(config: ModelConfig, name: str) -> float:
    """What every entry of a bias (0) or a norm's weight is: 1, stored as 0 where the norm scales by 1 + w."""
    has_offset = config.norm.unit_offset and ".attention." not in name  # norms within attention have none
    return 0.0 if _is_zero(name) or has_offset else 1.0


def _deviation(config: ModelConfig, name: str, shape: tuple[int, ...]) -> float:
    """Standard deviation of a matrix's entries; of a truncated normal, that before it is cut.

    Source: Radford et al., 2019, section 2.3 (megatron); after Zhang et al., 2019, who scale all of a layer's matrices
    with its depth (depth); Fedus et al., 2021, section 2.4 (fan_in).
    """
    std, scheme = config.init.std, config.init.scheme
    if "conv" in name:
        return 1 / math.sqrt(shape[-1])  # each output is a sum over the taps alone, whatever the model's width
    if scheme == "fan_in":
        return std / math.sqrt(shape[-1])
    if scheme == "normal" or not name.endswith(WRITES_TO_STREAM):
        return std
    layers = config.n_layers if scheme == "megatron" else _layer(name) + 1
    return std / math.sqrt(2 * layers)


def _layer(name: str) -> int:
    found = re.search(r"blocks\.(\d+)\.", name)
    assert found, name
    return int(found[1])


def _draw(key: str, shape: tuple[int, ...], rows: slice, fill: Fill) -> Tensor:
    """Some rows of a matrix, drawn in blocks of BLOCK_ROWS."""
    first, end, _ = rows.indices(shape[0])
    start = first - first % BLOCK_ROWS
    heights = {row: min(BLOCK_ROWS, shape[0] - row) for row in range(start, end, BLOCK_ROWS)}
    blocks = [_block(f"{key}/{row}", (height, shape[1]), fill) for row, height in heights.items()]
    return torch.cat(blocks)[first - start : end - start]


def _block(key: str, shape: tuple[int, int], fill: Fill) -> Tensor:
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return fill(torch.empty(shape), generator)


@torch.no_grad()
def initialise(decoder: Decoder, seed: int) -> None:
    """Fills every parameter of a decoder that lives whole on one device."""
    for name, parameter in decoder.named_parameters():
        parameter.copy_(initial_tensor(decoder.config, name, parameter.shape, seed))
