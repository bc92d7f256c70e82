"""Initial weights as a function of (seed, parameter name) alone, so that every layout starts from the same ones."""

import hashlib

import torch
from torch import Tensor


def initial_tensor(name: str, shape: tuple[int, ...], std: float, seed: int, rows: slice = slice(None)) -> Tensor:
    """Some rows of a parameter's initial fp32 value: norms are 1, everything else is normal with deviation `std`.

    Drawn on the CPU from a generator of its own, keyed by (seed, name): neither the device nor the order in which
    parameters are made, nor how many ranks share them, changes a number. Stacked experts ([E, ...]) are drawn one by
    one, so that a rank makes only those it holds.
    """
    if len(shape) == 1:
        return torch.ones(shape)[rows]
    if len(shape) == 3:
        experts = range(*rows.indices(shape[0]))
        return torch.stack([initial_tensor(f"{name}.{expert}", shape[1:], std, seed) for expert in experts])
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)[rows]


@torch.no_grad()
def initialise(module: torch.nn.Module, std: float, seed: int) -> None:
    """Fills every parameter of a module that lives whole on one device."""
    for name, parameter in module.named_parameters():
        parameter.copy_(initial_tensor(name, parameter.shape, std, seed))
