"""AdamW over sharded parameters, with a state that exists before the first step, so that a commit can fill it."""

from collections import defaultdict

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moray.jobs.config.sections import OptimizerSection


def build_optimizer(module: nn.Module, settings: OptimizerSection, *, fused: bool = True) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019); weight decay on matrices alone, not on norms and biases.

    One parameter group for each (mesh, decay): the fused kernel cannot take tensors of two meshes in one call. On a CPU
    its last bit of an element depends on where in the shard that lies; without it, it does not.
    """
    groups: dict[tuple[object, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in module.named_parameters():
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        # The experts' biases are stacked, and still biases.
        is_matrix = parameter.ndim > 1 and "bias" not in name.rpartition(".")[2]
        groups[mesh, is_matrix].append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": settings.weight_decay if is_matrix else 0.0}
            for (_, is_matrix), parameters in groups.items()
        ],
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=fused,
        foreach=not fused,
    )
    for parameters in groups.values():
        for parameter in parameters:
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def training_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What a commit holds: `model.NAME` (weights and routing biases), `optimizer.NAME.exp_avg` and so on.

    A weight that two modules share is there once, by its first name: a tied head as the embedding. So is the number of
    steps (`optimizer.step`), which AdamW counts for each weight: once it is filled, `share_step` is to be called.
    """
    tensors = module.state_dict()
    # Unlike a state dict, these name what is shared once.
    named = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    state = {f"model.{name}": tensor.detach() for name, tensor in tensors.items() if name in named}
    for name, parameter in module.named_parameters():
        moments = dict(optimizer.state[parameter])
        state.setdefault("optimizer.step", moments.pop("step"))
        state |= {f"optimizer.{name}.{key}": value for key, value in moments.items()}
    return state


def share_step(optimizer: torch.optim.Optimizer) -> None:
    """Gives all weights the number of steps that the first one has."""
    first, *others = (state["step"] for state in optimizer.state.values())
    for other in others:
        other.copy_(first)


def older_names(module: nn.Module) -> dict[str, str]:
    """Where older commits have what `training_state` names: they kept a number of steps a weight."""
    first, _ = next(module.named_parameters())
    return {"optimizer.step": f"optimizer.{first}.step"}
