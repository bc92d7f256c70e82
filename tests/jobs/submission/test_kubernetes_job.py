"""A plain Job of Kubernetes: its pods, as they are written, in containers; this plays the Job controller's part."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from containers import CLAIM, IMAGE, MOUNT, Containers, containers
from tiny import tiny

from moray.jobs.options import bind
from moray.jobs.runs.ledger import ledger_problems
from moray.jobs.runs.status import status_of
from moray.jobs.submission.kubernetes import Kubernetes
from moray.jobs.submission.manifests import GRACE_S, Manifest
from moray.jobs.submission.submit import as_job
from moray.jobs.training.metrics import read_metrics

STEPS = 80


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Iterator[Containers]:
    with containers(tmp_path_factory.mktemp("pods"), subnet=71) as made:
        shutil.copytree(dataset, made.storage / "data")
        yield made


def manifests(*options: str) -> list[Manifest]:
    target = bind(Kubernetes, "moray submit", ["--image", IMAGE, "--claim", CLAIM, "--mount", MOUNT, *options])()
    words = tiny(
        Path(MOUNT) / "data",
        Path(MOUNT) / "runs/first",
        cluster__launcher="torchrun",
        cluster__workers=2,
        train__steps=STEPS,
        train__eval_every=0,
    )
    job = as_job(target, ["pretrain", *words])
    target.check(job, is_here=False)
    return target.manifests(job)


def start(here: Containers, recipe: Manifest, job: Manifest) -> list[str]:
    """What the controller of Jobs and the name of the service add to the pods."""
    name, count = job["metadata"]["name"], job["spec"]["completions"]
    started = []
    for index in range(count):
        pod = job["spec"]["template"]["spec"]
        index_of = {"name": "JOB_COMPLETION_INDEX", "value": str(index)}
        container = pod["containers"][0]
        names = {"ip": here.address(10), "hostnames": [f"{name}-0.{pod['subdomain']}"]}
        changed = {
            **pod,
            "hostname": f"{name}-{index}",
            "hostAliases": [names],
            "containers": [{**container, "env": [*container["env"], index_of]}],
        }
        started.append(here.start(f"{name}-{index}", 10 + index, changed, recipe))
    return started


def wait_for_steps(here: Containers, pods: list[str], run: Path, least: int) -> None:
    until = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists() or len(steps(run)) < least:
        assert time.monotonic() < until, [here.log(pod) for pod in pods]
        time.sleep(0.1)


def steps(run: Path) -> list[int]:
    return [row["step"] for row in read_metrics(run)]


@pytest.mark.timeout(180)
def test_pods_that_are_stopped_go_on_to_the_end(here: Containers) -> None:
    run = here.storage / "runs/first"
    recipe, _, job = manifests("--nodes", "2")
    pods = start(here, recipe, job)
    wait_for_steps(here, pods, run, 3)
    for asked in [here.ask_to_end(pod, GRACE_S) for pod in pods]:
        asked.wait(60)
    assert [here.exit_code(pod) for pod in pods] == [75, 75], [here.log(pod) for pod in pods]
    stopped = status_of(run)
    assert stopped.job == {"kubernetes": "first"}
    assert (stopped.state, stopped.launcher, stopped.commit_step) == ("stopped", "torchrun", len(steps(run)))
    assert len(steps(run)) < STEPS

    here.remove(*here.pods)
    pods = start(here, recipe, job)
    assert [here.exit_code(pod) for pod in pods] == [0, 0], [here.log(pod) for pod in pods]
    assert steps(run) == list(range(1, STEPS + 1))
    assert ledger_problems(run) == []
    assert status_of(run).state == "done"
