"""What `moray submit --to kubernetes` refuses, and what it writes, held against the schema that KubeRay has."""

import json
import lzma
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from tiny import tiny

from moray.jobs.config.load import load_config

Moray = Callable[..., "Outcome"]  # noqa: F821 - of conftest.py
SCHEMAS = Path(__file__).parent / "schemas"
OPTIONS = ["--image", "registry/moray:1", "--claim", "shared"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def words(*own: str, run: str = "/shared/runs/first", **changes: object) -> list[str]:
    changed = {"cluster__launcher": "ray", "cluster__workers": 4, **changes}
    return ["submit", "--to", "kubernetes", *own, "--", "pretrain", *tiny(Path("/shared/data"), Path(run), **changed)]


@pytest.mark.parametrize(
    ("own", "changes", "line"),
    [
        (["--claim", "c"], {}, "--image is missing: the image that pods run, with moray in it"),
        (["--image", "i"], {}, "--claim is missing: the PersistentVolumeClaim with data and runs"),
        ([*OPTIONS, "--name", "Run_7B"], {}, "--name Run_7B must be at most 47 small letters, digits and hyphens, a "),
        ([*OPTIONS, "--name", "Run_7B"], {}, "--name run-7b would do"),
        ([*OPTIONS, "--name", "7-b"], {}, "--name b would do"),
        ([*OPTIONS, "--name", "ж"], {}, "--name run would do"),
        ([*OPTIONS, "--name", "a" * 46 + "-b"], {}, f"--name {'a' * 46} would do"),
        ([*OPTIONS], {"run": "/shared/runs/First.Run"}, "--name First.Run must be"),
        (
            [*OPTIONS, "--namespace", "Team A"],
            {},
            "--namespace Team A can be no namespace's name: it has small letters",
        ),
        ([*OPTIONS, "--secret", "Keys"], {}, "--secret Keys can be no secret's name"),
        ([*OPTIONS], {"run": "/scratch/first"}, "run.dir=/scratch/first must lie below --mount /shared: pods see noth"),
        (
            [*OPTIONS],
            {"data__path": "", "data__mix": "a=1:/shared/a,b=1:/scratch/b"},
            "data.mix=/scratch/b must lie below --mount /shared: pods see noth",
        ),
        ([*OPTIONS, "--mount", "/data"], {}, "run.dir=/shared/runs/first must lie below --mount /data"),
        ([*OPTIONS, "--mount", "shared"], {}, "--mount shared must be a folder like /shared"),
        ([*OPTIONS, "--mount", "/"], {}, "--mount / must be a folder like /shared"),
        ([*OPTIONS], {"run": "/shared"}, "run.dir=/shared must lie below --mount /shared"),
        ([*OPTIONS], {"cluster__launcher": "local", "cluster__workers": 1}, "cluster.launcher=local must be ray"),
        ([*OPTIONS, "--nodes", "3"], {}, "cluster.workers=4 must be a multiple of --nodes 3"),
        ([*OPTIONS, "--nodes", "0"], {}, "--nodes 0 must be at least 1"),
        ([*OPTIONS, "--gpus", "8"], {}, "cluster.workers=4 must be --nodes 1 times --gpus 8, 8: each worker has a GPU"),
        ([*OPTIONS, "--gpus", "-1"], {}, "--gpus -1 must be at least 0"),
        ([*OPTIONS], {"cluster__device": "cuda"}, "cluster.device=cuda needs --gpus 4"),
        ([*OPTIONS, "--gpus", "4"], {"cluster__device": "cpu"}, "--gpus 4 needs cluster.device=cuda or auto, not cpu"),
        ([*OPTIONS, "--cpus", "3"], {}, "--cpus 3 must be at least 4, one for each worker of a pod"),
        ([*OPTIONS, "--memory", "64GB"], {}, "--memory 64GB must be a quantity of Kubernetes, as in 64Gi"),
        ([*OPTIONS, "--node", "2"], {}, "--node is not an option of moray submit --to kubernetes; did you mean --node"),
    ],
)
def test_what_kubernetes_would_refuse(moray: Moray, own: list[str], changes: dict[str, Any], line: str) -> None:
    outcome = moray(*words(*own, **changes))
    assert outcome.code == 2
    (said,) = outcome.err.splitlines()
    assert line in said
    assert list(Path().iterdir()) == []


def strict(schema: Any) -> Any:
    """The CRD's schema as JSON Schema, as the API server reads it with `kubectl --validate=strict`."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: strict(part) for name, part in schema.items()}
    if made.pop("x-kubernetes-int-or-string", None):
        made["type"] = ["integer", "string"]
    if isinstance(made.get("properties"), dict) and isinstance(made.get("type"), str):
        made.setdefault("additionalProperties", False)
    return made


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    """Of a RayJob; the pods in it are whole, and so it knows the pods of a Job too."""
    made = strict(json.loads(lzma.decompress((SCHEMAS / "rayjob-v1.json.xz").read_bytes())))
    # The CRD leaves what all objects have to the API server.
    named = {"name": {"type": "string"}, "namespace": {"type": "string"}, "labels": {"type": "object"}}
    made["properties"]["metadata"] = {"type": "object", "properties": named, "additionalProperties": False}
    return made


def printed(moray: Moray, *own: str, **changes: object) -> list[dict[str, Any]]:
    outcome = moray(*words(*OPTIONS, "--print", *own, **changes))
    assert outcome.code == 0, outcome.err
    assert list(Path().iterdir()) == []
    return list(yaml.safe_load_all(outcome.out))


ALL = ["--nodes", "2", "--gpus", "2", "--cpus", "16", "--memory", "64Gi", "--secret", "keys", "--namespace", "team"]


@pytest.mark.parametrize("own", [[], ALL])
def test_a_ray_job_is_one_that_kuberay_knows(moray: Moray, schema: dict[str, Any], own: list[str]) -> None:
    recipe, job = printed(moray, *own)
    jsonschema.validate(job, schema)
    assert (recipe["kind"], job["kind"], job["apiVersion"]) == ("ConfigMap", "RayJob", "ray.io/v1")
    # What stands in a shell's line must be safe words.
    assert job["spec"]["entrypoint"] == "exec moray pretrain --recipe /etc/moray/recipe.toml"
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0", "num-gpus": "0"}
    (workers,) = cluster["workerGroupSpecs"]
    slots = {"num-gpus": "2"} if own else {"num-cpus": "4"}
    assert (workers["replicas"], workers["rayStartParams"]) == (2 if own else 1, slots)
    for group in (cluster["headGroupSpec"], workers):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert pod["terminationGracePeriodSeconds"] == 300
        assert container["lifecycle"]["preStop"]["exec"]["command"][-1] == "/shared/runs/first"
        mounts = {entry["mountPath"]: entry["name"] for entry in container["volumeMounts"]}
        assert set(mounts) == {"/shared", "/etc/moray", "/dev/shm"}
        assert set(mounts.values()) == {volume["name"] for volume in pod["volumes"]}
        assert container.get("envFrom") == ([{"secretRef": {"name": "keys"}}] if own else None)
    if own:
        assert container["resources"]["limits"] == {"cpu": "16", "memory": "64Gi", "nvidia.com/gpu": "2"}
        assert {"name": "OMP_NUM_THREADS", "value": "8"} in container["env"]
        assert {entry["metadata"]["namespace"] for entry in (recipe, job)} == {"team"}


def test_the_schema_finds_what_the_operator_would_overlook(moray: Moray, schema: dict[str, Any]) -> None:
    _, job = printed(moray)
    for change in (
        lambda spec: spec.update(shutdownAfterJobFinish=True),
        lambda spec: spec["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
        lambda spec: spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"].update(container=[]),
    ):
        changed = json.loads(json.dumps(job))
        change(changed["spec"])
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(changed, schema)


@pytest.mark.parametrize("own", [[], ALL])
def test_a_plain_job_is_one_that_kubernetes_knows(moray: Moray, schema: dict[str, Any], own: list[str]) -> None:
    _, service, job = printed(moray, *own, cluster__launcher="torchrun", cluster__max_restarts=5)
    nodes = 2 if own else 1
    spec = job["spec"]
    pod = spec.pop("template")["spec"]
    submitter = schema["properties"]["spec"]["properties"]["submitterPodTemplate"]["properties"]["spec"]
    jsonschema.validate(pod, submitter)
    policy = spec.pop("podFailurePolicy")["rules"]
    assert spec == {
        "completionMode": "Indexed",
        "completions": nodes,
        "parallelism": nodes,
        "backoffLimit": 5 * nodes,
    }
    assert [rule["action"] for rule in policy] == ["FailJob", "Ignore"]
    # A Job with such a policy must not restart its containers.
    assert pod["restartPolicy"] == "Never"
    assert service["spec"]["clusterIP"] == "None"
    assert service["metadata"]["name"] == pod["subdomain"] == job["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert f"--nnodes {nodes} --node-rank $JOB_COMPLETION_INDEX" in pod["containers"][0]["command"][2]


@pytest.mark.parametrize("launcher", ["ray", "torchrun"])
def test_the_recipe_is_the_run(moray: Moray, launcher: str, tmp_path: Path) -> None:
    """But for the device: pods may be there before a GPU is, and know which they will have."""
    recipe, *_ = printed(moray, "--gpus", "4", cluster__launcher=launcher)
    (tmp_path / "recipe.toml").write_text(recipe["data"]["recipe.toml"])
    settings = words(cluster__launcher=launcher, cluster__device="cuda")
    settings = settings[settings.index("pretrain") + 1 :]
    same = dict(zip(*[iter(word.removeprefix("--") for word in settings)] * 2, strict=True))
    assert load_config(str(tmp_path / "recipe.toml"), {}) == load_config(None, same)


STAND_IN = """\
#!/bin/sh
echo "$@" >> calls
[ "$1" != --namespace ] || shift 2
case "$1" in
get) cat answer 2>/dev/null; rm -f answer; [ -e next ] && mv next answer; exit 0;;
apply) echo 'error: the first line' >&2; [ ! -e refusal ] || { cat refusal >&2; exit 1; };;
logs) echo 'step 1';;
esac
"""


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A stand-in for kubectl, whose cluster has what it is given, one after the other."""
    program = tmp_path / "bin" / "kubectl"
    program.parent.mkdir()
    program.write_text(STAND_IN)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")

    def has(first: object, then: object = None) -> None:
        for name, there in (("answer", first), ("next", then)):
            if there:
                Path(name).write_text(json.dumps(there))

    return has


def ray_job_that(deployment: str, job: str = "", message: str = "") -> dict[str, Any]:
    return {
        "kind": "RayJob",
        "status": {"jobDeploymentStatus": deployment, "jobStatus": job, "message": message},
    }


def job_that(*conditions: str) -> dict[str, Any]:
    return {"kind": "Job", "status": {"conditions": [{"type": each, "status": "True"} for each in conditions]}}


def test_kubectl_is_not_here(moray: Moray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    outcome = moray(*words(*OPTIONS))
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1] == (
        "moray: kubectl is not installed here (https://kubernetes.io/docs/tasks/tools); --print shows the manifest, "
        "for `kubectl apply -f -` wherever it is"
    )


def test_kubectl_refuses(moray: Moray, kubectl: Callable[..., None]) -> None:
    Path("refusal").write_text('error: resource mapping not found: no matches for kind "RayJob"\nensure CRDs\n')
    outcome = moray(*words(*OPTIONS))
    assert outcome.code == 2
    said = outcome.err.splitlines()[-1]
    assert said.startswith("moray: `kubectl apply` refuses: error: the first line; error: resource mapping not found")


def test_what_is_written_is_what_is_applied(moray: Moray, kubectl: Callable[..., None]) -> None:
    outcome = moray(*words(*OPTIONS, "--namespace", "team"))
    assert outcome.code == 0, outcome.err
    assert outcome.err.splitlines()[-1] == (
        "rayjob first: `kubectl --namespace team logs --follow job/first` shows it; `kubectl --namespace team delete "
        "rayjob first` has it commit and stop, and the same command then goes on"
    )
    manifest = Path("first-submit/job.yaml")
    assert [entry["kind"] for entry in yaml.safe_load_all(manifest.read_text())] == ["ConfigMap", "RayJob"]
    assert Path("calls").read_text().splitlines()[-1] == f"--namespace team apply --filename {manifest.absolute()}"


def test_a_job_that_goes_on_is_left_alone_and_one_that_has_ended_is_replaced(
    moray: Moray, kubectl: Callable[..., None]
) -> None:
    kubectl(ray_job_that("Running"))
    outcome = moray(*words(*OPTIONS))
    assert outcome.code == 2
    assert "rayjob first has not ended: `kubectl delete rayjob first` has it commit and stop; or choose" in outcome.err
    kubectl(ray_job_that("Failed", "FAILED"))
    assert moray(*words(*OPTIONS)).code == 0
    assert [line.split()[0] for line in Path("calls").read_text().splitlines()] == ["get", "get", "delete", "apply"]


@pytest.mark.parametrize(
    ("launcher", "end", "code"),
    [
        ("ray", ray_job_that("Complete", "SUCCEEDED"), 0),
        ("ray", ray_job_that("Complete", "STOPPED"), 75),
        ("ray", ray_job_that("Failed", "FAILED", "Job entrypoint command failed with exit code 2, last logs: x"), 2),
        ("ray", ray_job_that("Failed", "", "submission timed out"), 1),
        ("torchrun", job_that("SuccessCriteriaMet", "Complete"), 0),
        ("torchrun", job_that("FailureTarget", "Failed"), 1),
    ],
)
def test_following_ends_with_the_run(
    moray: Moray, kubectl: Callable[..., None], launcher: str, end: dict[str, Any], code: int
) -> None:
    """Nothing is there before; then the log ends, and the job has."""
    Path("next").write_text(json.dumps(end))
    outcome = moray(*words(*OPTIONS, "--follow", cluster__launcher=launcher))
    assert outcome.code == code, outcome.err
    assert outcome.out == "step 1\n"


def test_following_one_that_somebody_deletes(moray: Moray, kubectl: Callable[..., None]) -> None:
    assert moray(*words(*OPTIONS, "--follow")).code == 75


def test_the_page(moray: Moray) -> None:
    """Its command is one that this machine accepts, and its ways to stop are those that a submission tells of."""
    page = (Path(__file__).parents[3] / "docs" / "launching" / "kubernetes.md").read_text()
    (line,) = {line.strip() for line in page.splitlines() if line.strip().startswith("moray submit --to kubernetes")}
    outcome = moray(*line.replace("--follow", "--print").split()[1:])
    assert outcome.code == 0, outcome.err
    _, job = yaml.safe_load_all(outcome.out)
    assert job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] == 2
    assert "\n    kubectl delete rayjob first " in page
