"""A run as a job of Kubernetes: with KubeRay's operator as a RayJob, and without it as a Job of torchrun."""

import re
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any, Literal

import yaml

from moray import UserError
from moray.cluster.exit_codes import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED
from moray.jobs.submission.kubectl import Kubectl
from moray.jobs.submission.manifests import RECIPE_FOLDER, Manifest, Pods, indexed_job, ray_job
from moray.jobs.submission.target import RECIPE, Job, Target

POLL_S = 2.0
# KubeRay appends to it, and would cut off what makes its services' names longer than 63 characters.
LONGEST_NAME = 47
NAME = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")
EXISTING = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")
QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?(k|M|G|T|Ki|Mi|Gi|Ti)?")


@dataclass(frozen=True, kw_only=True)
class Kubernetes(Target):
    """Pods of Kubernetes: a RayJob of KubeRay, or with cluster.launcher=torchrun a plain Job."""

    image: str = ""
    """The image that all pods run, with moray in it."""

    claim: str = ""
    """The PersistentVolumeClaim with data and runs, which several nodes may write to (ReadWriteMany)."""

    mount: str = "/shared"
    """Where the pods see it; data.path and run.dir lie below."""

    nodes: int = 1
    """Pods with workers; each has cluster.workers / NODES of them."""

    gpus: int = 0
    """GPUs of each pod, one a worker; 0: workers compute on CPUs."""

    cpus: int = 0
    """CPUs of each pod; by default one a worker, and with GPUs whatever the node has."""

    memory: str = ""
    """Memory of each pod, as in 64Gi; by default whatever the node has."""

    namespace: str = ""
    """By default the one that kubectl's context has."""

    secret: str = ""
    """A Secret whose entries the pods see as environment variables: a tracker's key, for one."""

    def check(self, job: Job, *, is_here: bool) -> None:
        _check_name(job.name)
        if not self.image:
            raise UserError("--image is missing: the image that pods run, with moray in it")
        if not self.claim:
            raise UserError("--claim is missing: the PersistentVolumeClaim with data and runs")
        for option, there in (("claim", self.claim), ("namespace", self.namespace), ("secret", self.secret)):
            if there and not EXISTING.fullmatch(there):
                raise UserError(
                    f"--{option} {there} can be no {option}'s name: it has small letters, digits, hyphens and dots"
                )
        self._check_paths(job)
        self._check_size(job)

    def _check_paths(self, job: Job) -> None:
        mount = PurePosixPath(self.mount)
        if not mount.is_absolute() or mount == PurePosixPath("/") or ".." in mount.parts:
            raise UserError(f"--mount {self.mount} must be a folder like /shared, where pods see --claim {self.claim}")
        config = job.config
        for setting, path in (
            ("run.dir", config.run.dir),
            *(("data.mix" if config.data.mix else "data.path", folder) for folder in config.data.folders.values()),
            ("model.from", config.weights_from),
        ):
            if path and mount not in PurePosixPath(path).parents:
                raise UserError(
                    f"{setting}={path} must lie below --mount {self.mount}: pods see nothing else of "
                    f"--claim {self.claim}"
                )

    def _check_size(self, job: Job) -> None:
        cluster = job.config.cluster
        if cluster.launcher == "local":
            raise UserError("cluster.launcher=local must be ray (KubeRay) or torchrun (a plain Job) on Kubernetes")
        for option, count, least in (("--nodes", self.nodes, 1), ("--gpus", self.gpus, 0), ("--cpus", self.cpus, 0)):
            if count < least:
                raise UserError(f"{option} {count} must be at least {least}")
        if cluster.max_workers % self.nodes:
            raise UserError(f"cluster.workers={cluster.workers} must be a multiple of --nodes {self.nodes}")
        a_pod = cluster.max_workers // self.nodes
        if self.gpus and self.gpus != a_pod:
            raise UserError(
                f"cluster.workers={cluster.workers} must be --nodes {self.nodes} times --gpus {self.gpus}, "
                f"{self.nodes * self.gpus}: each worker has a GPU"
            )
        if cluster.device == "cuda" and not self.gpus:
            raise UserError(f"cluster.device=cuda needs --gpus {a_pod}")
        if cluster.device == "cpu" and self.gpus:
            raise UserError(f"--gpus {self.gpus} needs cluster.device=cuda or auto, not cpu")
        if self.cpus and self.cpus < a_pod:
            raise UserError(f"--cpus {self.cpus} must be at least {a_pod}, one for each worker of a pod")
        if self.memory and not QUANTITY.fullmatch(self.memory):
            raise UserError(f"--memory {self.memory} must be a quantity of Kubernetes, as in 64Gi")

    def files(self, job: Job) -> dict[str, str]:
        return {"job.yaml": yaml.dump_all(self.manifests(job), Dumper=_Readable, sort_keys=False, width=1000)}

    def manifests(self, job: Job) -> list[Manifest]:
        cluster = job.config.cluster
        workers = cluster.max_workers // self.nodes
        pods = Pods(
            name=job.name,
            namespace=self.namespace,
            image=self.image,
            claim=self.claim,
            mount=self.mount,
            run=job.config.run.dir,
            nodes=self.nodes,
            workers=workers,
            gpus=self.gpus,
            cpus=self.cpus or (0 if self.gpus else workers),
            memory=self.memory,
            secret=self.secret,
            restarts=cluster.max_restarts,
        )
        # A driver may look at its cluster before a node with GPUs has joined it.
        device = cluster.model_copy(update={"device": "cuda" if self.gpus else "cpu"})
        told = replace(job, config=job.config.model_copy(update={"cluster": device}))
        make = ray_job if cluster.launcher == "ray" else indexed_job
        return make(pods, told.command(f"{RECIPE_FOLDER}/{RECIPE}"), told.recipe)

    def submit(self, job: Job) -> str:
        kubectl, kind = Kubectl(self.namespace), _kind(job)
        if there := kubectl.get(kind, job.name):
            if _end(there) is None:
                raise UserError(
                    f"{kind} {job.name} has not ended: `{self._stop(job)}` has it commit and stop; "
                    "or choose another --name"
                )
            # One that has ended does not begin again by being applied.
            kubectl.run("delete", kind, job.name, "--wait")
        kubectl.run("apply", "--filename", str(job.folder / "job.yaml"))
        return job.name

    def tell(self, job: Job, job_id: str) -> str:
        logs = " ".join(Kubectl(self.namespace).words("logs", "--follow", *_log_of(job)))
        return (
            f"{_kind(job)} {job_id}: `{logs}` shows it; `{self._stop(job)}` has it commit and stop, "
            "and the same command then goes on"
        )

    def watch(self, job: Job, job_id: str) -> int:
        kubectl = Kubectl(self.namespace)
        while True:
            # The log of a pod; the next try has another. Before there is one, kubectl says so and ends.
            subprocess.run(kubectl.words("logs", "--follow", *_log_of(job)), stderr=subprocess.DEVNULL)
            there = kubectl.get(_kind(job), job_id)
            if there is None:  # somebody stopped it
                return EXIT_INTERRUPTED
            if (code := _end(there)) is not None:
                return code
            time.sleep(POLL_S)

    def _stop(self, job: Job) -> str:
        return " ".join(Kubectl(self.namespace).words("delete", _kind(job), job.name))


def _check_name(name: str) -> None:
    """Raises UserError with a name that would do, for one that Kubernetes (RFC 1035) or KubeRay would refuse."""
    if len(name) > LONGEST_NAME or not NAME.fullmatch(name):
        plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).lstrip("-0123456789")[:LONGEST_NAME].strip("-")
        raise UserError(
            f"--name {name} must be at most {LONGEST_NAME} small letters, digits and hyphens, a letter first: "
            f"--name {plain or 'run'} would do"
        )


class _Readable(yaml.SafeDumper):
    """A text of several lines as it is, and each thing where it belongs: no references."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Readable.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, "|" if "\n" in text else None)
)


def _kind(job: Job) -> Literal["rayjob", "job"]:
    return "rayjob" if job.config.cluster.launcher == "ray" else "job"


def _log_of(job: Job) -> list[str]:
    """Of KubeRay's submitter, a Job of the RayJob's name; of the pod with rank 0."""
    if _kind(job) == "rayjob":
        return [f"job/{job.name}"]
    return ["--selector", f"job-name={job.name},batch.kubernetes.io/job-completion-index=0", "--tail", "-1"]


def _end(there: dict[str, Any]) -> int | None:
    """The exit code of a RayJob or Job as the cluster has it; None while it goes on."""
    status = there.get("status", {})
    if there["kind"] == "RayJob":
        state = status.get("jobDeploymentStatus")
        if state not in ("Complete", "Failed"):
            return None
        if status.get("jobStatus") == "SUCCEEDED":
            return EXIT_DONE
        told = re.search(r"exit code (\d+)", status.get("message", ""))
        stopped = status.get("jobStatus") == "STOPPED"
        return EXIT_INTERRUPTED if stopped else int(told[1]) if told else EXIT_FAILED
    ends = {entry["type"] for entry in status.get("conditions", []) if entry["status"] == "True"}
    return EXIT_DONE if "Complete" in ends else EXIT_FAILED if "Failed" in ends else None
