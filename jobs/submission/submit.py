"""`moray submit`: what a run needs is checked here, where a mistake costs no time in a queue; then it becomes a job."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from moray import UserError
from moray.cluster.exit_codes import EXIT_DONE, EXIT_KILLED_BY_KEYBOARD
from moray.jobs.config.run import RunConfig
from moray.jobs.config.starting import TRAINING_VERBS, config_of
from moray.jobs.runs.files import replace_file
from moray.jobs.submission.target import Job, Target


def submit(target: Target, command: Sequence[str], console: Console | None = None) -> int:
    """Submits `command`, a verb that trains and its settings, and returns an exit code: with `follow`, the run's.

    Raises UserError for all that can be known to be wrong before the job runs.
    """
    console = console or Console(stderr=True)
    tell = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    job = as_job(target, command)
    is_here = _is_here(job.config)
    target.check(job, is_here=is_here)
    if not is_here:
        tell(f"{job.config.data.told} is not on this machine: the job itself will see whether it can be used")
    elif not _has_steps(job.config, tell):
        return EXIT_DONE
    files = target.files(job)
    if target.print:
        _show(job, files)
        return EXIT_DONE
    job.folder.mkdir(parents=True, exist_ok=True)
    for file, text in files.items():
        replace_file(job.folder / file, text)
    job_id = target.submit(job)
    tell(target.tell(job, job_id))
    if not target.follow:
        return EXIT_DONE
    try:
        return target.watch(job, job_id)
    except KeyboardInterrupt:
        tell(f"not followed any more; the job goes on. {target.tell(job, job_id)}")
        return EXIT_KILLED_BY_KEYBOARD


def as_job(target: Target, command: Sequence[str]) -> Job:
    """The run that a command's words describe, by the name that the target gives it. Raises UserError."""
    verb, config = _read(command)
    run = Path(config.run.dir)
    name = target.name or run.name
    here = run / "submit" if _is_here(config) else Path(f"{_plain(name)}-submit").absolute()
    return Job(name, verb, config, here)


def _is_here(config: RunConfig) -> bool:
    return all(Path(folder).exists() for folder in config.data.folders.values())


def _read(command: Sequence[str]) -> tuple[str, RunConfig]:
    verb, *settings = command or [""]
    if verb not in TRAINING_VERBS:
        raise UserError(
            f"`moray submit` runs a verb that trains, after two dashes: -- {TRAINING_VERBS[0]} --data.path DATA "
            f"--run.dir RUN …; {verb or 'nothing'} is none"
        )
    return verb, config_of(verb, settings)


def _has_steps(config: RunConfig, tell: Callable[[str], None]) -> bool:
    from moray.jobs.runs.folder import check_folder
    from moray.jobs.training.begin import checkpoints_of
    from moray.jobs.training.choices import as_recorded
    from moray.jobs.training.drive import check

    config = as_recorded(config, checkpoints_of(config))
    sources = check(config, tell)
    sources.verify()
    return check_folder(config, sources, tell)


def _plain(name: str) -> str:
    """A name that can be a file's."""
    return re.sub(r"[^\w.-]", "_", name)


def _show(job: Job, files: Mapping[str, str]) -> None:
    """On standard output: one file as it is, for a pipe; several with a line above each that names it."""
    for file, text in files.items():
        if len(files) > 1:
            print(f"# {job.folder / file}")
        print(text)
