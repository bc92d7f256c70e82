"""Line charts as SVG: pure functions of numbers. Words are escaped, whatever they say."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
from markupsafe import Markup

WIDTH, HEIGHT = 560, 190
LEFT, RIGHT, TOP, BOTTOM = 50, 550, 8, 168
BUCKETS = 280
SMOOTH_BUCKETS = 120
LOG_FROM = 30.0
"""A chart of positive numbers of which the highest is so many times the lowest has a logarithmic axis."""
DOTTED_TO = 50

Axis = Literal["auto", "linear", "zero"]
"""auto: logarithmic where LOG_FROM says so. zero: linear, and begins there."""


class Line(NamedTuple):
    """values [N] at steps [N]; what is not finite is shown at the upper edge. colour: a class of page.css.

    highs: where the line is the lower edge of a band, its upper one. smooth_from: more steps than that are shown
    faintly, and a smoothed line before them.
    """

    name: str
    steps: np.ndarray
    values: np.ndarray
    colour: str
    highs: np.ndarray | None = None
    smooth_from: int = 2 * BUCKETS


class Frame(NamedTuple):
    """Where steps and values lie in a chart."""

    steps: tuple[float, float]
    values: tuple[float, float]
    is_log: bool

    def x(self, step: np.ndarray) -> np.ndarray:
        first, last = self.steps
        return LEFT + (np.clip(step, first, last) - first) / max(last - first, 1) * (RIGHT - LEFT)

    def y(self, value: np.ndarray) -> np.ndarray:
        low, high, at = *self.values, value
        if self.is_log:
            low, high, at = math.log(low), math.log(high), np.log(np.maximum(value, low))
        return BOTTOM - (at - low) / (high - low) * (BOTTOM - TOP)


def chart(title: str, unit: str, lines: Sequence[Line], span: tuple[int, int], axis: Axis) -> Markup:
    """A figure with axes, a legend and the newest values; nothing where no line has a finite one.

    span: the first and the last step of all charts. Shows #marks, which the page defines.
    """
    lines = [line for line in lines if np.isfinite(line.values).any()]
    if not lines:
        return Markup()
    finite = np.concatenate([edge[np.isfinite(edge)] for line in lines for edge in _edges(line)]).astype(float)
    frame = _frame(finite.min(), finite.max(), span, axis)
    return Markup(
        '<figure class="chart"><figcaption><b>{}</b> <i>{}</i>{}</figcaption>'
        '<svg viewBox="0 0 {} {}" role="img" data-frame="{:g} {:g} {:g} {:g} {:d}"><title>{}</title><desc>{}</desc>'
        '{}<use href="#marks"/>{}</svg></figure>'
    ).format(
        title, f"{unit}, logarithmic" if frame.is_log else unit, Markup().join(map(_legend, lines)),
        WIDTH, HEIGHT, *span, *frame.values, frame.is_log,
        title, "; ".join(map(_describe, lines)),
        Markup().join(_axes(frame)), Markup().join(_draw(line, frame) for line in lines),
    )  # fmt: skip


def thin(steps: np.ndarray, values: np.ndarray, buckets: int = BUCKETS) -> tuple[np.ndarray, np.ndarray]:
    """Both ends, and of as many stretches as there are buckets the lowest and the highest: no peak is lost."""
    if len(steps) <= 2 * buckets:
        return steps, values
    edges = pairwise(np.linspace(0, len(steps), buckets + 1).astype(int).tolist())
    kept = {first + int(end(values[first:last])) for first, last in edges for end in (np.argmin, np.argmax)}
    at = np.array(sorted(kept | {0, len(steps) - 1}))
    return steps[at], values[at]


def smooth(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of SMOOTH_BUCKETS stretches, or of fewer of four steps, each with its neighbours: 1/4, 1/2, 1/4."""
    starts = np.linspace(0, len(steps), min(SMOOTH_BUCKETS, -(-len(steps) // 4)) + 1).astype(int)[:-1]
    counts = np.diff(starts, append=len(steps))
    means = np.add.reduceat(values, starts) / counts
    return np.add.reduceat(steps, starts) / counts, np.convolve(np.pad(means, 1, "edge"), [0.25, 0.5, 0.25], "valid")


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers between two others, both included."""
    rough = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * next(factor for factor in (1, 2, 5, 10) if factor * unit >= rough * (1 - 1e-9))
    return [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of each decade, or where there are many decades some of their beginnings."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = -(-len(decades) // 8)
    factors = (1, 2, 5) if high < 500 * low else (1,)
    found = [factor * 10.0**n for n in decades[::every] for factor in factors]
    return [value for value in found if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]


def human(value: float) -> str:
    """Four digits at most, and a letter for thousands, millions and so on."""
    size = abs(value)
    if not math.isfinite(value):
        return "not finite"
    if size and (size < 1e-3 or size >= 1e15):
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for scale, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= max(scale, 1e4) * 0.99995:
            return f"{value / scale:.4g}{letter}"
    return f"{value:.4g}"


def _frame(low: float, high: float, span: tuple[int, int], axis: Axis) -> Frame:
    if axis == "auto" and low > 0 and high > LOG_FROM * low:
        return Frame(span, (low / 1.1, high * 1.1), True)
    low = min(low, 0.0) if axis == "zero" else low
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return Frame(span, (low if axis == "zero" else low - margin, high + margin), False)


def _edges(line: Line) -> list[np.ndarray]:
    return [line.values] if line.highs is None else [line.values, line.highs]


def _axes(frame: Frame) -> Iterator[Markup]:
    values = log_ticks(*frame.values) if frame.is_log else ticks(*frame.values, most=5)
    for value, y in zip(values, frame.y(np.array(values)).tolist(), strict=True):
        yield Markup('<path class="grid" d="M{} {:.1f}H{}"/>').format(LEFT, y, RIGHT)
        yield Markup('<text class="y" x="{}" y="{:.1f}">{}</text>').format(LEFT - 6, y + 3.5, human(value))
    steps = [step for step in ticks(*frame.steps, most=8) if step == int(step)]
    for step, x in zip(steps, frame.x(np.array(steps)).tolist(), strict=True):
        yield Markup('<path class="tick" d="M{:.1f} {}v4"/>').format(x, BOTTOM)
        yield Markup('<text class="x" x="{:.1f}" y="{}">{}</text>').format(x, BOTTOM + 16, human(step))
    yield Markup('<text class="y" x="{}" y="{}">step</text>').format(LEFT - 6, BOTTOM + 16)
    yield Markup('<path class="axis" d="M{} {}H{}"/>').format(LEFT, BOTTOM, RIGHT)


def _draw(line: Line, frame: Frame) -> Markup:
    is_finite = np.isfinite(line.values)
    steps, values = line.steps[is_finite], line.values[is_finite].astype(float)
    bad = frame.x(thin(line.steps[~is_finite], line.values[~is_finite])[0])
    crosses = "".join(f"M{x - 3:.1f} {TOP}l6 6m0-6l-6 6" for x in bad.tolist())
    drawn = Markup('<path class="bad" d="{}"><title>not finite</title></path>').format(crosses) * bool(crosses)
    points = _points(frame, *thin(steps, values))
    if line.highs is not None:
        back = _points(frame, *(edge[::-1] for edge in thin(steps, line.highs[is_finite])))
        return drawn + Markup('<polygon class="{}" points="{} {}"/>').format(line.colour, points, back)
    polyline = Markup('<polyline class="{}" data-name="{}" points="{}"/>')
    if len(steps) > line.smooth_from:
        drawn += polyline.format(f"{line.colour} raw", line.name, points)
        return drawn + polyline.format(line.colour, f"{line.name}, smoothed", _points(frame, *smooth(steps, values)))
    dots = "".join(f"M{point}h0" for point in points.split()) if len(steps) <= DOTTED_TO else ""
    drawn += Markup('<path class="{} dots" d="{}"/>').format(line.colour, dots) * bool(dots)
    return drawn + polyline.format(line.colour, line.name, points)


def _points(frame: Frame, steps: np.ndarray, values: np.ndarray) -> str:
    places = zip(frame.x(steps).tolist(), frame.y(values).tolist(), strict=True)
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _legend(line: Line) -> Markup:
    if line.highs is not None:
        return Markup('<span class="key band {}">{}</span>').format(line.colour, line.name)
    last = human(float(line.values[-1]))
    return Markup('<span class="key {}">{} <b>{}</b></span>').format(line.colour, line.name, last)


def _describe(line: Line) -> str:
    is_finite = np.isfinite(line.values)
    steps, values = line.steps[is_finite], line.values[is_finite]
    highs = values if line.highs is None else line.highs[is_finite]
    return (
        f"{line.name}: {human(float(values[0]))} at step {steps[0]:.0f}, {human(float(values[-1]))} at step "
        f"{steps[-1]:.0f}, between {human(float(values.min()))} and {human(float(highs.max()))}"
    )
