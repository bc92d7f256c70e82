"""`moray submit --to ray`: against a real cluster of two nodes with a token, as docs/launching/ray.md has it."""

import json
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from nodes_of_one import COUNT_NODES, SmallNode, two_nodes
from tiny import tiny

import moray
from moray.cluster.events import read_events
from moray.cluster.versions import versions
from moray.jobs.runs.status import status_of
from moray.jobs.training.metrics import read_metrics

PAGE = (Path(__file__).parents[3] / "docs" / "launching" / "ray.md").read_text()
SCRIPTS = sysconfig.get_path("scripts")
ENDLESS = 100_000


def command_of_page(begin: str) -> str:
    """The line of the page that begins so, without its comment."""
    (line,) = {line.strip() for line in PAGE.splitlines() if line.strip().startswith(begin)}
    return line.partition(" #")[0].strip()


@dataclass
class Cluster:
    """Two nodes; the second one does not see what is in the folder `hidden`, but has another one there."""

    nodes: tuple[SmallNode, SmallNode]
    folder: Path
    environment: dict[str, str]
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)
    begun: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, node: SmallNode, words: str) -> None:
        """On a core of its own: each node would take all of the machine's, and their threads wait for each other."""
        core = sorted(os.sched_getaffinity(0))[-1 if node.name == "n2" else 0]
        with (self.folder / f"{node.name}.log").open("a") as log:
            command = node.command("taskset", "--cpu-list", str(core), "bash", "-c", words)
            self.started.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))

    def begin(self, words: str, **changed: str) -> subprocess.Popen[str]:
        """A shell's line, on a machine beside the nodes."""
        command, pipe = self.nodes[0].beside("bash", "-c", f"exec {words}"), subprocess.PIPE
        process = subprocess.Popen(command, env=self.environment | changed, stdout=pipe, stderr=pipe, text=True)
        self.begun.append(process)
        return process

    def run(self, words: str, **changed: str) -> subprocess.CompletedProcess[str]:
        process = self.begin(words, **changed)
        out, err = process.communicate(timeout=200)
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def close(self) -> None:
        for process in (*self.begun, *self.started):
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "hidden").mkdir()
    head, member = (command_of_page(f"ray start --{word}") for word in ("head", "address"))
    options = "--num-cpus 1 --disable-usage-stats --block"
    with two_nodes(folder) as nodes:
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "HEAD": nodes[0].address,
            "PATH": f"{SCRIPTS}:{os.environ['PATH']}",
        }
        made = Cluster(nodes, folder, environment)
        try:
            # On a busy machine a node may not start within Ray's 15 s.
            made.start(nodes[0], f"until {head} {options} --node-ip-address $HEAD; do sleep 1; done")
            hide = f"mount -t tmpfs tmpfs {folder / 'hidden'}"
            join = f"{member} {options} --node-ip-address {nodes[1].address}"
            made.start(nodes[1], f"{hide} && until {join}; do sleep 1; done")
            wait_until(
                lambda: made.run(f"{sys.executable} -c {shlex.quote(COUNT_NODES)} http://$HEAD:8265").stdout == "2\n",
                made,
            )
            yield made
        finally:
            made.close()


def wait_until(holds: Callable[[], bool], cluster: Cluster) -> None:
    until = time.monotonic() + 90
    while not holds():
        logs = [path.read_text() for path in cluster.folder.glob("*.log")]
        assert all(process.poll() is None for process in cluster.started), logs
        assert time.monotonic() < until, logs
        time.sleep(0.2)


def submit(data: Path, run: Path, options: str = "--follow", steps: int = ENDLESS) -> str:
    """The page's command with a tiny model, as many workers as the cluster has slots, and paths of the test."""
    before, _, _ = command_of_page("moray submit").partition(" -- ")
    return before.replace("--follow", options) + " -- " + pretrain(data, run, steps)


def pretrain(data: Path, run: Path, steps: int, launcher: str = "ray") -> str:
    """The learning rate is the same whatever the number of steps, but for the last one."""
    changed = {
        "cluster__launcher": launcher,
        "cluster__workers": 2,
        "train__steps": steps,
        "train__eval_every": 0,
        "optimizer__schedule": "wsd",
        "optimizer__decay_fraction": 1 / ENDLESS,
    }
    return shlex.join(["pretrain", *tiny(data, run, **changed)])


def losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(run)] if (run / "metrics.jsonl").exists() else []


@pytest.mark.timeout(300)
def test_a_job_that_is_stopped_goes_on_where_it_was(cluster: Cluster, dataset: Path, tmp_path: Path) -> None:
    """And the losses are those of a job that nobody stopped."""
    run, untouched = tmp_path / "first", tmp_path / "untouched"
    following = cluster.begin(submit(dataset, run))
    assert following.stderr
    assert "Ray job first-1: `ray job logs --follow" in following.stderr.readline()
    second = cluster.run(submit(dataset, run, options=""))
    assert second.returncode == 2
    assert "job first-1 of the same name has not ended: `ray job stop" in second.stderr

    wait_until(lambda: len(losses(run)) >= 1, cluster)
    stopped = cluster.run(command_of_page("ray job stop"))
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    out, err = following.communicate(timeout=30)
    assert following.returncode == 75, out + err
    assert "stopped on request; what was done is committed" in out
    status = status_of(run)
    assert (status.exit_code, status.job, status.launcher) == (75, {"ray": "first-1"}, "ray")
    assert {*status.nodes} == {node.address for node in cluster.nodes}
    assert status.commit_step == len(losses(run))

    steps = status.commit_step + 10
    done = cluster.run(submit(dataset, run, steps=steps))
    assert done.returncode == 0, done.stdout + done.stderr
    (resume,) = [event for event in read_events(run / "events.jsonl") if event["kind"] == "resume"]
    assert resume["step"] == status.commit_step
    of_torchrun = f"torchrun --nproc-per-node 2 -m moray {pretrain(dataset, untouched, steps, 'torchrun')}"
    reference = cluster.run(of_torchrun, OMP_NUM_THREADS="1")
    assert reference.returncode == 0, reference.stderr
    assert losses(run) == losses(untouched)
    assert len(losses(run)) == steps


def test_ray_s_own_command(cluster: Cluster, dataset: Path, tmp_path: Path) -> None:
    before = command_of_page("ray job submit").partition(" moray pretrain")[0]
    settings = shlex.join(tiny(dataset, tmp_path / "run", cluster__launcher="ray", cluster__workers=2, train__steps=2))
    done = cluster.run(f"{before} moray pretrain {settings}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(losses(tmp_path / "run")) == 2


def test_data_that_another_node_does_not_see(cluster: Cluster, dataset: Path, tmp_path: Path) -> None:
    """Of two workers one is there; the job ends with the mistake's code, which following passes on."""
    data = cluster.folder / "hidden" / "data"
    data.symlink_to(dataset)
    done = cluster.run(submit(data, tmp_path / "run"))
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"moray: on n2: data.path={data} does not exist" in done.stdout


def test_another_moray_on_another_node(cluster: Cluster, dataset: Path, tmp_path: Path) -> None:
    """The driver's is a changed copy, which the second node does not see."""
    root = cluster.folder / "hidden" / "root"
    shutil.copytree(Path(moray.__file__).parent, root / "moray", ignore=shutil.ignore_patterns(".*", "tests", "docs"))
    with (root / "moray" / "jobs" / "demo.py").open("a") as file:
        file.write("\n# Changed.\n")
    runtime_env = {"env_vars": {"PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}"}}
    before = command_of_page("ray job submit").partition(" -- ")[0]
    run = f"exec python -m moray {pretrain(dataset, tmp_path / 'run', 2)}"
    done = cluster.run(f"{before} --runtime-env-json {shlex.quote(json.dumps(runtime_env))} -- {run}")
    own = versions()["moray"]
    (line,) = {line for line in done.stdout.splitlines() if line.startswith("moray: ")}  # Ray tells it again at the end
    assert line.startswith(f"moray: moray is {own} on node {cluster.nodes[1].address}, but ")
    assert line.endswith(" here, where the driver is; install the same on all nodes")
    assert line.count(own) == 1


def test_a_token_that_is_not_the_clusters(cluster: Cluster, dataset: Path, tmp_path: Path) -> None:
    done = cluster.run(submit(dataset, tmp_path / "run"), RAY_AUTH_TOKEN=secrets.token_hex(32))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    url = f"http://{cluster.nodes[0].address}:8265"
    assert line == (
        f"moray: the Ray at {url} wants another token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN as they are on the "
        "cluster"
    )
