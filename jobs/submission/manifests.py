"""A run as objects of Kubernetes: a RayJob for KubeRay's operator, or a plain Job whose pods start torchrun."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from moray.cluster.exit_codes import EXIT_SUPERSEDED
from moray.jobs.runs.reporter import JOB_VARIABLE
from moray.jobs.runs.status import EXIT_RUNNING
from moray.jobs.submission.target import RECIPE

Manifest = dict[str, Any]

# What a pod has to commit and leave in, between being asked to and being killed.
GRACE_S = 300
RECIPE_FOLDER = "/etc/moray"
PORT = 29500
# The driver computes nothing, but imports torch.
HEAD = {"cpu": "2", "memory": "8Gi"}


@dataclass(frozen=True, kw_only=True)
class Pods:
    """What a run's pods are: `nodes` of them with `workers` each, which `run` and data on the claim are mounted in.

    `gpus` and `cpus` are a pod's, 0 for none and for no limit; `memory` is a quantity of Kubernetes, or empty.
    """

    name: str
    namespace: str
    image: str
    claim: str
    mount: str
    run: str
    nodes: int
    workers: int
    gpus: int
    cpus: int
    memory: str
    secret: str
    restarts: int


def ray_job(pods: Pods, command: Sequence[str], recipe: str) -> list[Manifest]:
    """A cluster of Ray for this run alone, with the driver on a head that has no workers, and `command` as its job.

    Each of the `restarts` is a new cluster, and goes on from the newest commit.
    """
    slots = {"num-gpus": str(pods.gpus)} if pods.gpus else {"num-cpus": str(pods.workers)}
    # The pods are told to end all at once: none of them may take its workers, or Ray, from a run that still commits.
    leave = {"preStop": {"exec": {"command": ["python", "-m", "moray.jobs.runs.stop", pods.run]}}}
    head = _container(pods, "ray-head", _resources(HEAD)) | {"lifecycle": leave}
    worker = _container(pods, "ray-worker", _worker_resources(pods)) | {"lifecycle": leave}
    cluster = {
        "rayVersion": version("ray"),
        "authOptions": {"mode": "token"},
        "headGroupSpec": {"rayStartParams": {"num-cpus": "0", "num-gpus": "0"}, "template": {"spec": _pod(pods, head)}},
        "workerGroupSpecs": [
            {
                "groupName": "workers",
                "replicas": pods.nodes,
                "minReplicas": pods.nodes,
                "maxReplicas": pods.nodes,
                "rayStartParams": slots,
                "template": {"spec": _pod(pods, worker)},
            }
        ],
    }
    spec = {
        # KubeRay puts it into a shell's line as it is.
        "entrypoint": f"exec {' '.join(command)}",
        "runtimeEnvYAML": json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(GRACE_S)}}),
        "backoffLimit": pods.restarts,
        "shutdownAfterJobFinishes": True,
        "rayClusterSpec": cluster,
    }
    return [_recipe(pods, recipe), {**_head(pods, "ray.io/v1", "RayJob"), "spec": spec}]


def indexed_job(pods: Pods, command: Sequence[str], recipe: str) -> list[Manifest]:
    """A Job with a pod a node, and a service without an address through which they find the first of them.

    A pod that is lost takes the others down; all of them come back, and go on from the newest commit.
    """
    pod = _pod(pods, _container(pods, "worker", _worker_resources(pods)))
    pod["containers"][0] |= {"command": ["bash", "-c", _script(pods, command)]}
    job = {
        "completionMode": "Indexed",
        "completions": pods.nodes,
        "parallelism": pods.nodes,
        "backoffLimit": pods.restarts * pods.nodes,
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [EXIT_SUPERSEDED]}},
                # A pod that makes room for another, or for its node's end, has not failed.
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "template": {"spec": {**pod, "subdomain": pods.name, "restartPolicy": "Never"}},
    }
    service = {
        "clusterIP": "None",
        "selector": {"job-name": pods.name},
        "publishNotReadyAddresses": True,
        "ports": [{"name": "rendezvous", "port": PORT}],
    }
    return [
        _recipe(pods, recipe),
        {**_head(pods, "v1", "Service"), "spec": service},
        {**_head(pods, "batch/v1", "Job"), "spec": job},
    ]


def _script(pods: Pods, command: Sequence[str]) -> str:
    """What a pod runs. It passes a stop on, and asks the run how it ended: torchrun ends with 1 in any case."""
    start = f"torchrun --nnodes {pods.nodes} --node-rank $JOB_COMPLETION_INDEX --nproc-per-node {pods.workers}"
    meet = f"--master-addr {pods.name}-0.{pods.name} --master-port {PORT} --shutdown-timeout {GRACE_S}"
    return f"""\
{start} {meet} -m {" ".join(command)} & torchrun=$!
trap 'kill -TERM $torchrun' TERM
while kill -0 $torchrun 2>/dev/null; do wait $torchrun; code=$?; done
[ $code = 0 ] && exit
for try in 1 2 3 4 5; do
  python -m moray status "$RUN" --exit-code; code=$?
  [ $code = {EXIT_RUNNING} ] || break  # rank 0 may still be writing its last word
  sleep 1
done
exit $code
"""


def _head(pods: Pods, version: str, kind: str) -> Manifest:
    namespace = {"namespace": pods.namespace} if pods.namespace else {}
    labels = {"app.kubernetes.io/name": "moray", "app.kubernetes.io/instance": pods.name}
    return {"apiVersion": version, "kind": kind, "metadata": {"name": pods.name, **namespace, "labels": labels}}


def _recipe(pods: Pods, text: str) -> Manifest:
    return {**_head(pods, "v1", "ConfigMap"), "data": {RECIPE: text}}


def _pod(pods: Pods, container: Manifest) -> Manifest:
    return {
        "terminationGracePeriodSeconds": GRACE_S,
        "automountServiceAccountToken": False,
        "securityContext": {"fsGroup": 1000, "fsGroupChangePolicy": "OnRootMismatch"},
        "containers": [container],
        "volumes": [
            {"name": "storage", "persistentVolumeClaim": {"claimName": pods.claim}},
            {"name": "recipe", "configMap": {"name": pods.name}},
            # A container's own has 64 MiB, too little for NCCL and for Ray.
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ],
    }


def _container(pods: Pods, name: str, resources: Manifest) -> Manifest:
    # Without a limit, each worker's threads would be as many as the machine has cores, which others use too.
    threads = max(pods.cpus // pods.workers, 1)
    told = {"OMP_NUM_THREADS": str(threads), JOB_VARIABLE: pods.name, "RUN": pods.run}
    return {
        "name": name,
        "image": pods.image,
        "resources": resources,
        "env": [{"name": name, "value": value} for name, value in told.items()],
        **({"envFrom": [{"secretRef": {"name": pods.secret}}]} if pods.secret else {}),
        "volumeMounts": [
            {"name": "storage", "mountPath": pods.mount},
            {"name": "recipe", "mountPath": RECIPE_FOLDER, "readOnly": True},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }


def _worker_resources(pods: Pods) -> Manifest:
    asked = {"cpu": str(pods.cpus or ""), "memory": pods.memory, "nvidia.com/gpu": str(pods.gpus or "")}
    return _resources({name: quantity for name, quantity in asked.items() if quantity})


def _resources(quantities: dict[str, str]) -> Manifest:
    """Asked for and never exceeded: such a pod is the last to be evicted."""
    return {"requests": dict(quantities), "limits": dict(quantities)}
