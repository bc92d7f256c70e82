"""Upcycling: a trained dense decoder becomes a MoE that starts by computing the same."""

# Shapes: D model width, F expert width, E experts. A copy is a whole dense network; `granularity` slices of its hidden
# width make it up, and each expert is one slice.

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from moray import UserError
from moray.model.config.architecture import ModelConfig
from moray.model.init import initial_tensor
from moray.model.tensors import Box, Read

BALANCE_LOSS = 0.01
"""Without one, a router that starts among equal experts soon uses few of them (Fedus et al., 2021: 1e-2)."""


@dataclass(frozen=True)
class Upcycling:
    """How experts are made of a dense feed-forward network.

    noise: deviation of the normal noise on each expert's matrices, in deviations of the matrix itself.
    granularity: slices that a network is cut into; experts are that much narrower. seed: of noise and routers.
    """

    experts: int
    top_k: int
    shared: int = 0
    noise: float = 0.0
    granularity: int = 1
    seed: int = 0

    @property
    def shared_slices(self) -> int:
        """Slices of every copy that are the shared experts in place of routed ones."""
        return self.shared if self.shared < self.granularity else 0

    @property
    def shared_copies(self) -> int:
        """Whole copies among the shared experts, beside the routed ones."""
        return self.shared // self.granularity

    @property
    def routed_slices(self) -> int:
        """Experts that make up a routed copy, without its shared slices."""
        return self.granularity - self.shared_slices


def upcycled_config(dense: ModelConfig, options: Upcycling) -> ModelConfig:
    """The same decoder with experts in every layer: a router as Mixtral's, which most families can express.

    Raises UserError for what has experts or mixes tokens, and for options that do not divide.
    Source: Komatsuzaki et al., 2022 (sparse upcycling); He et al., 2024 (granularity, virtual groups).
    """
    _check(dense, options)
    moe = {
        "n_experts": options.experts,
        "top_k": options.top_k,
        "n_shared": options.shared,
        "expert_width": dense.ffn.width // options.granularity,
        "score": "softmax",
        "normalise_gates": True,
        "balance_loss": BALANCE_LOSS,
    }
    return dense.but(moe=moe)


def _check(dense: ModelConfig, options: Upcycling) -> None:
    width, granularity = dense.ffn.width, options.granularity
    if dense.moe:
        raise UserError(f"the model has {dense.n_experts} experts already; only a dense one can be upcycled")
    for name in ("conv_width", "adapter_rank"):
        if value := getattr(dense.ffn, name):
            raise UserError(f"model.ffn.{name}={value}: experts have nothing between their projections")
    for name, least in (("experts", 1), ("top_k", 1), ("shared", 0), ("granularity", 1)):
        if getattr(options, name) < least:
            raise UserError(f"{name}={getattr(options, name)} must be at least {least}")
    if not 0 <= options.noise < math.inf:
        raise UserError(f"noise={options.noise} must be 0 or more, and finite")
    if width % (8 * granularity):
        fits = [n for n in range(1, width + 1) if width % (8 * n) == 0]
        right = f"try one of {fits}" if fits else "it is none itself, so its model can't be upcycled"
        raise UserError(
            f"granularity={granularity} must cut model.ffn.width={width} into multiples of 8, as grouped matrix "
            f"products need; {right}"
        )
    _check_copies(options)


def _check_copies(options: Upcycling) -> None:
    granularity, slices = options.granularity, options.routed_slices
    if options.shared > granularity and options.shared % granularity:
        raise UserError(
            f"shared={options.shared} must be less than granularity={granularity} (slices of every copy) or a "
            "multiple of it (whole copies)"
        )
    for name in ("experts", "top_k"):
        if (value := getattr(options, name)) % slices:
            raise UserError(
                f"{name}={value} must be a multiple of {slices}, the routed experts that make up one dense network "
                f"with granularity={granularity} and shared={options.shared}; try {value + -value % slices}"
            )
    if options.top_k > options.experts:
        raise UserError(f"top_k={options.top_k} must be at most experts={options.experts}")


class Upcycled:
    """The tensors of the upcycled model, any part of any of them, out of the dense one's.

    Expert e is slice e % r of copy e // r. The r experts of a copy have equal rows in the router, so that the top-k
    takes whole copies (virtual groups); rows of different copies are drawn as `config.init` says.
    A token's gates sum to one over the r experts of each of its copies, so `down` of routed experts is r times the
    dense one (weight scaling). With c shared copies, the mean of 1 + c networks is formed, and every `down` is divided
    by that. Noise is on the matrices of routed experts alone.
    Source: He et al., 2024.
    """

    def __init__(self, dense: ModelConfig, read: Read, options: Upcycling) -> None:
        self.config = upcycled_config(dense, options)
        self._read, self._options, self._width = read, options, dense.ffn.width // options.granularity
        self._standard = self.config.but(init={"scheme": "normal", "std": 1.0})

    def read(self, name: str, box: Box) -> Tensor:
        """A part of a tensor of the upcycled model, at least fp32; of stacked experts, box[0] says which.

        In memory is the part, and an expert's matrix or the shared one's.
        """
        if not (match := re.fullmatch(r"(.*\.ffn\.)(router|experts|shared)\.(.+)", name)):
            return _accurate(self._read(name, box))
        ffn, module, tensor = match.groups()
        if module == "router":
            return self._router(name, tensor)[box]
        if module == "shared":
            return self._shared(ffn, tensor)[box]
        experts = range(*box[0].indices(self._options.experts))
        return torch.stack([self._expert(ffn, tensor, expert)[box[1:]] for expert in experts])

    def _router(self, name: str, tensor: str) -> Tensor:
        options = self._options
        if tensor == "bias_E":
            return torch.zeros(options.experts)
        copies = (options.experts // options.routed_slices, self.config.d_model)
        return initial_tensor(self.config, name, copies, options.seed).repeat_interleave(options.routed_slices, 0)

    def _expert(self, ffn: str, tensor: str, expert: int) -> Tensor:
        """One expert's part of a stacked tensor: `gate_EFD`, `down_bias_ED` and their like."""
        options = self._options
        index = options.shared_slices + expert % options.routed_slices
        hidden = slice(index * self._width, (index + 1) * self._width)
        projection, is_bias = tensor.partition("_")[0], "bias" in tensor
        dense = self._dense(f"{ffn}{projection}", is_bias, hidden)
        if projection == "down":
            dense = dense * (options.routed_slices / (1 + options.shared_copies))
        if is_bias:
            return dense / options.granularity if projection == "down" else dense
        if not options.noise:
            return dense
        shape = (options.experts, *dense.shape)
        drawn = initial_tensor(
            self._standard, f"{ffn}experts.{tensor}.noise", shape, options.seed, slice(expert, expert + 1)
        )
        return dense + options.noise * dense.std() * drawn[0]

    def _shared(self, ffn: str, tensor: str) -> Tensor:
        """One tensor of the shared experts: `up.weight`, `down.bias` and their like."""
        options = self._options
        projection, _, kind = tensor.partition(".")
        slices = options.shared_slices or options.granularity
        dense = self._dense(f"{ffn}{projection}", kind == "bias", slice(0, slices * self._width))
        share = 1 / (1 + options.shared_copies)
        if projection == "down" and kind == "bias":
            return dense * (options.shared / options.granularity * share)
        copies = max(options.shared_copies, 1)
        if projection == "down":
            return dense.repeat(1, copies) * share
        return dense.repeat(copies, *[1] * (dense.ndim - 1))

    def _dense(self, module: str, is_bias: bool, hidden: slice) -> Tensor:
        """The part of a dense projection that some hidden units have; all units share the output's bias."""
        everything = slice(0, self.config.d_model)
        if is_bias:
            return _accurate(self._read(f"{module}.bias", (everything if module.endswith("down") else hidden,)))
        box = (everything, hidden) if module.endswith("down") else (hidden, everything)
        return _accurate(self._read(f"{module}.weight", box))


def _accurate(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
