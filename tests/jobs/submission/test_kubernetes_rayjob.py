"""A RayJob's life in containers: its pods, as they are written; a double plays the part of KubeRay's operator."""

import json
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from containers import CLAIM, IMAGE, MOUNT, Containers, Pod, containers
from nodes_of_one import COUNT_NODES
from tiny import tiny

from moray.cluster.events import read_events
from moray.jobs.options import bind
from moray.jobs.runs.ledger import ledger_problems
from moray.jobs.runs.status import status_of
from moray.jobs.submission.kubernetes import Kubernetes
from moray.jobs.submission.manifests import Manifest
from moray.jobs.submission.submit import as_job
from moray.jobs.training.metrics import read_metrics

STEPS = 80
HEAD = 10


@dataclass
class Operator:
    """A double of KubeRay's operator: one cluster of Ray after the other, each with pods and a token of its own.

    It does what rayjob_controller.go and common/job.go do with what is in these manifests, and nothing else; never let
    it see a real API server.
    """

    here: Containers
    recipe: Manifest
    spec: dict[str, Any]
    tries: int = 0
    submissions: int = 0

    def begin_cluster(self) -> None:
        """Head and workers; ends when all of them are there, as the operator waits for that.

        Ray gives a node 15 seconds to start, which may be too few on a busy machine: so once more.
        """
        self._start_cluster()
        if not self._is_ready():
            self.end_cluster()
            self._start_cluster()
            assert self._is_ready(), self.logs()

    def _start_cluster(self) -> None:
        self.tries += 1
        cluster, token = self.spec["rayClusterSpec"], secrets.token_hex(32)
        self.token = [{"name": "RAY_AUTH_MODE", "value": "token"}, {"name": "RAY_AUTH_TOKEN", "value": token}]
        head, (workers,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
        options = {"dashboard-host": "0.0.0.0", **head["rayStartParams"]}
        self.head = self._start("head", HEAD, head["template"]["spec"], f"ray start --head --block {_words(options)}")
        joins = f"ray start --block --address={self.here.address(HEAD)}:6379 {_words(workers['rayStartParams'])}"
        # KubeRay's own way, `ray health-check`, keeps a core busy with imports.
        wait = f"until (: < /dev/tcp/{self.here.address(HEAD)}/6379) 2> /dev/null; do sleep 0.2; done; {joins}"
        for number in range(workers["replicas"]):
            self._start(f"worker-{number}", HEAD + 1 + number, workers["template"]["spec"], wait)

    def _is_ready(self) -> bool:
        count = ["python", "-c", COUNT_NODES, f"http://{self.here.address(HEAD)}:8265"]
        wanted = 1 + self.spec["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"]
        until = time.monotonic() + 60
        while time.monotonic() < until and self.here.are_running():
            if self.here.podman("exec", *self._with_token(), self.head, *count).stdout == f"{wanted}\n":
                return True
            time.sleep(0.5)
        return False

    def submit(self) -> str:
        """The pod that submits, with the line that KubeRay gives its shell; it ends with the job's log."""
        self.submissions += 1
        address = f"--address http://{self.here.address(HEAD)}:8265"
        job_id = f"first-{self.submissions}"
        environment = json.dumps(json.dumps(yaml.safe_load(self.spec["runtimeEnvYAML"])))
        line = (
            f"if ! ray job status {address} {job_id} >/dev/null 2>&1 ; then ray job submit {address} --no-wait "
            f"--runtime-env-json {environment} --submission-id {job_id} -- {self.spec['entrypoint'].strip()} ; fi ; "
            f"ray job logs {address} --follow {job_id}"
        )
        # KubeRay's own pod has the head's image, and neither its volumes nor its hooks.
        container = {"name": "ray-job-submitter", "image": IMAGE, "volumeMounts": []}
        pod = {"containers": [container], "volumes": []}
        return self._start(f"submitter-{self.submissions}", HEAD + 20 + self.submissions, pod, line)

    def job_status(self) -> str:
        words = f"ray job status --address http://{self.here.address(HEAD)}:8265 first-{self.submissions}"
        told = self.here.podman("exec", *self._with_token(), self.head, "sh", "-c", words)
        return told.stdout + told.stderr

    def prepare_to_end(self) -> None:
        """What the kubelet does before it asks the head's container to end."""
        hook = self.spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]
        done = self.here.podman("exec", self.head, *hook["exec"]["command"])
        assert done.returncode == 0, done.stderr

    def end_cluster(self) -> None:
        self.here.remove(*self.here.pods)

    def logs(self) -> list[str]:
        return [self.here.log(container)[-3000:] for container in self.here.containers()]

    def _start(self, name: str, number: int, pod: Pod, line: str) -> str:
        (container,) = pod["containers"]
        changed = {
            **{part: value for part, value in container.items() if part != "lifecycle"},
            "env": [*container.get("env", []), *self.token],
            "command": ["/bin/bash", "-c", "--"],
            "args": [f"ulimit -n 1024; {line}"],
        }
        return self.here.start(f"first-{self.tries}-{name}", number, {**pod, "containers": [changed]}, self.recipe)

    def _with_token(self) -> list[str]:
        return [word for entry in self.token for word in ("--env", f"{entry['name']}={entry['value']}")]


def _words(options: dict[str, str]) -> str:
    return " ".join(f"--{name}={value}" for name, value in options.items())


@pytest.fixture
def operator(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Iterator[Operator]:
    options = ["--image", IMAGE, "--claim", CLAIM, "--mount", MOUNT, "--name", "first"]
    target = bind(Kubernetes, "moray submit", options)()
    words = tiny(
        Path(MOUNT) / "data",
        Path(MOUNT) / "run",
        cluster__launcher="ray",
        cluster__workers=2,
        train__steps=STEPS,
        train__eval_every=0,
        checkpoint__every=2,
    )
    recipe, job = target.manifests(as_job(target, ["pretrain", *words]))
    with containers(tmp_path_factory.mktemp("pods"), subnet=72) as here:
        shutil.copytree(dataset, here.storage / "data")
        yield Operator(here, recipe, job["spec"])


def wait_until(holds: Callable[[], bool], operator: Operator) -> None:
    until = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < until, operator.logs()
        time.sleep(0.1)


@pytest.mark.timeout(240)
def test_a_head_that_is_lost(operator: Operator) -> None:
    """The next cluster goes on from the newest commit, to the end of the run."""
    run = operator.here.storage / "run"

    def commit() -> int:
        return (status_of(run).commit_step or 0) if (run / "status.json").exists() else 0

    operator.begin_cluster()
    operator.submit()
    wait_until(lambda: commit() >= 2, operator)
    operator.here.kill(operator.head)
    operator.end_cluster()
    lost_at = commit()
    assert lost_at < STEPS

    operator.begin_cluster()
    submitter = operator.submit()
    assert operator.here.exit_code(submitter) == 0, operator.here.log(submitter)
    assert "succeeded" in operator.job_status()
    operator.prepare_to_end()
    assert [row["step"] for row in read_metrics(run)] == list(range(1, STEPS + 1))
    assert ledger_problems(run) == []
    (resume,) = [event for event in read_events(run / "events.jsonl") if event["kind"] == "resume"]
    assert resume["step"] == lost_at
    status = status_of(run)
    assert (status.state, status.job) == ("done", {"kubernetes": "first", "ray": "first-2"})
