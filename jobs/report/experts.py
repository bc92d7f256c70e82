"""Where tokens went: heat maps of the load of experts and devices over time, and what devices were sent.

Shapes: S steps, L MoE layers, E experts, P devices of an expert-parallel group, R rows and C columns of a map.
"""

from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from moray.jobs.models.units import binary, short
from moray.jobs.report.heat import DEVICES, EXPERTS, heat_map, over_mean, over_time
from moray.jobs.report.record import Grids, Record

HEIGHT, DEVICE_HEIGHT = 72, 12


class LayerMaps(NamedTuple):
    """A MoE layer's load over the mean at the last of the steps that tell, and its maps over time."""

    at_last: str
    experts: Markup
    devices: Markup


def busiest_map(record: Record) -> Markup:
    """Layers over time: each one's busiest expert over the mean."""
    if not (load := record.grids.get("expert_load")):
        return Markup()
    return _over_time(load, over_mean(load.values).max(-1), EXPERTS, "layer", HEIGHT)


def layer_maps(record: Record) -> list[LayerMaps]:
    """Of each MoE layer; they are counted among themselves."""
    load, devices = record.grids.get("expert_load"), record.grids.get("device_load")
    if not load:
        return []
    found = []
    for layer, of_layer_SE in enumerate(over_mean(load.values).swapaxes(0, 1)):
        last_E, below = of_layer_SE[-1], Markup()
        unused = int((last_E == 0).sum())
        at_last = f"{last_E.min():.2f} to {last_E.max():.2f}" + f", {unused} unused" * bool(unused)
        if devices and layer < devices.values.shape[1]:
            ratios_SP = over_mean(devices.values[:, layer])
            below = _over_time(devices, ratios_SP, DEVICES, "device", DEVICE_HEIGHT * ratios_SP.shape[1])
        found.append(LayerMaps(at_last, _over_time(load, of_layer_SE, EXPERTS, "expert", HEIGHT), below))
    return found


def sent_maps(record: Record) -> list[tuple[str, Markup]]:
    """Maps, with titles, of the rows sent to each device."""
    if not (sent := record.grids.get("rows_sent")):
        return []
    n_layers, n_devices = sent.values.shape[1:]
    height = max(2 * DEVICE_HEIGHT * n_devices, n_layers)
    over_steps = _over_time(sent, over_mean(sent.values.sum(1)), DEVICES, "device", height)
    by_layer = heat_map(over_mean(sent.values.mean(0)), DEVICES, "layer", ("device", 0, n_devices - 1), height)
    return [("over time, all layers together", over_steps), ("by layer, all steps together", by_layer)]


def device_rows(record: Record) -> list[list[str]]:
    """A row a device: its number, load over the mean and the highest one of any layer and step, rows and bytes a step.

    What is not known of the layout that ran last is empty.
    """
    if not (load := record.grids.get("device_load")):
        return []
    ratio_SLP = over_mean(load.values)
    rows = [[str(device)] for device in range(ratio_SLP.shape[2])]
    for device, row in enumerate(rows):
        of_device_SL = ratio_SLP[..., device]
        row += [f"{of_device_SL.mean():.3f}", f"{of_device_SL.max():.3f}"]
        for name in ("rows_sent", "bytes_sent"):
            sent = record.grids.get(name)
            if not sent or sent.values.shape[-1] != len(rows):
                row.append("")
            elif name == "rows_sent":
                row.append(short(float(sent.values[..., device].sum(1).mean()), "kMGT"))
            else:
                row.append(binary(float(sent.values[:, device].mean())))
    return rows


def own_time_map(record: Record) -> Markup:
    """Workers over time: each one's own seconds of a step over the mean of all."""
    own = record.grids.get("own_seconds")
    if not own or own.values.shape[1] < 2:
        return Markup()
    return _over_time(own, over_mean(own.values), DEVICES, "rank", HEIGHT)


def _over_time(grids: Grids, ratios_SR: np.ndarray, doublings: int, row: str, height: int) -> Markup:
    steps = grids.steps
    return heat_map(over_time(steps, ratios_SR), doublings, row, ("step", int(steps[0]), int(steps[-1])), height)
