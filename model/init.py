"""Initial weights as a function of (seed, parameter name) alone, so that every layout starts from the same ones."""

import hashlib

import torch
from torch import Tensor

BLOCK_ROWS = 256


def initial_tensor(name: str, shape: tuple[int, ...], std: float, seed: int, rows: slice = slice(None)) -> Tensor:
    """Some rows of a parameter's initial fp32 value: norms are 1, everything else is normal with deviation `std`.

    Drawn on the CPU from generators of their own, keyed by (seed, name, block of rows): neither the device nor the
    order in which parameters are made, nor how many ranks share them, changes a number. A rank draws the blocks (and,
    of stacked experts [E, ...], the experts) that it holds rows of, and no others.
    """
    first, end, _ = rows.indices(shape[0])
    if len(shape) == 1:
        return torch.ones(end - first)
    if len(shape) == 3:
        return torch.stack([initial_tensor(f"{name}.{expert}", shape[1:], std, seed) for expert in range(first, end)])
    start = first - first % BLOCK_ROWS
    blocks = [_block(f"{seed}/{name}/{row}", shape, row, std) for row in range(start, end, BLOCK_ROWS)]
    return torch.cat(blocks)[first - start : end - start]


def _block(key: str, shape: tuple[int, ...], row: int, std: float) -> Tensor:
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(min(BLOCK_ROWS, shape[0] - row), shape[1]).normal_(0.0, std, generator=generator)


@torch.no_grad()
def initialise(module: torch.nn.Module, std: float, seed: int) -> None:
    """Fills every parameter of a module that lives whole on one device."""
    for name, parameter in module.named_parameters():
        parameter.copy_(initial_tensor(name, parameter.shape, std, seed))
