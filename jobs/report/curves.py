"""Which curves a report has, and of what."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from moray.jobs.report.chart import BOTTOM, TOP, Axis, Frame, Line, chart
from moray.jobs.report.mishaps import Mishap
from moray.jobs.report.record import Record

SMOOTH_LOSS_FROM = 16


class Curve(NamedTuple):
    """names: columns of the record, each with what the legend calls it; one of which a run says nothing is left out.

    scale: what the numbers are divided by.
    """

    title: str
    unit: str
    axis: Axis
    names: Sequence[tuple[str, str]]
    scale: float = 1


LEARNING = (
    Curve("Loss", "nats a token", "auto", [("loss", "loss"), ("validation_loss", "validation")]),
    Curve("Gradient norm", "before clipping", "auto", [("grad_norm", "norm")]),
    Curve("Learning rate", "", "zero", [("lr", "rate")]),
    Curve("Auxiliary loss", "added to the loss", "auto", [("auxiliary_loss", "auxiliary"), ("z_loss", "z")]),
)
SPEED = (
    Curve(
        *("Speed", "tokens a second", "zero"),
        [("tokens_per_second", "that teach"), ("processed_tokens_per_second", "computed")],
    ),
    Curve("MFU", "% of measured peak", "zero", [("mfu", "MFU")], 0.01),
    Curve("A step", "seconds", "zero", [("seconds", "in all"), ("own_seconds_slowest", "slowest worker's own")]),
    Curve("Memory", "GiB", "zero", [("memory_bytes", "peak, rank 0"), ("gpu_memory_bytes", "fullest GPU")], 2**30),
    Curve("GPU temperature", "°C, hottest", "linear", [("temperature_c", "temperature")]),
    Curve("GPU power", "W, all together", "zero", [("power_w", "power")]),
    Curve("Throttled GPUs", "", "zero", [("throttled", "GPUs")]),
)
DROPPED = Curve("Dropped", "share of choices", "zero", [("dropped", "dropped")])
OF_LAYERS: tuple[tuple[str, str, str, Axis], ...] = (
    ("expert_balance", "Experts: max/mean load", "1 is even", "auto"),
    ("expert_cv", "Experts: coefficient of variation", "0 is even", "zero"),
    ("expert_entropy", "Experts: entropy", "1 is even", "linear"),
    ("group_balance", "Groups: max/mean load", "1 is even", "auto"),
    ("device_balance", "Devices: max/mean load", "1 is even", "auto"),
    ("device_cv", "Devices: coefficient of variation", "0 is even", "zero"),
    ("device_entropy", "Devices: entropy", "1 is even", "linear"),
    ("dropped_by_layer", "Dropped", "share of a layer's choices", "zero"),
    ("router_z", "Router z", "mean squared log-sum-exp", "auto"),
)


def curves(record: Record, wanted: Sequence[Curve]) -> Markup:
    """Those of which the run has said anything."""
    charts = []
    for title, unit, axis, names, scale in wanted:
        known = [(column, name, f"c{n}") for n, (column, name) in enumerate(names, 1) if record.known(column)]
        lines = [_line(record, *one, scale) for one in reversed(known)]  # the first one lies on top
        charts.append(chart(title, unit, lines, span_of(record), axis))
    return Markup().join(charts)


def curves_of_layers(record: Record) -> Markup:
    """How even the load of experts and of devices is: the mean of the layers, and between which values they lie."""
    charts = []
    for column, title, unit, axis in OF_LAYERS:
        low, high = (_line(record, f"{column} {part}", "all layers", "c1") for part in ("low", "high"))
        lines = [low._replace(highs=high.values), _line(record, f"{column} mean", "mean", "c1")]
        charts.append(chart(title, unit, lines, span_of(record), axis))
    is_by_layer = record.known("dropped_by_layer high")
    return Markup().join(charts) + (Markup() if is_by_layer else curves(record, [DROPPED]))


def marks(record: Record, found: Sequence[Mishap]) -> Markup:
    """What all charts show of faults: where each struck and where the run went on, and a band over what it undid."""
    frame, shapes = Frame(span_of(record), (0, 1), is_log=False), []
    for mishap in found:
        if mishap.step is None or not mishap.is_fault:
            continue
        end = float(frame.x(np.array(mishap.step)))
        if mishap.resumed is not None:
            start = float(frame.x(np.array(mishap.resumed)))
            shapes.append(f'<path class="again" d="M{start:.1f} {TOP}V{BOTTOM}H{end:.1f}V{TOP}z"/>')
            shapes.append(f'<path class="resumed" d="M{start:.1f} {TOP}V{BOTTOM}"/>')
        shapes.append(f'<path class="fault" d="M{end:.1f} {TOP}V{BOTTOM}"/>')
    return Markup("".join(shapes))


def span_of(record: Record) -> tuple[int, int]:
    """A chart of a single step has room for a second one."""
    first, last = int(record.steps[0]), int(record.steps[-1])
    return first, max(last, first + 1)


def _line(record: Record, column: str, name: str, colour: str, scale: float = 1) -> Line:
    values = record.columns[column]
    is_there = ~np.isnan(values)
    line = Line(name, record.steps[is_there], values[is_there] / scale, colour)
    return line._replace(smooth_from=SMOOTH_LOSS_FROM) if column == "loss" else line
