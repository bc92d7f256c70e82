"""What must hold of a run that was harmed, by what is on disk alone, and of the nodes that it ran on."""

import hashlib
import sys
from pathlib import Path

from chaos.nodes import AGENT
from chaos.run import LANES, Run
from moray.jobs.runs.ledger import ledger_problems
from moray.jobs.training.metrics import read_metrics
from moray.parallel.checkpoint.commits import list_commits, read_tensors, verify

# For Python on the head: how many placement groups there are.
COUNT_GROUPS = """
import os, ray
from ray.util import placement_group_table
ray.init(os.environ["RAY_ADDRESS"], logging_level="error")
print(sum(group["state"] != "REMOVED" for group in placement_group_table().values()))
"""


def problems_on_disk(run: Path, alone: Path, steps: int) -> list[str]:
    """Compared with a run of one process that nothing happened to."""
    found = ledger_problems(run)
    rows, expected = read_metrics(run), read_metrics(alone)
    if [row["positions"] for row in rows] != [[LANES * step, LANES * (step + 1)] for step in range(steps)]:
        found.append("the positions trained on are not each once, in order")
    for key in ("loss", "grad_norm", "validation_loss"):
        if [row.get(key) for row in rows] != [row.get(key) for row in expected]:
            found.append(f"{key} differs from the undisturbed run's")
    commits = list_commits(run / "checkpoints")
    found += [problem for commit in commits for problem in verify(commit)]
    if state_digest(run) != state_digest(alone):
        found.append("the final state differs from the undisturbed run's")
    kept = {commit.path.name for commit in commits}
    strays = [path.name for path in (run / "checkpoints").iterdir() if path.name not in kept]
    # The newest attempt's own folder, which fences off older ones, stays.
    found += [f"checkpoints/{name} was left behind" for name in sorted(strays)[:-1]]
    return found


def state_digest(run: Path) -> str:
    """Of weights and optimizer in the last commit, whatever layout wrote it."""
    commit, digest = list_commits(run / "checkpoints")[-1], hashlib.sha256()
    for name, tensor in read_tensors(commit, sorted(commit.manifest.tensors)):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def left_behind(run: Run) -> list[str]:
    """On the nodes, whose Ray lives on."""
    for node in run.nodes.all:
        run.wait_until(lambda node=node: not node.named(AGENT), f"agents on {node.network.name} end", 60)  # type: ignore[misc]
    told = run.nodes.head.run(sys.executable, "-c", COUNT_GROUPS)
    found = [] if told.stdout.strip() == "0" else [f"placement groups: {told.stdout}{told.stderr[-300:]}"]
    for node in run.nodes.all:
        names, of_ray = node.run("ls", "/dev/shm").stdout.split(), ("plasma", "sem.")
        found += [f"/dev/shm/{name} on {node.network.name}" for name in names if not name.startswith(of_ray)]
    return found
