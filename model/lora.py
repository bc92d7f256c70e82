"""Low-rank adapters beside the frozen matrices of a decoder: h = W x + (alpha / rank) B A x (Hu et al., 2021, eq. 3).

Training never forms B A: two thin products stand beside each wide one, and the product that the gradient of W would be,
a third of a pass over its matrix, falls away. Under tensor parallelism an adapter exchanges nothing of its own: of a
matrix that is split by outputs B is split, by inputs A, and both share the exchange that the matrix has anyway.
"""

# Shapes: I inputs and O outputs of a matrix, r rank, E experts, M rows ordered by expert; A is [r, I], B [O, r], and
# stacked they are [E, r, I], [E, O, r].

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moray.model.config.architecture import ModelConfig
from moray.model.decoder import Decoder
from moray.model.moe.experts import Experts
from moray.model.moe.grouped import grouped_linear
from moray.model.sharded import Linear, RowLinear, local
from moray.model.tensors import Box, Read

Target = Literal["attention", "dense", "experts", "shared"]
TARGETS: tuple[Target, ...] = get_args(Target)
_MODULES: dict[Target, str] = {
    "attention": r"blocks\.\d+\.attention\.\w+",
    "dense": r"blocks\.\d+\.ffn\.(gate|up|down)",
    "experts": r"blocks\.\d+\.ffn\.experts",
    "shared": r"blocks\.\d+\.ffn\.shared\.(gate|up|down)",
}


@dataclass(frozen=True)
class LoRA:
    """Which matrices have adapters: those of attention, of dense layers' feed-forward networks, of routed experts, of
    shared experts.
    """

    rank: int
    alpha: float
    targets: tuple[Target, ...]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class _Adapted(nn.Module):
    """A linear map that has taken over another one's weights, and has A and B beside them."""

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    scale: float

    def __init__(self, base: Linear | RowLinear, lora: LoRA) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.scale = base.in_features, base.out_features, lora.scale
        self.weight, self.bias = base.weight, base.bias
        self.lora_a = nn.Parameter(torch.empty(lora.rank, base.in_features))
        self.lora_b = nn.Parameter(torch.empty(base.out_features, lora.rank))

    def added(self, x: Tensor) -> Tensor:
        """(alpha / rank) B A x, [..., I] -> [..., O]; of inputs that ranks share, a part of a sum."""
        return F.linear(F.linear(x, local(self.lora_a)) * self.scale, local(self.lora_b))


class AdaptedLinear(_Adapted, Linear):
    """A linear map and its adapter, by the outputs of both that this rank holds."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.added(x)

    def matrix(self) -> Tensor:
        return super().matrix() + self.scale * local(self.lora_b) @ local(self.lora_a)


class AdaptedRowLinear(_Adapted, RowLinear):
    """A linear map and its adapter, by the inputs of both that this rank holds."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.tokens.project(x_BTD, local(self.weight), self.bias, self.added(x_BTD))


class AdaptedExperts(Experts):
    """Experts, each with adapters of its own, which are stacked as its matrices are."""

    def __init__(self, base: Experts, lora: LoRA) -> None:
        nn.Module.__init__(self)
        self.scale: float = lora.scale
        self.activation = base.activation
        for name in (*base.MATRICES, *base.BIASES):
            setattr(self, name, getattr(base, name))
        for name in base.MATRICES:
            if (weight_EOI := getattr(base, name)) is not None:
                experts, outputs, inputs = weight_EOI.shape
                a, b = adapters_of(name)
                setattr(self, a, nn.Parameter(torch.empty(experts, lora.rank, inputs)))
                setattr(self, b, nn.Parameter(torch.empty(experts, outputs, lora.rank)))

    def project(self, x_MI: Tensor, name: str, bias_EO: Tensor | None, counts_E: Tensor) -> Tensor:
        a_ErI, b_EOr = (local(getattr(self, adapter)) for adapter in adapters_of(name))
        small_Mr = grouped_linear(x_MI, a_ErI, counts_E) * self.scale
        return super().project(x_MI, name, bias_EO, counts_E) + grouped_linear(small_Mr, b_EOr, counts_E)


def adapters_of(name: str) -> tuple[str, str]:
    """What A and B of a matrix are called: of `….query.weight` `….query.lora_a`, of `….up_EFD` `….up_lora_a`."""
    stem = name.removesuffix("weight") if name.endswith(".weight") else f"{name.rpartition('_')[0]}_"
    return f"{stem}lora_a", f"{stem}lora_b"


def add_adapters(decoder: Decoder, lora: LoRA) -> None:
    """Freezes a decoder, and puts adapters, which alone learn, beside its matrices. They are not filled: see `init.py`.

    To be called before parallelism splits the matrices.
    """
    decoder.requires_grad_(False)
    for name, module in [*decoder.named_modules()]:
        if not any(re.fullmatch(_MODULES[target], name) for target in lora.targets):
            continue
        parent, _, last = name.rpartition(".")
        adapted: nn.Module
        if isinstance(module, Experts):
            adapted = AdaptedExperts(module, lora)
        elif isinstance(module, RowLinear):
            adapted = AdaptedRowLinear(module, lora)
        elif isinstance(module, Linear):
            adapted = AdaptedLinear(module, lora)
        else:  # a norm within attention
            continue
        setattr(decoder.get_submodule(parent), last, adapted)


def adapter_shapes(config: ModelConfig, lora: LoRA) -> dict[str, torch.Size]:
    """Every tensor of the adapters by its name in the decoder."""
    with torch.device("meta"):
        decoder = Decoder(config)
        add_adapters(decoder, lora)
    return {name: weight.shape for name, weight in decoder.named_parameters() if weight.requires_grad}


def targets_in(config: ModelConfig) -> tuple[Target, ...]:
    """The kinds of matrices that a model has."""
    has_dense, has_experts = config.n_moe_layers < config.n_layers, config.n_moe_layers > 0
    has = {
        "attention": True,
        "dense": has_dense,
        "experts": has_experts,
        "shared": bool(config.moe and config.moe.n_shared),
    }
    return tuple(target for target in TARGETS if has[target])


def without_balancing(config: ModelConfig) -> ModelConfig:
    """The same model, to be trained with frozen routers: nothing moves their bias, and no loss corrects them."""
    return config.but(moe=dict.fromkeys(balancing_of(config), 0.0)) if config.moe else config


def balancing_of(config: ModelConfig) -> dict[str, float]:
    """What of a model's config balances its experts by teaching their router: the fields of `moe` that are not 0."""
    if config.moe is None:
        return {}
    names = [name for name in type(config.moe).model_fields if name.endswith(("_loss", "bias_update_rate"))]
    return {name: value for name in names if (value := getattr(config.moe, name))}


class Merged:
    """The weights of a decoder whose adapters are added to its matrices, W + (alpha / rank) B A, summed in fp32."""

    def __init__(self, base: Read, adapters: Read, names: Collection[str], scale: float) -> None:
        """`adapters` reads what `names` are."""
        self._base, self._adapters, self._names, self._scale = base, adapters, names, scale

    def read(self, name: str, box: Box) -> Tensor:
        """A part of a tensor, made of no more than the parts of base and adapters that it depends on."""
        part = self._base(name, box)
        a, b = adapters_of(name)
        if a not in self._names:
            return part
        *experts, rows, columns = box
        part_a = self._adapters(a, (*experts, slice(None), columns))
        part_b = self._adapters(b, (*experts, rows, slice(None)))
        dtype = torch.promote_types(part.dtype, torch.float32)
        return part.to(dtype) + self._scale * (part_b.to(dtype) @ part_a.to(dtype))
