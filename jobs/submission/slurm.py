"""A run as a batch job of Slurm: a Ray of the job's own, or srun's tasks as ranks."""

import re
import shlex
import subprocess
import sys
import time as clock
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moray import UserError
from moray.cluster.exit_codes import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED
from moray.cluster.slurm.script import BatchJob
from moray.jobs.alignment.critic import committed_bytes
from moray.jobs.runs.files import replace_file
from moray.jobs.submission.target import RECIPE, Job, Target

SCRIPT, LOG, TOKEN, ID = "slurm.sh", "slurm.log", ".token", "slurm.job"
START_S = 120
# A slow start of the last step, and the least that a disk which many share takes.
STOP_S, COMMIT_BYTES_PER_S = 120, 500e6
MOST_STOP_S = 65535  # what sbatch --signal takes
POLL_S = 2.0
ENDED = {"COMPLETED": EXIT_DONE, "FAILED": EXIT_FAILED, "OUT_OF_MEMORY": EXIT_FAILED}
# Ended by Slurm, and no word of the run's own: its commits stand, and the same command goes on from them.
ENDED |= dict.fromkeys(("CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL", "BOOT_FAIL", "DEADLINE"), EXIT_INTERRUPTED)


@dataclass(frozen=True, kw_only=True)
class Slurm(Target):
    """A batch job of Slurm: on a Ray of its own, or with cluster.launcher=slurm as tasks of srun."""

    nodes: int = 1
    """Nodes, which share cluster.workers evenly."""

    time: str = ""
    """The time limit, as sbatch takes it (90, 1:30:00, 2-12); by default the partition's."""

    partition: str = ""
    """Where to run; by default Slurm's choice."""

    account: str = ""
    """Whom to charge; by default Slurm's choice."""

    gpus_per_node: int = 0
    """By default one for each worker with cluster.device=cuda, and none otherwise."""

    cpus_per_worker: int = 1
    """Cores for each worker."""

    sbatch: str = ""
    """More options of sbatch, as they would stand in its command: "--qos=long --mem=64G". They win over moray's."""

    def check(self, job: Job, *, is_here: bool) -> None:
        cluster = job.config.cluster
        if cluster.launcher not in ("ray", "slurm"):
            raise UserError(
                f"cluster.launcher={cluster.launcher} must be ray (a Ray of the job's own) or slurm (tasks of srun) "
                "in a job of Slurm"
            )
        if not is_here:
            raise UserError(
                f"{job.config.data.told} is not here; a job of Slurm needs data and run in folders that all of its "
                "nodes and this machine see"
            )
        for option, value, least in (
            ("--nodes", self.nodes, 1),
            ("--cpus-per-worker", self.cpus_per_worker, 1),
            ("--gpus-per-node", self.gpus_per_node, 0),
        ):
            if value < least:
                raise UserError(f"{option} {value} must be at least {least}")
        workers = cluster.max_workers // self.nodes
        if cluster.max_workers % self.nodes:
            raise UserError(f"cluster.workers={cluster.workers} must be a multiple of --nodes {self.nodes}")
        if 0 < self.gpus_per_node < workers and cluster.device != "cpu":
            raise UserError(
                f"--gpus-per-node {self.gpus_per_node} must be at least {workers}, the workers "
                f"on a node: cluster.workers={cluster.workers} on --nodes {self.nodes}"
            )
        self._more()
        limit_s, needed_s = _seconds(self.time), START_S + _stop_s(job)
        if limit_s is not None and limit_s < needed_s:
            raise UserError(
                f"--time {self.time} is too short: to start and to commit, this run needs {-(-needed_s // 60)} minutes"
            )

    def _more(self) -> dict[str, str]:
        """What --sbatch says. Raises UserError where that is not a list of --name=value."""
        try:
            words = shlex.split(self.sbatch)
        except ValueError as error:
            raise UserError(f"--sbatch {self.sbatch}: {error}") from None
        for word in words:
            if not re.match("--[a-z]", word):
                raise UserError(f"--sbatch {self.sbatch}: {word} is no option; write each as --name=value")
        return {name: value for name, _, value in (word.partition("=") for word in words)}

    def files(self, job: Job) -> dict[str, str]:
        return {RECIPE: job.recipe, SCRIPT: self._script(job)}

    def _script(self, job: Job) -> str:
        folder, cluster = job.folder.absolute(), job.config.cluster
        workers = cluster.max_workers // self.nodes
        # A driver of Ray has all of a node; srun shares it out among its tasks.
        way: Literal["ray", "srun"] = "ray" if cluster.launcher == "ray" else "srun"
        tasks = 1 if way == "ray" else workers
        gpus = self.gpus_per_node or (workers if cluster.device == "cuda" else None)
        options = {
            "--job-name": job.name,
            "--chdir": str(Path.cwd()),
            "--nodes": self.nodes,
            "--ntasks-per-node": tasks,
            "--cpus-per-task": self.cpus_per_worker * workers // tasks,
            "--gpus-per-node": gpus,
            "--time": self.time or None,
            "--partition": self.partition or None,
            "--account": self.account or None,
        }
        return BatchJob(
            what=f"{job.verb} of {job.config.run.dir}",
            way=way,
            options=options | self._more(),
            stop_s=_stop_s(job),
            log=folder / LOG,
            token=folder / TOKEN,
            command=[sys.executable, "-m", *job.command(str(folder / RECIPE))],
        ).script()

    def submit(self, job: Job) -> str:
        if before := _living(job.folder / ID):
            raise UserError(
                f"Slurm job {before} of this run has not ended: `scancel {before}` has it commit and stop, and then "
                "this command goes on"
            )
        command = ["sbatch", "--parsable", str(job.folder / SCRIPT)]
        try:
            done = subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise UserError(
                "sbatch is not here; submit where Slurm's commands are (Debian: apt install slurm-client), or --print "
                "shows what would be submitted"
            ) from None
        except subprocess.CalledProcessError as error:
            raise UserError(f"`{shlex.join(command)}`: {' '.join(error.stderr.split())}") from None
        job_id = done.stdout.strip().partition(";")[0]
        replace_file(job.folder / ID, job_id)
        return job_id

    def tell(self, job: Job, job_id: str) -> str:
        return (
            f"Slurm job {job_id}: `tail -F {shlex.quote(str(job.folder / LOG))}` shows it; `scancel {job_id}` has it "
            f"commit and stop, and the same command then goes on; `scancel --batch --signal=TERM {job_id}` has it "
            "commit and go on as Slurm's queue lets it"
        )

    def watch(self, job: Job, job_id: str) -> int:
        log, shown = job.folder / LOG, 0
        while True:
            state, code = _state(job_id)
            shown = _copy(log, shown)
            if state in ENDED:
                return code or ENDED[state]
            clock.sleep(POLL_S)


def _stop_s(job: Job) -> int:
    """How long before its end a job is to be told of it, so that a commit fits."""
    return min(STOP_S + round(committed_bytes(job.config) / COMMIT_BYTES_PER_S), MOST_STOP_S)


def _seconds(limit: str) -> int | None:
    """A time limit of sbatch's: minutes, m:s, h:m:s, d-h, d-h:m or d-h:m:s; None where there is none."""
    if limit.upper() in ("", "UNLIMITED", "INFINITE"):
        return None
    if not (found := re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)):
        raise UserError(f"--time {limit} is no time limit; choose minutes, hours:minutes:seconds or days-hours")
    days, *parts = found.groups()
    numbers = [int(part or 0) for part in parts]
    if days is None and parts[2] is None:
        numbers = [0, *numbers[:2]]  # minutes, and their seconds
    hours, minutes, seconds = numbers
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _living(file: Path) -> str | None:
    """The job whose id stands in the file, if Slurm still has it in its queue."""
    if not file.exists():
        return None
    job_id = file.read_text().strip()
    with suppress(FileNotFoundError):  # without Slurm's commands nothing will be submitted, either
        told = subprocess.run(["squeue", "--noheader", "--format=%T", "--jobs", job_id], capture_output=True, text=True)
        if told.stdout.strip() not in ("", *ENDED):  # of one that it has forgotten it says nothing there
            return job_id
    return None


def _state(job_id: str) -> tuple[str, int]:
    """The job's state and the exit code of its script; no state while Slurm's controller is away."""
    command = ["scontrol", "--oneliner", "show", "job", job_id]
    told = subprocess.run(command, capture_output=True, text=True)
    if "Invalid job id" in told.stderr:
        raise UserError(f"Slurm has forgotten job {job_id}; `moray status` of its run tells how it ended")
    fields = dict(re.findall(r"(\w+)=(\S*)", told.stdout))
    return fields.get("JobState", ""), int(fields.get("ExitCode", "0:0").partition(":")[0])


def _copy(log: Path, shown: int) -> int:
    """Prints what the log has beyond `shown` bytes, and returns how many it has."""
    if not log.exists():
        return shown
    with log.open("rb") as file:
        file.seek(shown)
        text = file.read()
    print(text.decode(errors="replace"), end="", flush=True)
    return shown + len(text)
