"""The part of a state that this rank holds, from the placements of its tensors."""

from collections.abc import Hashable, Mapping

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moray.parallel.chunks import Chunk, whole


def sharded_over(tensor: Tensor) -> str | None:
    """The mesh dimension over whose ranks FSDP has split a tensor; None where it has not."""
    names = tensor.device_mesh.mesh_dim_names or () if isinstance(tensor, DTensor) else ()
    return next((name for name in ("dp_shard", "efsdp", "dp_shard_tp") if name in names), None)


def held_chunk(tensor: Tensor) -> Chunk:
    """The part of the whole tensor that this rank holds."""
    if not isinstance(tensor, DTensor):
        return whole(tensor.shape)
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(offsets), tuple(sizes)


def held_chunks(state: Mapping[str, Tensor]) -> dict[str, Chunk]:
    """The same for many tensors, most of which are cut alike: torch takes a millisecond for one."""
    known: dict[Hashable, Chunk] = {}
    held = {}
    for name, tensor in state.items():
        cut = (tensor.shape, id(getattr(tensor, "device_mesh", None)), getattr(tensor, "placements", None))
        if cut not in known:
            known[cut] = held_chunk(tensor)
        held[name] = known[cut]
    return held
