"""A campaign: faults, one after the other, against a run that goes on; and what each of them cost."""

import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

from rich.console import Console

from chaos.faults import Fault, Repair
from chaos.run import AT_WORK, Run, words
from moray.jobs.config.arguments import parse_settings
from moray.jobs.config.load import load_config
from moray.jobs.training.drive import drive
from moray.parallel.checkpoint.commits import list_commits

PROOF_STEPS = 2


@dataclass(frozen=True)
class Outcome:
    """Seconds from the fault until it was noticed (None: nothing was to be) and until all computed again, where it ends
    the driver from the new one's start; steps computed again; how the driver ended (None: it lived).
    """

    fault: str
    noticed_s: float | None
    back_s: float
    steps_again: int
    code: int | None


def undisturbed(data: Path, folder: Path, steps: int) -> Path:
    """The same run by one process."""
    alone = {"cluster__launcher": "local", "cluster__workers": 1}
    assert drive(load_config(*parse_settings(words(data, folder, steps, **alone))), Console(quiet=True)) == 0
    return folder


def harm(run: Run, fault: Fault, random: Random) -> Outcome:
    """Waits until the run is well, does it to it, and waits until it is well again.

    Raises AssertionError where it does not get well, or where more was lost than promised.
    """
    assert not run.is_ill, f"it has not got well after {run.is_ill}"
    wait_until_well(run)
    time.sleep(random.uniform(0, 1))  # anywhere in a step
    run.wait_until(lambda: run.generation() and run.nodes.at_work(), "all at work")  # it may have begun to grow
    run.is_ill = fault.name
    n_events, repeated, generation = len(run.events()), _repeated(run), run.generation()
    repair = fault.harm(run, random)
    began = since = time.time()
    noticed, code = None, None
    if fault.ends:
        code, noticed = _same_command_again(run, fault, repair)
        since, generation = time.time(), run.newest_generation()
    if fault.sign and not fault.ends:
        kinds = f"an event {fault.sign} of {fault.name}"
        run.wait_until(lambda: any(event["kind"] == fault.sign for event in run.events()[n_events:]), kinds)
    back = _wait_until_back(run, fault, generation)
    signs = [event["time"] for event in run.events()[n_events:] if event["kind"] == fault.sign]
    if not fault.ends:
        noticed = max(began, signs[0]) if signs else None
    if repair and (fault.is_late or not fault.ends):
        repair()
    wait_until_well(run)
    again = _repeated(run) - repeated
    run.is_ill = ""
    assert again <= fault.steps, f"{fault.name}: {again} steps were computed again, {fault.steps} are promised"
    is_own_end = code is not None and fault.sign == ""
    return Outcome(
        fault.name, None if noticed is None or is_own_end else noticed - began, max(0.0, back - since), again, code
    )


def _same_command_again(run: Run, fault: Fault, repair: Repair | None) -> tuple[int, float]:
    """Waits for the driver's end; returns its exit code, and when that was."""
    run.wait_until(lambda: run.driver is None or run.driver.poll() is not None, f"{fault.name}: the driver's end")
    noticed, said = time.time(), run.ended()
    code = run.codes[-1]
    assert code in fault.ends, f"{fault.name}: exit code {code}: {said}"
    if repair and not fault.is_late:
        repair()
    run.start()
    return code, noticed


def _wait_until_back(run: Run, fault: Fault, generation: int) -> float:
    """Returns when that was."""
    if fault.back == "at work":
        run.wait_until(lambda: run.generation() > generation, f"{fault.name}: all at work again")
        return next(event["time"] for event in run.events()[::-1] if event["kind"] in AT_WORK)
    if fault.back == "a commit":
        newest = _newest(run)
        run.wait_until(lambda: _newest(run) > newest, f"{fault.name}: another commit")
    else:
        steps = run.steps()
        run.wait_until(lambda: run.steps() > steps, f"{fault.name}: another step")
    return time.time()


def _newest(run: Run) -> int:
    """The step of the newest commit."""
    return max((commit.step for commit in list_commits(run.folder / "checkpoints")), default=0)


def wait_until_well(run: Run) -> None:
    """All compute, what was undone is done again, and there is a commit newer than what they went on from."""
    run.wait_until(run.generation, "all at work")
    steps = max(run.steps() + PROOF_STEPS, *run.rows())
    run.wait_until(lambda: run.generation() and run.steps() >= steps and _has_committed(run), "steps")


def _has_committed(run: Run) -> bool:
    kinds = [event["kind"] for event in run.events() if event.get("source") != "memory"]
    return "commit" in kinds[max(i for i, kind in enumerate(kinds) if kind in ("begin", "resume")) :]


def _repeated(run: Run) -> int:
    """How many steps were computed more than once, as often as they were."""
    rows = run.rows()
    return len(rows) - len(set(rows))
