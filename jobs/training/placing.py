"""Experts placed anew by the loads that were measured: between steps, at the steps whose state is committed."""

from collections.abc import Hashable

import torch

from moray.jobs.training.begin import Training
from moray.jobs.training.optimizer import training_state
from moray.parallel.chunks import Chunk
from moray.parallel.gradients import ExpertLoad, world_sum
from moray.parallel.placement import WORTH, adopt, busiest, held_by, moe_layers, move, placement_of, planned, sources


def note_load(training: Training, load: ExpertLoad | None) -> None:
    """Counts a step's tokens, where experts are placed by them."""
    if training.layout.placement == "balanced" and load is not None:
        before = 0 if training.expert_load is None else training.expert_load
        training.expert_load = before + load.tokens_LE


def place_experts(training: Training) -> None:
    """Plans anew where experts live, from the tokens that they got since the last plan, and moves weights and moments
    of those layers in which the busiest device would have clearly less to do. Collective; all ranks know the same.
    """
    if training.expert_load is None:
        return
    training.context.enter("moving experts")
    load_LE, training.expert_load = training.expert_load.tolist(), None
    devices, moe = training.layout.ep, training.config.model.moe
    assert moe
    placement, found = placement_of(training.decoder), []
    # FSDP gives up here what it may still hold gathered since a validation, which would not move.
    state = training_state(training.decoder, training.optimizer)
    chunks: dict[Hashable, list[Chunk]] = {}
    for name, load_E in zip(moe_layers(training.decoder), load_LE, strict=True):
        slot_E = placement.get(name, list(range(len(load_E))))
        new_E = planned(load_E, slot_E, devices, moe.n_groups)
        was, would_be = busiest(load_E, slot_E, devices), busiest(load_E, new_E, devices)
        if would_be > WORTH * was:
            continue
        came = 0
        for tensor in (x for key, x in state.items() if key.split(".", 1)[1].startswith(f"{name}.experts.")):
            cut = tensor.shape, getattr(tensor, "placements", None)
            if cut not in chunks:  # most are cut alike
                chunks[cut] = held_by(tensor, training.copy)
            came += move(tensor, sources(slot_E, new_E), chunks[cut], training.copy)
        training.pulse.again()
        placement[name] = new_E
        found.append((was, would_be, came))
    if not found:
        return
    adopt(training.decoder, placement)
    before, after, moved = zip(*found, strict=True)
    told = {"layers": len(found), "of": len(load_LE), "before": max(before), "after": max(after)}
    of_all = world_sum(torch.tensor(sum(moved), dtype=torch.float64))
    training.note("placed", step=training.step, **told, bytes=int(of_all))
