"""A run as a job of a Ray cluster that is there already, through its job server."""

import asyncio
import json
import logging
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from moray import UserError
from moray.cluster.exit_codes import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED
from moray.jobs.submission.target import RECIPE, Job, Target

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ANSWER_S = 5.0
POLL_S = 0.5
# Ray kills a job 3 s after it has asked it to stop; a commit may take longer.
STOP_WAIT_S = 600
ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"


@dataclass(frozen=True, kw_only=True)
class RayJob(Target):
    """A job of a Ray cluster that runs already: `ray job submit`, with what a run needs."""

    address: str = ""
    """The cluster's job server, http://HEAD:8265; by default RAY_API_SERVER_ADDRESS, or this machine's."""

    def check(self, job: Job, *, is_here: bool) -> None:
        if job.config.cluster.launcher != "ray":
            raise UserError(f"cluster.launcher={job.config.cluster.launcher} must be ray in a job of Ray")
        try:
            is_address = urlsplit(self._url).scheme in ("http", "https") and self._host_and_port[0] != ""
        except ValueError:  # a port that is no number
            is_address = False
        if not is_address:
            raise UserError(f"--address {self._url} must be http://HOST:PORT of the job server; the port is often 8265")

    @property
    def _url(self) -> str:
        return (self.address or os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS).rstrip("/")

    @property
    def _host_and_port(self) -> tuple[str, int]:
        parts = urlsplit(self._url)
        return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)

    def files(self, job: Job) -> dict[str, str]:
        return {RECIPE: job.recipe, "ray-job.json": json.dumps({"address": self._url, **_request(job)}, indent=1)}

    def submit(self, job: Job) -> str:
        with self._client() as client:
            self._check_version(client)
            before = [known.submission_id or "" for known in client.list_jobs() if _is_of(job, known.submission_id)]
            for known in before:
                if not client.get_job_status(known).is_terminal():
                    raise UserError(
                        f"job {known} of the same name has not ended: `{self._words('stop', known)}`, or choose "
                        "another --name"
                    )
            job_id = f"{job.name}-{max((_number(known) for known in before), default=0) + 1}"
            # The job's working folder has the recipe and nothing else; without one, it would be wherever Ray is.
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / RECIPE).write_text(job.recipe)
                request = _request(job)
                runtime_env = {**request["runtime_env"], "working_dir": folder}
                return client.submit_job(**{**request, "runtime_env": runtime_env}, submission_id=job_id)

    def tell(self, job: Job, job_id: str) -> str:
        stop = self._words("stop", job_id)
        return (
            f"Ray job {job_id}: `{self._words('logs --follow', job_id)}` shows it; `{stop}` has it commit and stop, "
            "and the same command then goes on"
        )

    def watch(self, job: Job, job_id: str) -> int:
        with self._client() as client:
            told = _follow(client, job_id)
        if told is None:
            from moray.cluster.worker import WorkerError  # imports torch

            raise WorkerError(
                f"the job server at {self._url} does not answer any more; `moray status` of the run tells what became "
                "of it"
            )
        if told.status == "SUCCEEDED":
            return EXIT_DONE
        # Of a job that was asked to stop, Ray does not keep the exit code.
        return EXIT_INTERRUPTED if told.status == "STOPPED" else told.driver_exit_code or EXIT_FAILED

    def _words(self, verb: str, job_id: str) -> str:
        return f"ray job {verb} --address {self._url} {job_id}"

    @contextmanager
    def _client(self) -> "Iterator[JobSubmissionClient]":
        """Raises UserError where no job server answers, or where it wants another token."""
        try:
            socket.create_connection(self._host_and_port, ANSWER_S).close()
        except OSError as error:
            raise UserError(
                f"no job server answers at {self._url} ({error}): give --address, start Ray with "
                "`ray start --head` there, or open a tunnel to it"
            ) from None
        os.environ[ADDRESS_VARIABLE] = self._url  # which Ray's client takes before any argument
        logging.disable(logging.INFO)  # it tells of every upload
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        try:
            yield JobSubmissionClient(self._url)
        except AuthenticationError:
            raise UserError(
                f"the Ray at {self._url} wants another token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN as they are "
                "on the cluster"
            ) from None
        except UserError:
            raise
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(f"the job server at {self._url}: {' '.join(str(error).split())}") from None

    def _check_version(self, client: "JobSubmissionClient") -> None:
        import ray

        theirs = client._server_ray_version
        if theirs != ray.__version__:
            raise UserError(f"Ray is {theirs} at {self._url}, but {ray.__version__} here; install the same on both")


def _request(job: Job) -> dict[str, Any]:
    """What the job server is asked for. `exec`: Ray would otherwise wait for the shell around what it has stopped."""
    environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}
    return {
        "entrypoint": f"exec {' '.join(job.command(RECIPE))}",
        "runtime_env": {"env_vars": environment},
        "metadata": {"run": job.config.run.dir},
    }


def _is_of(job: Job, submission_id: str | None) -> bool:
    name, _, number = (submission_id or "").rpartition("-")
    return name == job.name and number.isdigit()


def _number(submission_id: str) -> int:
    return int(submission_id.rpartition("-")[2])


def _follow(client: "JobSubmissionClient", job_id: str) -> "JobDetails | None":
    """Shows the log until the job ends; returns how it did, or None where nobody answers any more."""
    from aiohttp import ClientError

    while True:
        with suppress(ClientError):  # the next question tells whether the server has gone
            asyncio.run(_copy_log(client, job_id))
        try:
            told = client.get_job_info(job_id)
        except OSError:
            return None
        if told.status.is_terminal():  # the log may end before the job does
            return told
        time.sleep(POLL_S)


async def _copy_log(client: "JobSubmissionClient", job_id: str) -> None:
    async for text in client.tail_job_logs(job_id):
        print(text, end="", flush=True)
