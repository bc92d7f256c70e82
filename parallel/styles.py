"""Ways of tensor parallelism that torch has not: whole on every rank, over a gathered width, by channel."""

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle


class Replicated(ParallelStyle):
    """A module that every rank computes whole, from whole inputs.

    grads: what comes back to its output. Replicate() where the readers are parallel modules, which sum their input's
    gradient; Partial() where each rank's heads read a part of the output themselves.
    """

    def __init__(self, grads: Placement | None = None) -> None:
        super().__init__()
        self.grads = grads or Replicate()

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def read(_: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> tuple[Any, ...]:
            return _as_dtensor(inputs[0], mesh, Replicate()), *inputs[1:]

        def write(_: nn.Module, output: DTensor, mesh: DeviceMesh) -> Tensor:
            return output.to_local(grad_placements=[self.grads])

        return distribute_module(module, device_mesh, None, read, write)  # type: ignore[arg-type]


class GatheredWidth(ParallelStyle):
    """A norm over channels of which each rank holds a run: they are gathered, and each rank keeps its own.

    (DTensor cannot sum a mean square over ranks within F.rms_norm.)
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def read(_: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> tuple[Any, ...]:
            return (_as_dtensor(inputs[0], mesh, Shard(2)).redistribute(placements=[Replicate()]),)

        def write(_: nn.Module, output: DTensor, mesh: DeviceMesh) -> Tensor:
            return output.redistribute(placements=[Shard(2)]).to_local()

        return distribute_module(module, device_mesh, None, read, write)  # type: ignore[arg-type]


class ChannelSharded(ParallelStyle):
    """A module that treats each channel by itself, on this rank's channels: its weights are split, nothing is sent."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh, _split_parameters)


def _as_dtensor(x: Tensor, mesh: DeviceMesh, placement: Placement) -> DTensor:
    return x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, [placement], run_check=False)


def _split_parameters(_: str, module: nn.Module, mesh: DeviceMesh) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        split: DTensor = distribute_tensor(parameter, mesh, [Shard(0)], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(split))
