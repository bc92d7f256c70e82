"""`moray submit`."""

from argparse import ArgumentParser
from collections.abc import Callable
from textwrap import wrap
from typing import Any

from moray import UserError
from moray.jobs.options import bind

USAGE = """\
usage: moray submit --to TARGET [options] -- pretrain --data.path DATA …

Everything is checked here first. What the job consists of is written to
RUN/submit, readable, and then submitted; the same command goes on with a run
that was stopped. Targets, with options of their own:
"""


def targets() -> dict[str, Callable[..., Any]]:
    """What a run can be submitted to, by the name that --to gives it."""
    from moray.jobs.submission.kubernetes import Kubernetes
    from moray.jobs.submission.ray_job import RayJob
    from moray.jobs.submission.slurm import Slurm

    return {"ray": RayJob, "slurm": Slurm, "kubernetes": Kubernetes}


def submit(arguments: list[str]) -> int:
    """Submit a run as a job: `--to TARGET [options] -- pretrain --setting value …`."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    own, command = arguments[:at], arguments[at + 1 :]
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--to", nargs="?")
    taken, options = parser.parse_known_args(own)
    named, known = taken.to, targets()
    if named is None and {"-h", "--help"} & {*options}:
        print(_usage(known))
        return 0
    if named not in known:
        raise UserError(f"--to {named or 'is missing'}: a run can be submitted to {', '.join(known)}")
    target = bind(known[named], f"moray submit --to {named}", options)()
    from moray.jobs.submission.submit import submit as run

    return run(target, command)


def _usage(known: dict[str, Callable[..., Any]]) -> str:
    lines = [USAGE]
    for name, target in known.items():
        what = (target.__doc__ or "").splitlines()[0]
        lines += wrap(what, 79, initial_indent=f"  {name:<12} ", subsequent_indent=" " * 15, break_on_hyphens=False)
    return "\n".join([*lines, "", f"moray submit --to {'|'.join(known)} --help says more."])
