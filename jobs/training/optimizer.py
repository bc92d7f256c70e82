"""AdamW and Muon over sharded parameters, with a state that exists before the first step: a commit can fill it."""

from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from moray.jobs.config.sections import OptimizerSection
from moray.model.sharded import local
from moray.parallel.muon import Muon, is_matrix

AT_A_TIME = 16
"""Weights whose moments are there in fp32, too."""


def build_optimizer(
    module: nn.Module,
    settings: OptimizerSection,
    *,
    fused: bool = True,
    copy: dist.ProcessGroup | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, 2019), or Muon for matrices and AdamW for the rest; weight decay on matrices alone.

    One parameter group for each mesh, decay and rate: the fused kernel cannot take tensors of two meshes in one call.
    On a CPU its last bit of an element depends on where in the shard that lies; without it, it does not.
    copy: the ranks that together hold the model once, and dtype that of Muon's products. Collective with Muon.
    """
    groups: dict[tuple[Any, ...], list[nn.Parameter]] = defaultdict(list)
    for name, weight in learning(module):
        mesh = weight.device_mesh if isinstance(weight, DTensor) else None
        # The experts' biases are stacked, and still biases.
        decays = weight.ndim > 1 and "bias" not in name.rpartition(".")[2]
        is_muons = settings.kind == "muon" and is_matrix(name, weight)
        groups[mesh, decays, _scale(name, settings), is_muons].append(weight)
    described = [
        {
            "params": weights,
            "weight_decay": settings.weight_decay if decays else 0.0,
            "scale": scale,
            "is_muons": is_muons,
        }
        for (_, decays, scale, is_muons), weights in groups.items()
    ]
    betas = (settings.beta1, settings.beta2)
    moments = torch.bfloat16 if settings.moments == "bfloat16" else None  # that of the weights
    if settings.kind == "adamw" and moments is None:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            described, lr=settings.lr, betas=betas, eps=settings.eps, fused=fused, foreach=not fused
        )
    else:
        optimizer = Mixed(described, settings, fused=fused, copy=copy, dtype=dtype)
    for group in optimizer.param_groups:
        for weight in group["params"]:
            optimizer.state[weight] = (
                {"momentum": torch.zeros_like(weight)}
                if group["is_muons"]
                else {
                    "step": torch.zeros((), device=weight.device),
                    "exp_avg": torch.zeros_like(weight, dtype=moments),
                    "exp_avg_sq": torch.zeros_like(weight, dtype=moments),
                }
            )
    set_learning_rate(optimizer, settings.lr)
    return optimizer


def learning(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The weights that have gradients, by name: all, or beside a frozen base its adapters."""
    return [(name, weight) for name, weight in module.named_parameters() if weight.requires_grad]


def _scale(name: str, settings: OptimizerSection) -> float:
    """Of a weight's learning rate."""
    modules = name.split(".")
    for part, scale in (
        ("embedding", settings.embedding_lr_scale),
        ("head", settings.embedding_lr_scale),
        ("router", settings.router_lr_scale),
        ("experts", settings.expert_lr_scale),
    ):
        if part in modules:
            return scale
    return 1.0


class Mixed(torch.optim.Optimizer):
    """Muon for the groups that are its, AdamW for the others, whose moments may be kept in bf16 between steps."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        settings: OptimizerSection,
        *,
        fused: bool,
        copy: dist.ProcessGroup | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(groups, {"lr": settings.lr})
        self._settings, self._fused = settings, fused
        self._of_muon = [group for group in self.param_groups if group["is_muons"]]
        matrices = [weight for group in self._of_muon for weight in group["params"]]
        self._muon = Muon(matrices, settings.momentum, copy, dtype) if matrices else None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if not group["is_muons"]:
                for start in range(0, len(group["params"]), AT_A_TIME):
                    self._adamw(group, group["params"][start : start + AT_A_TIME])
        if self._muon:
            each = [(weight, group) for group in self._of_muon for weight in group["params"]]
            self._muon.step(
                [self.state[weight]["momentum"] for weight, _ in each],
                [group["lr"] for _, group in each],
                [group["weight_decay"] for _, group in each],
            )

    def _adamw(self, group: dict[str, Any], weights: list[nn.Parameter]) -> None:
        kept = [[local(self.state[weight][name]) for weight in weights] for name in ("exp_avg", "exp_avg_sq")]
        moments = [[x.to(weight.dtype) for x, weight in zip(some, weights, strict=True)] for some in kept]
        first, second = moments
        adamw(
            [local(weight) for weight in weights],
            [local(weight.grad) for weight in weights if weight.grad is not None],
            first,
            second,
            [],
            [self.state[weight]["step"] for weight in weights],
            fused=self._fused,
            foreach=not self._fused,
            amsgrad=False,
            beta1=self._settings.beta1,
            beta2=self._settings.beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=self._settings.eps,
            maximize=False,
        )
        for some, made in zip(kept, moments, strict=True):
            torch._foreach_copy_(some, made)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("scale", 1.0)


def training_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What a commit holds: `model.NAME` (weights and routing biases), `optimizer.NAME.exp_avg` and so on.

    Of a frozen base nothing: its adapters are all that changes. A weight that two modules share is there once, by its
    first name: a tied head as the embedding. So is the number of steps (`optimizer.step`), which AdamW counts for each
    weight: once it is filled, `share_step` is to be called.
    """
    tensors, weights = module.state_dict(), learning(module)
    is_whole = len(weights) == len(list(module.parameters()))
    # Unlike a state dict, these name what is shared once. The routing bias of a frozen router stands still.
    named = {name for name, _ in (*weights, *(module.named_buffers() if is_whole else ()))}
    state = {f"model.{name}": tensor.detach() for name, tensor in tensors.items() if name in named}
    for name, parameter in weights:
        moments = dict(optimizer.state[parameter])
        if (step := moments.pop("step", None)) is not None:
            state.setdefault("optimizer.step", step)
        state |= {f"optimizer.{name}.{key}": value for key, value in moments.items()}
    return state


def share_step(optimizer: torch.optim.Optimizer) -> None:
    """Gives all weights that have a number of steps that of the first one; where all are Muon's, none has."""
    steps = [state["step"] for state in optimizer.state.values() if "step" in state]
    for other in steps[1:]:
        other.copy_(steps[0])


def older_names(module: nn.Module) -> dict[str, str]:
    """Where older commits have what `training_state` names: they kept a number of steps a weight."""
    first, _ = learning(module)[0]
    return {"optimizer.step": f"optimizer.{first}.step"}
