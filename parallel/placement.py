"""Which rank has which expert: planned anew from loads that were measured, and the experts moved there.

A layer's stacked weights have a slot for each expert, and ranks have runs of neighbouring slots. A placement says which
slot an expert has; what the layer computes does not depend on it, but for the order in which a token's sum is formed.
"""

# Shapes: E experts of a layer, and as many slots; P devices, each with a run of slots;

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from moray.model.decoder import Decoder
from moray.model.moe.layer import MoE
from moray.model.sharded import local
from moray.parallel.chunks import Chunk
from moray.parallel.held import held_chunk

WORTH = 0.95
"""The busiest device's load, over what it was, from which experts are moved."""


def packed(loads: Sequence[float], bins: int) -> list[int]:
    """A bin for each item, as many items in each, so that their loads are about even: the largest first, each into the
    least loaded bin that has room (DeepSeek's EPLB packs so).
    """
    room, total, found = [len(loads) // bins] * bins, [0.0] * bins, [0] * len(loads)
    for item in sorted(range(len(loads)), key=lambda item: -loads[item]):
        found[item] = best = min((b for b in range(bins) if room[b]), key=lambda b: total[b])
        room[best] -= 1
        total[best] += loads[item]
    return found


def planned(load_E: Sequence[float], slot_E: Sequence[int], devices: int, groups: int) -> list[int]:
    """A slot for each expert, so that devices have about even loads.

    Groups of experts stay whole: on one device, where there are as many or more of them, or on the same devices, so
    that device-limited routing limits what it did. A device keeps what it can of what it has.
    """
    experts, held = len(load_E), len(load_E) // devices
    before = [slot // held for slot in slot_E]
    if groups % devices == 0:
        size = experts // groups
        of_groups = packed([sum(load_E[first : first + size]) for first in range(0, experts, size)], devices)
        device_E = [of_groups[expert // size] for expert in range(experts)]
        device_E = _renamed(device_E, before, range(devices))
    else:
        size, share, device_E = experts // groups, devices // groups, []
        for group in range(groups):
            run = slice(group * size, (group + 1) * size)
            own = sorted(set(before[run]))
            if len(own) != share:  # they were placed for other devices
                own = list(range(group * share, (group + 1) * share))
            device_E += _renamed([own[b] for b in packed(load_E[run], share)], before[run], own)
    by_device = sorted(range(experts), key=lambda expert: device_E[expert])
    slots = [0] * experts
    for slot, expert in enumerate(by_device):
        slots[expert] = slot
    return slots


def _renamed(device_E: Sequence[int], before_E: Sequence[int], devices: Sequence[int]) -> list[int]:
    """The same parts, on devices that have most of their experts already."""
    common = {(new, old): 0 for new in devices for old in devices}
    for new, old in zip(device_E, before_E, strict=True):
        if (new, old) in common:
            common[new, old] += 1
    names: dict[int, int] = {}
    for new, old in sorted(common, key=lambda pair: -common[pair]):
        if new not in names and old not in names.values():
            names[new] = old
    return [names[device] for device in device_E]


def busiest(load_E: Sequence[float], slot_E: Sequence[int], devices: int) -> float:
    """The busiest device's load over the mean."""
    held, total = len(load_E) // devices, [0.0] * devices
    for load, slot in zip(load_E, slot_E, strict=True):
        total[slot // held] += load
    return max(total) * devices / max(sum(total), 1)


def moe_layers(decoder: Decoder) -> dict[str, MoE]:
    """By their names in the decoder."""
    return {name: module for name, module in decoder.named_modules() if isinstance(module, MoE)}


def placement_of(decoder: Decoder) -> dict[str, list[int]]:
    """The slots of each layer's experts, by its name; of those that are not simply in order."""
    return {
        name: slot_E.tolist() for name, layer in moe_layers(decoder).items() if (slot_E := layer.slots_E) is not None
    }


def adopt(decoder: Decoder, placement: Mapping[str, Sequence[int]]) -> None:
    """Takes the weights of each layer to lie as `placement` says, as `placement_of` has told it."""
    for name, layer in moe_layers(decoder).items():
        slots = placement.get(name)
        layer.slots_E = None if slots is None else torch.tensor(slots, device=layer.tokens_E.device)


def sources(before_E: Sequence[int], after_E: Sequence[int]) -> list[int]:
    """Of each slot, the one that its expert has been in."""
    found = [0] * len(before_E)
    for before, after in zip(before_E, after_E, strict=True):
        found[after] = before
    return found


def held_by(tensor: Tensor, group: dist.ProcessGroup) -> list[Chunk]:
    """The part of a tensor that each rank of the group holds. Collective."""
    chunks: list[Chunk] = [((), ())] * group.size()
    dist.all_gather_object(chunks, held_chunk(tensor), group=group)
    return chunks


@torch.no_grad()
def move(tensor: Tensor, source_S: Sequence[int], chunks: Sequence[Chunk], group: dist.ProcessGroup) -> int:
    """Row s of a tensor that the group's ranks hold in such chunks becomes what row source_S[s] was; returns the bytes
    that came to this rank. Collective.

    Ranks may share rows by columns: those with the same ones exchange them.
    """
    mine, rank = local(tensor), group.rank()
    runs = [range(begins[0], begins[0] + sizes[0]) for begins, sizes in chunks]
    columns = [(begins[1:], sizes[1:]) for begins, sizes in chunks]

    def travelling(whence: int, whither: int) -> list[int]:
        """The rows that one rank has and another one wants, in the order of their new places."""
        if columns[whence] != columns[whither]:
            return []
        return [row for slot in runs[whither] if (row := source_S[slot]) in runs[whence]]

    leaving = [travelling(rank, other) for other in range(group.size())]
    arriving = [travelling(other, rank) for other in range(group.size())]
    sent = mine[_index([row - runs[rank].start for rows in leaving for row in rows], mine)]
    found = mine.new_empty(mine.shape)
    width = mine.numel() // max(len(mine), 1) * mine.itemsize
    dist.all_to_all_single(
        _bytes(found),
        _bytes(sent),
        [len(rows) * width for rows in arriving],
        [len(rows) * width for rows in leaving],
        group=group,
    )
    place = {row: i for i, row in enumerate(row for rows in arriving for row in rows)}
    mine.copy_(found[_index([place[source_S[slot]] for slot in runs[rank]], mine)])
    return sum(len(rows) for other, rows in enumerate(arriving) if other != rank) * width


def _index(rows: list[int], like: Tensor) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=like.device)


def _bytes(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.uint8)
