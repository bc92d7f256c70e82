"""A campaign of faults against runs on a real Ray of four nodes on this machine, and the table of what they cost.

    python benchmarks/chaos.py --out DIR [--rounds 4] [--faults-a-run 10] [--seed 0] [--only WORDS]

Needs Linux, root, and `ip`: each node has a network namespace, process ids, /dev/shm and a Ray of its own. Every round
has every kind of fault once, in an order that the seed decides. After each run a checker that reads only what is on
disk compares it with one process that nothing happened to, bit for bit; and nothing may be left on the nodes.
"""

import argparse
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import time
import traceback
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random

from rich.console import Console

from moray.jobs.datasets.config import PrepareConfig
from moray.jobs.datasets.prepare import prepare

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "jobs")]

from chaos.campaign import Outcome, harm, undisturbed  # noqa: E402
from chaos.check import left_behind, problems_on_disk  # noqa: E402
from chaos.faults import FAULTS, Fault  # noqa: E402
from chaos.nodes import Nodes, ray_of  # noqa: E402
from chaos.run import Run  # noqa: E402
from disks import small_file_system  # noqa: E402

WORKERS = ("4", "2:4")
"""In turns: a group that waits for its slots, and one that goes on with fewer."""


def one_run(
    nodes: Nodes, data: Path, folder: Path, alone: Path, steps: int, faults: list[Fault], random: Random, workers: str
) -> Iterator[Outcome]:
    """Yields the outcome of each fault; raises AssertionError where something is not as promised."""
    run = Run(nodes, data, folder, steps, workers)
    run.start()
    try:
        for fault in faults:
            yield harm(run, fault, random)
        run.finish()
    finally:
        if run.driver:
            run.kill_driver()
            print((run.driver.communicate()[0] or "")[-2000:], file=sys.stderr)
    problems = [*problems_on_disk(folder, alone, steps), *left_behind(run)]
    assert not problems, problems


@contextmanager
def kept(run: Path, copy: Path) -> Iterator[None]:
    """What is left of a run in which something was wrong."""
    try:
        yield
    except BaseException:
        shutil.copytree(run, copy)
        raise


def table(outcomes: list[Outcome]) -> str:
    of = defaultdict(list)
    for outcome in outcomes:
        of[outcome.fault].append(outcome)
    lines = [
        "| fault | times | noticed after s | all compute again after s | steps again |",
        "|---|---|---|---|---|",
    ]
    for fault in FAULTS:
        if found := of[fault.name]:
            noticed = [outcome.noticed_s for outcome in found if outcome.noticed_s is not None]
            back, again = [outcome.back_s for outcome in found], [outcome.steps_again for outcome in found]
            first = spread(noticed) if noticed else "-"
            lines.append(f"| {fault.name} | {len(found)} | {first} | {spread(back)} | {spread(again, 0)} |")
    return "\n".join(lines)


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median and worst."""
    return f"{statistics.median(values):.{digits}f} ({max(values):.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--faults-a-run", type=int, default=10)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="faults whose name contains this")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # on the way out all nodes are switched off
    random, out = Random(options.seed), options.out / f"campaign-{int(time.time())}"
    data = out / "data"
    stdlib = Path(sysconfig.get_path("stdlib"))
    sources = stdlib / "json", stdlib / "wsgiref"
    prepare(PrepareConfig(sources=sources, out=data, vocab_size=400, validation=0.1), Console(quiet=True))
    faults = [fault for fault in FAULTS if options.only in fault.name]
    plan = [fault for _ in range(options.rounds) for fault in random.sample(faults, len(faults))]
    alone = undisturbed(data, out / "alone", options.steps)
    outcomes, failures = [], []
    for i in range(0, len(plan), options.faults_a_run):
        disk = out / f"disk-{i}"
        disk.mkdir()
        try:
            with small_file_system(disk, 64), kept(disk / "run", out / f"run-{i}"), ray_of(out, [2, 2, 2]) as nodes:
                part, workers = plan[i : i + options.faults_a_run], WORKERS[i // options.faults_a_run % 2]
                for outcome in one_run(nodes, data, disk / "run", alone, options.steps, part, random, workers):
                    outcomes.append(outcome)
                    print(f"{len(outcomes)}/{len(plan)} {outcome}", file=sys.stderr, flush=True)
        except (AssertionError, subprocess.TimeoutExpired):
            failures.append(traceback.format_exc())
            print(failures[-1], file=sys.stderr, flush=True)
    print(table(outcomes))
    print(f"{len(outcomes)} faults, {len(failures)} runs in which something was not as promised")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
