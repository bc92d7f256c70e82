"""`moray doctor`: looks at this machine, or at every node of a cluster, and says what to do."""

import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from moray import UserError
from moray.cluster.devices import pick_device
from moray.cluster.group import Group, Hooks
from moray.cluster.launch import launch
from moray.cluster.worker import WorkerError
from moray.jobs.doctor.facts import MARK, Facts, Frozen, Question, look
from moray.jobs.doctor.judge import Cluster, judge
from moray.jobs.doctor.meeting import examine
from moray.jobs.doctor.verdict import Verdict

PATIENT = 300.0
"""Seconds: the nodes measure at different speeds, and a folder may be slow."""
FORGOTTEN_S = 3600.0
"""No doctor takes so long: a mark that is older was left by one that was killed."""


class Report(Frozen):
    """is_fit: nothing is to be mended before a run."""

    is_fit: bool
    verdicts: list[Verdict]
    cluster: Cluster | None
    nodes: list[Facts]


def examine_all(folders: Mapping[str, Path], *, in_cluster: bool) -> Report:
    """Looks at this machine or, through an agent on each, at the nodes of the Ray that a run would use.

    folders: by the setting that names them; run.dir is made where it is missing, and taken away again.
    Raises UserError where there is no such Ray, or none of its slots is free.
    """
    paths = {setting: str(path.absolute()) for setting, path in folders.items()}
    question = Question(id=secrets.token_hex(4), folders=paths)
    with _existing(folders.get("run.dir")), _tidied(folders.values(), question.id):
        if in_cluster:
            cluster, nodes = _ask_nodes(question)
        else:
            cluster, nodes = None, [look(question, pick_device(0, "auto"))]
    verdicts = judge(nodes, paths, cluster)
    is_fit = all(verdict.level != "bad" for verdict in verdicts)
    return Report(is_fit=is_fit, verdicts=verdicts, cluster=cluster, nodes=nodes)


def _ask_nodes(question: Question) -> tuple[Cluster, list[Facts]]:
    from moray.cluster.ray.census import census  # Ray is imported only where it is asked for

    heard: dict[int, Facts] = {}

    def on_status(rank: int, step: int, status: dict[str, Any]) -> None:
        heard[rank] = Facts.model_validate(status["facts"])

    with census() as nodes:
        if not nodes.free:
            raise UserError(f"no slot is free on any node of the Ray at {nodes.address}; ask again when one is")
        group = Group(workers=len(nodes.free), max_restarts=0, startup_timeout_s=PATIENT, heartbeat_timeout_s=PATIENT)
        failure = None
        try:
            launch(examine, question, "ray", group, Hooks(on_status=on_status))
        except (WorkerError, UserError) as error:  # another moray on a node is a mistake to launch, and here a finding
            failure = str(error).partition("\n")[0]
        cluster = Cluster(address=nodes.address, is_open=nodes.is_open, busy=nodes.busy, failure=failure)
    return cluster, [heard[rank] for rank in sorted(heard)]


@contextmanager
def _tidied(folders: Iterable[Path], question_id: str) -> Iterator[None]:
    """Leaves no file of this doctor's, though its workers die; nor of an old one's that was killed itself."""
    old = time.time() - FORGOTTEN_S
    try:
        yield
    finally:
        for mark in (mark for folder in folders for mark in folder.glob(f"{MARK}*")):
            with suppress(OSError):
                if mark.name.startswith(f"{MARK}{question_id}-") or mark.stat().st_mtime < old:
                    mark.unlink()


@contextmanager
def _existing(folder: Path | None) -> Iterator[None]:
    if folder is None:
        yield
        return
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--run-dir={folder} is a file; name a folder")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for path in made:
            with suppress(OSError):
                path.rmdir()
