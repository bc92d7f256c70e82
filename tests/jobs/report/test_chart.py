"""Charts and heat maps of runs that no test can train: a million steps, sixty layers of 256 experts, odd numbers."""

import math
from html.parser import HTMLParser

import numpy as np
import pytest

from moray.jobs.report.chart import Line, chart, human, log_ticks, thin, ticks
from moray.jobs.report.experts import busiest_map, layer_maps
from moray.jobs.report.heat import over_mean, over_time
from moray.jobs.report.record import Grids, Record

MILLION = np.arange(1, 1_000_001)


def points(drawn: str) -> list[list[list[float]]]:
    """Of each polyline, x and y of each point."""
    found = []

    class Polylines(HTMLParser):
        def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag == "polyline":
                found.append([[*map(float, pair.split(","))] for pair in (dict(attrs)["points"] or "").split()])

    Polylines().feed(drawn)
    return found


def test_a_million_steps_make_a_small_chart_with_every_peak() -> None:
    values = np.random.default_rng(0).normal(2, 0.01, MILLION.size)
    values[[123_456, 999_998]] = 9.0, -5.0
    drawn = chart("Loss", "nats", [Line("loss", MILLION, values, "c1")], (1, 1_000_000), "auto")
    assert len(drawn) < 20_000
    every, smoothed = points(drawn)
    assert len(every) <= 2 * 280 + 2
    # The highest point of the drawing is at the spike's step, the lowest one at the dip's.
    assert min(every, key=lambda point: point[1])[0] == pytest.approx(50 + 500 * 0.123456, abs=0.1)
    assert max(every, key=lambda point: point[1])[0] == pytest.approx(550, abs=0.1)
    heights = [y for _, y in smoothed]
    assert max(heights) - min(heights) < 0.5, "a spike of one step is none of a thousand steps' mean"


@pytest.mark.parametrize("size", [1, 2, 559, 560, 561, 5_000])
def test_thinning_keeps_ends_and_extremes_of_every_stretch(size: int) -> None:
    values = np.random.default_rng(size).normal(size=size)
    steps, kept = thin(np.arange(size), values)
    assert list(kept) == list(values[steps])
    assert list(steps) == sorted(set(steps))
    assert {0, size - 1, int(values.argmax()), int(values.argmin())} <= set(steps)
    assert (size <= 560) == (len(steps) == size)


def test_what_is_not_finite_is_marked_and_bends_no_axis() -> None:
    values = np.array([3.0, np.inf, 2.0, -np.inf, 1.0])
    drawn = chart("Loss", "nats", [Line("loss", np.arange(1, 6), values, "c1")], (1, 5), "auto")
    assert drawn.count("not finite") == 1
    assert drawn.count("l6 6m0-6l-6 6") == 2, "a cross each"
    (line,) = points(drawn)
    assert [x for x, _ in line] == [50, 300, 550]
    assert chart("Loss", "nats", [Line("loss", np.arange(1, 6), np.full(5, np.inf), "c1")], (1, 5), "auto") == ""
    assert chart("Loss", "nats", [Line("loss", np.arange(0), np.zeros(0), "c1")], (1, 5), "auto") == ""


@pytest.mark.parametrize("values", [[5.0], [0.0, 0.0], [1e-300, 1e300], [-1e30, 1e30], [1e-12, 2e-12], [7e22, 7e22]])
@pytest.mark.parametrize("axis", ["auto", "linear", "zero"])
def test_odd_numbers_lie_within_their_chart(values: list[float], axis: str) -> None:
    steps = np.arange(1, len(values) + 1)
    drawn = chart("x", "", [Line("x", steps, np.array(values), "c1")], (1, 2), axis)  # type: ignore[arg-type]
    assert "nan" not in drawn
    for line in points(drawn):
        assert all(50 <= x <= 550 and 8 <= y <= 168 for x, y in line)
    assert drawn.count('class="y"') >= 3, "two numbers at least beside the word step"


def test_titles_and_names_are_escaped() -> None:
    evil = "<script>\"'&"
    drawn = chart(evil, evil, [Line(evil, np.arange(2), np.ones(2), "c1")], (0, 1), "auto")
    assert "<script" not in drawn


def test_ticks_are_round_and_numbers_short() -> None:
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(0.9831, 0.9999, 5) == pytest.approx([0.985, 0.99, 0.995])
    assert ticks(1, 1_000_000, 8) == [200_000 * n for n in range(1, 6)]
    assert log_ticks(0.4, 35) == pytest.approx([0.5, 1, 2, 5, 10, 20])
    assert log_ticks(1e-6, 1e6) == pytest.approx([10.0**n for n in range(-6, 7, 2)])
    assert log_ticks(3.5, 4.5) == []
    for number, said in (
        *((0, "0"), (1, "1"), (9999, "9999"), (10_000, "10k"), (1_234_567, "1.235M"), (2.5e9, "2.5G"), (7e12, "7T")),
        *((0.001, "0.001"), (0.000123, "1.23e-4"), (-0.25, "-0.25"), (1e30, "1e30"), (math.inf, "not finite")),
    ):
        assert human(number) == said


def record_of(**grids: np.ndarray) -> Record:
    steps = np.arange(1, 1 + len(next(iter(grids.values()))))
    return Record(steps, {}, {name: Grids(steps, values) for name, values in grids.items()}, {}, None)


def test_sixty_layers_of_256_experts_stay_small() -> None:
    """Even where no column resembles the one before it, which deflate likes least."""
    load_SLE = np.random.default_rng(0).gamma(1.5, size=(200, 60, 256)).astype("f4")
    record = record_of(expert_load=load_SLE, device_load=load_SLE.reshape(200, 60, 8, 32).sum(3))
    maps = layer_maps(record)
    assert len(maps) == 60
    assert sum(len(one.experts) + len(one.devices) for one in maps) + len(busiest_map(record)) < 4_000_000


def test_columns_are_steps_of_even_distance() -> None:
    """Steps 10, 20, 30 and 100: the last stands for the time from 65 on."""
    of_steps = over_time(np.array([10, 20, 30, 100]), np.arange(4.0)[:, None])
    assert of_steps.tolist() == [[0, 2, 3, 3]]
    assert over_time(np.arange(1000), np.zeros((1000, 3))).shape == (3, 240)


def test_a_layer_without_a_token_is_even() -> None:
    assert over_mean(np.array([[0.0, 0.0], [3.0, 1.0]])).tolist() == [[1, 1], [1.5, 0.5]]
