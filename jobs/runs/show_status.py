"""`moray status` for the eye: one run in a few lines, several as a table; and again and again while they go on."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from moray.jobs.runs.status import Status, status_of

WATCH_EVERY_S = 1.0
COLUMNS = "{:<10}  {:>15}  {:>8}  {:>11}  {:>7}  {:>7}  {:>6}"  # 78 columns with the indent


def show_status(runs: Sequence[Path], *, watch: bool, as_json: bool, console: Console) -> list[Status]:
    """Prints how the runs get on; with `watch`, again and again until none of them is running.

    In a terminal it does so in place. As JSON, each run is one object on one line. Returns what it has said last.
    """
    if as_json:
        return _follow(runs, watch, lambda found: print(*(status.model_dump_json() for status in found), sep="\n"))
    if watch and console.is_terminal:
        with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
            return _follow(runs, watch, lambda found: live.update(Text("\n".join(_lines(found))), refresh=True))
    # A path that is longer than the terminal is wide stays whole: it can be copied.
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    return _follow(runs, watch, lambda found: say("\n".join(_lines(found))))


def _follow(runs: Sequence[Path], watch: bool, show: Callable[[list[Status]], None]) -> list[Status]:
    while True:
        found = [status_of(run) for run in runs]
        show(found)
        if not watch or all(status.state != "running" for status in found):
            return found
        time.sleep(WATCH_EVERY_S)


def _lines(found: Sequence[Status]) -> Iterator[str]:
    if len(found) == 1:
        yield from (f"{name:<9}{what}" for name, what in _parts(found[0]) if what)
        return
    yield "  " + COLUMNS.format("state", "step", "loss", "tokens/s", "left", "commit", "faults")
    for status in found:
        yield status.run
        yield "  " + COLUMNS.format(
            status.state,
            f"{_or_dash(status.step, 'd')}/{_or_dash(status.steps, 'd')}",
            _or_dash(status.loss, ".3f"),
            _or_dash(status.tokens_per_second, ",.0f"),
            span(status.seconds_left),
            span(status.commit_seconds_ago),
            status.faults,
        )


def _parts(status: Status) -> Iterator[tuple[str, str]]:
    yield "run", status.run
    yield "state", f"{status.state}: {status.why}" if status.why else status.state
    if status.since is not None:
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(status.since))
        jobs = "".join(f", {scheduler} job {name}" for scheduler, name in status.job.items())
        yield "attempt", f"since {began}, pid {status.pid} on {status.host}, launcher {status.launcher}{jobs}"
    if status.workers:
        yield "workers", f"{status.workers}, generation {status.generation}, on {', '.join(status.nodes)}"
    if status.step is not None:
        ago = f", {span(status.step_seconds_ago)} ago" if status.step_seconds_ago is not None else ""
        left = f", {span(status.seconds_left)} left" if status.seconds_left is not None else ""
        yield "step", f"{status.step} of {_or_dash(status.steps, 'd')}{ago}{left}"
    if status.loss is not None:
        speed = f", {status.tokens_per_second:,.0f} tokens/s" if status.tokens_per_second is not None else ""
        yield "loss", f"{status.loss:.3f}{speed}"
    if status.commit_step is not None:
        yield "commit", f"step {status.commit_step}, {span(status.commit_seconds_ago)} ago"
    if status.stragglers:
        yield "slow", f"{', '.join(status.stragglers)}: the others wait at each step"
    for node in status.set_aside:
        yield "aside", f"node {node}"
    if status.skipped:
        yield "skipped", f"{status.skipped:,} sequences, for bad steps"
    again = f"{status.steps_again} steps computed again"
    if status.faults:
        yield "faults", f"{status.faults}: {status.fault_seconds:.1f} s until all were at work again, {again}"
        yield "", f"the last: {status.last_fault}"
    elif status.steps_again:
        yield "faults", f"none that the driver saw, {again}"


def span(seconds: float | None) -> str:
    """Two or three digits and a unit."""
    if seconds is None:
        return "-"
    for limit, unit, name in ((100, 1, "s"), (100 * 60, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86400:.0f} d"


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
