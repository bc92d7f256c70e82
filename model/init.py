"""Initial weights as a function of (seed, parameter name) alone, so that every layout starts from the same ones."""

import hashlib

import torch
from torch import Tensor


def initial_tensor(name: str, shape: torch.Size, std: float, seed: int) -> Tensor:
    """A parameter's initial fp32 value: norms are 1, everything else is normal with deviation `std`.

    Drawn on the CPU from a generator of its own, keyed by (seed, name): neither the device nor the order in which
    parameters are made, nor how many ranks share them, changes a number.
    """
    if len(shape) == 1:
        return torch.ones(shape)
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") & (2**63 - 1))
    return torch.empty(shape).normal_(0.0, std, generator=generator)


@torch.no_grad()
def initialise(module: torch.nn.Module, std: float, seed: int) -> None:
    """Fills every parameter of a module that lives whole on one device."""
    for name, parameter in module.named_parameters():
        parameter.copy_(initial_tensor(name, parameter.shape, std, seed))
